"""Claims about several processes: the same run, spread, killed and started again (Sec. 4.1)."""
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed import Distributed, full_state
from test_train import arguments_of, lines, preset, run, runs, weights    # noqa: fixtures

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# train.py with the preset `tiny`, in a process of its own
PROGRAM = f"""
import os, random, signal, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_train as t
t.PRESETS["tiny"] = t.TINY
rank, attempt = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
# PATCH
t.run(*sys.argv[1:])
"""

# process 1 dies in its third step, and process 0 in its fourth when they were started again
DYING = """
learning_rate = t.train.learning_rate
def dying(step, config):
    if (rank, attempt, step) in (("1", "0", 2), ("0", "1", 3)):
        os.kill(os.getpid(), signal.SIGKILL)
    return learning_rate(step, config)
t.train.learning_rate = dying
"""

# a process, any, dies at any moment after it has begun
DYING_ANYWHERE = """
if rank == "{rank}" and attempt == "0":
    def die():
        threading.Event().wait({moment})
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=die, daemon=True).start()
"""

# what each process gets to write
GATHERED = """
import run
save = run.full_state
def noting(*arguments, **more):
    state = save(*arguments, **more)
    with open(f"{path}-{{rank}}", "w") as file:
        file.write(str(sum(map(len, state.values()))))
    return state
run.full_state = noting
"""


def torchrun(tmp_path: Path, *arguments, more=(), patch: str = "", code: int = 0) -> str:
    """Runs train.py under torchrun, two processes -> its output; checks its exit code."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("# PATCH", patch))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", *more, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def same_run(left: Path, right: Path, lr: float) -> None:
    """Asserts that two runs had the same losses and weights, to float tolerance."""
    a, b = ([row["loss"] for row in lines(path)] for path in (left, right))
    assert a == pytest.approx(b, rel=1e-5)
    a, b = (load_file(path / "model.safetensors") for path in (left, right))
    for name in a:                                         # AdamW turns a gradient that is only rounding into a step
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=lr / 10)


# ----------------------------------------------------------------------------- the same run, spread

@pytest.fixture(scope="module")
def two(runs, tmp_path_factory):
    """A run of two processes that nothing disturbed: its command, --out and output."""
    out = tmp_path_factory.mktemp("two")
    command = [*arguments_of(runs, "stage1"), "--micro-batch", 1, "--recompute"]
    patch = GATHERED.format(path=out / "gathered")
    return command, out / "run", torchrun(out, *command, "--out", out / "run", patch=patch)


def test_two_processes_give_the_losses_and_weights_of_one(runs, two, tmp_path):
    check_two(runs, "stage1", shutil.copytree(two[1], tmp_path / "two"), two[1].parent, two[2])


@pytest.mark.parametrize("stage, flags", [
    ("stage3", ["--shard"]),
    pytest.param("stage1", ["--shard", "--micro-batch", 1], marks=pytest.mark.slow),
    *(pytest.param(stage, [], marks=pytest.mark.slow) for stage in ("text", "stage1", "stage2", "joint")),
    pytest.param("joint", ["--shard", "--recompute"], marks=pytest.mark.slow)])
def test_sharded_or_not_two_processes_equal_one_in_every_stage(runs, tmp_path, stage, flags):
    patch = GATHERED.format(path=tmp_path / "gathered")
    output = torchrun(tmp_path, *arguments_of(runs, stage), "--out", tmp_path / "two", *flags, patch=patch)
    check_two(runs, stage, tmp_path / "two", tmp_path, output)


def check_two(runs: Path, stage: str, out: Path, gathered: Path, output: str) -> None:
    """Asserts that a run of two processes is that of one, and that one process can go on with it."""
    same_run(out, runs / stage, lr=1e-3)
    counts = [int((gathered / f"gathered-{rank}").read_text()) for rank in (0, 1)]
    assert counts[0] > 0 == counts[1]                                      # only the main process gathers
    assert output.count("of them train") == 1                              # and only it prints
    for path in [out / "model.safetensors", out / "checkpoint-000004.pt"]:
        path.unlink()
    run(*arguments_of(runs, stage), "--out", out, "--resume")
    same_run(out, runs / stage, lr=1e-3)


@pytest.mark.slow
def test_two_processes_train_the_image_tokenizer_as_one_does(runs, tmp_path):
    # a restart draws from the first process's part of a batch, a GAN's batch norm sees a part: without them
    common = [*arguments_of(runs, "vqgan"), "--gan", 0, "--restart-every", 0, "--warm-up", 0, "--out"]
    torchrun(tmp_path, *common, tmp_path / "two")
    run(*common, tmp_path / "one")
    same_run(tmp_path / "two", tmp_path / "one", lr=1e-3)


# ----------------------------------------------------------------------------- killed, and started again

def test_torchrun_restarts_a_run_that_died_twice_and_it_ends_in_the_same_bytes(runs, two, tmp_path):
    output = torchrun(tmp_path, *two[0], "--out", tmp_path / "dying", "--save-every", 1,
                      more=("--max-restarts", "3"), patch=DYING)
    assert "goes on from step 2" in output and "goes on from step 3" in output
    assert weights(tmp_path / "dying") == weights(two[1])
    assert lines(tmp_path / "dying") == lines(two[1])


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_torchrun_restarts_a_run_that_died_at_any_moment(runs, tmp_path, attempt):
    common = [*arguments_of(runs, "text"), "--steps", 300, "--save-every", 10]
    moment = random.Random(time.time_ns()).random()
    torchrun(tmp_path, *common, "--out", tmp_path / "whole")
    torchrun(tmp_path, *common, "--out", tmp_path / "dying", more=("--max-restarts", "3"),
             patch=DYING_ANYWHERE.format(rank=attempt % 2, moment=8 * moment))
    assert weights(tmp_path / "dying") == weights(tmp_path / "whole"), moment


def test_bad_input_ends_torchrun_without_another_try(runs, tmp_path):
    started = time.monotonic()
    output = torchrun(tmp_path, *arguments_of(runs, "text"), "--out", runs / "text", code=1,
                      more=("--max-restarts", "3"))
    line = "train.py: " + str(runs / "text") + ": holds a run already; pass --resume to go on with it, or another --out"
    ours, theirs = output.split("Traceback")
    assert output.count(line) == 1 and [text for text in ours.splitlines() if text[0] not in "WE"][-1] == line
    assert time.monotonic() - started < 100


def test_an_unknown_flag_ends_torchrun_without_another_try_too(runs, tmp_path):
    output = torchrun(tmp_path, *arguments_of(runs, "text"), "--colour", code=1, more=("--max-restarts", "3"))
    assert 1 <= output.count("unrecognized arguments: --colour") <= 2         # each of the two processes once, at most


def test_the_report_of_torchrun_ends_in_the_line_of_a_refused_run(runs, tmp_path):
    report = torchrun(tmp_path, *arguments_of(runs, "text"), "--out", runs / "text", code=1).splitlines()
    assert any("exitcode  : 2" in line for line in report[-5:]) and "SIGABRT" not in "".join(report)
    assert f"traceback : {runs / 'text'}: holds a run already; pass --resume" in report[-2]


@pytest.mark.parametrize("attempt", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 10))])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(runs, tmp_path, attempt):
    (tmp_path / "program.py").write_text(PROGRAM)
    common = [*arguments_of(runs, "text"), "--save-every", 1, "--steps", 40, "--out"]
    moment, killed = random.Random(time.time_ns()).random() * 0.5, tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py"), *map(str, common), str(killed)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while not any(killed.glob("checkpoint-*.pt")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(moment)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(*common, killed, "--resume")
    run(*common, tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole"), moment
    assert lines(killed) == lines(tmp_path / "whole")
    assert not list(killed.glob(".tmp-*")), moment


# ----------------------------------------------------------------------------- what they are made of

def test_rows_go_round_the_processes_and_come_back_in_order():
    processes = [Distributed(rank, 3) for rank in range(3)]
    assert [p.shard(list(range(7))) for p in processes] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Distributed().all_gather([1, 2, 3]) == [1, 2, 3] and Distributed().all_reduce_sum(2.5) == 2.5


def test_the_state_to_save_leaves_out_what_is_frozen_on_demand(mars):
    trained = {name for name, p in mars.named_parameters() if p.requires_grad}
    assert set(full_state(mars, trained_only=True)["model"]) == trained
    assert set(full_state(mars)["model"]) == set(mars.state_dict()) > trained


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has to be told")
def test_freed_memory_is_kept_for_the_next_tensor():
    """The kernel hands out (and clears) the pages of a tensor of 120 MB once or twice, not twenty times."""
    program = ("import resource, sys, torch, distributed\n"
               "if sys.argv[1] == 'keep': distributed.check_device('cpu')\n"
               "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
               "before = faults()\n"
               "for _ in range(20): torch.ones(30_000_000)\n"
               "print(faults() - before)")

    def count(word: str) -> int:
        return int(subprocess.run([sys.executable, "-c", program, word], cwd=ROOT, capture_output=True, text=True,
                                  check=True).stdout)
    returned = count("return")                                   # less than a thousand: huge pages
    # where the heap lies is random, and may be cramped
    assert returned < 1000 or any(count("keep") < returned / 4 for _ in range(6))
