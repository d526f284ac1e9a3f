"""Claims about several processes: the same run, spread (Sec. 4.1)."""
import dataclasses
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed import Ranks, Spread
from test_train import PRESETS, Recipe, lines, run, small_preset, weights

ROOT = Path(__file__).parent.parent
# train.py with the preset `test`, in a process of its own
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import conftest, test_distributed, test_train
test_train.PRESETS["test"] = test_distributed.preset()
test_train.train.main()
"""


# the first process, before it is started again, dies in the middle of its fourth step
DYING = """
import os, signal
backward = test_train.stages.TextStage.backward
def dying(self, step, rng):
    if step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(self, step, rng)
test_train.stages.TextStage.backward = dying
"""


def preset():
    """The small preset, with a Stage III of few heads a step."""
    small = small_preset()
    return dataclasses.replace(small, large=((4, 4, 32),), ahead=4,
                               recipes=small.recipes | {"stage3": Recipe(4, 4, 1e-3)})


@pytest.fixture(autouse=True)
def preset_test(monkeypatch):
    """`--preset test`."""
    monkeypatch.setitem(PRESETS, "test", preset())


def torchrun(tmp_path, processes, *arguments, more=(), patch=""):
    """Runs train.py's main under torchrun; its output where it failed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("test_train.train.main()", patch + "test_train.train.main()"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port",
               str(20_000 + os.getpid() % 20_000), *more, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def same_run(left, right, start):
    """Asserts that two runs had the same losses and weights, to float tolerance, for how far they went from `start`."""
    losses = [[row["loss"] for row in lines(path)] for path in (left, right)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    left, right, start = (load_file(path / "model.safetensors") for path in (left, right, start))
    assert left.keys() == right.keys()
    # AdamW turns a gradient that is only rounding into a whole step: so all weights together, not one by one
    far = lambda a, b: sum((a[name] - b[name]).square().sum() for name in a) ** 0.5
    assert far(left, right) < 0.02 * far(start, right), (far(left, right), far(start, right))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Stage I in one process, from a codec and a language model of two steps each: what to compare with."""
    path = tmp_path_factory.mktemp("one")
    PRESETS["test"] = preset()
    run("vqgan", "--preset", "test", "--out", path / "vqgan", "--steps", 2)
    run("text", "--preset", "test", "--out", path / "text", "--steps", 2)
    common = ["stage1", "--preset", "test", "--vqgan", path / "vqgan", "--language", path / "text", "--save-every", 3]
    run(*common, "--out", path / "mars")
    run(*common, "--out", path / "start", "--steps", 1, "--lr", 1e-12)
    return common, path / "mars"


@pytest.mark.parametrize("how", [("--micro-batch", 2, "--checkpoint-activations"), ("--shard",)],
                         ids=["ddp-in-small-parts", "sharded"])
def test_two_processes_give_the_losses_and_weights_of_one_and_their_checkpoint_is_one_processs_too(tmp_path, one, how):
    common, expected = one
    torchrun(tmp_path, 2, *common, "--out", tmp_path / "two", *how)

    same_run(tmp_path / "two", expected, expected.parent / "start")
    (tmp_path / "two" / "model.safetensors").unlink()
    (tmp_path / "two" / "checkpoint-000006.pt").unlink()
    run(*common, "--out", tmp_path / "two", "--resume")
    same_run(tmp_path / "two", expected, expected.parent / "start")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqgan", "stage3"])
def test_two_processes_train_the_codec_and_the_cascade_as_one_does(tmp_path, one, stage):
    common = [stage, "--preset", "test", *(["--init", one[1]] if stage == "stage3" else [])]
    threads = torch.get_num_threads()
    torchrun(tmp_path, 2, *common, "--out", tmp_path / "two")
    torch.set_num_threads(1)                # as torchrun's: eigenvectors differ with their number, and so do codecs
    run(*common, "--out", tmp_path / "one")
    run(*common, "--out", tmp_path / "start", "--steps", 1, "--lr", 1e-12)
    torch.set_num_threads(threads)
    same_run(tmp_path / "two", tmp_path / "one", tmp_path / "start")


@pytest.mark.slow
def test_torchrun_starts_a_dead_run_again_and_it_ends_in_the_same_bytes(tmp_path):
    common = ["text", "--preset", "test", "--save-every", 2]
    torchrun(tmp_path, 1, *common, "--out", tmp_path / "whole")
    output = torchrun(tmp_path, 1, *common, "--out", tmp_path / "dying", more=("--max-restarts", "1"), patch=DYING)
    assert output.count("of them train") == 2                                  # it was started twice
    assert weights(tmp_path / "dying") == weights(tmp_path / "whole")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has to be told")
def test_freed_memory_is_kept_for_the_next_tensor():
    """The kernel hands out (and clears) the pages of a tensor of 120 MB once or twice, not twenty times."""
    program = ("import resource, sys, torch, distributed\n"
               "if sys.argv[1] == 'keep': distributed.ready_device('cpu')\n"
               "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
               "before = faults()\n"
               "for _ in range(20): torch.ones(30_000_000)\n"
               "print(faults() - before)")
    def count(word: str) -> int:
        return int(subprocess.run([sys.executable, "-c", program, word], cwd=ROOT, capture_output=True, text=True,
                                  check=True).stdout)
    kept = min(count("keep") for _ in range(3))                  # where the heap lies is random, and may be cramped
    returned = count("return")
    assert kept < returned / 4 or returned < 1000                # less than a thousand: huge pages


def test_rows_go_round_the_ranks_and_come_back_in_order():
    ranks = [Ranks(rank, 3) for rank in range(3)]
    assert [r.share(list(range(7))) for r in ranks] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks().together([1, 2, 3]) == [1, 2, 3] and Ranks().sum(2.5) == 2.5


def test_bf16_trains_float32_weights(mars):
    mars.freeze_language()
    spread = Spread(mars, Ranks(), bf16=True)
    tokens = torch.randint(0, 42 + 16, (2, 12), generator=torch.Generator().manual_seed(0))
    is_target = torch.ones_like(tokens, dtype=torch.bool)
    loss = spread(tokens, is_target)
    loss.backward()
    assert loss.item() == pytest.approx(mars.loss(tokens, is_target).item(), rel=0.02)
    assert loss.item() != mars.loss(tokens, is_target).item()
    assert all(p.grad.dtype == torch.float32 for p in mars.parameters() if p.requires_grad)


@pytest.mark.parametrize("attempt", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path, attempt):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), "text", "--preset", "test", "--save-every", "1", "--steps", "40", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moment = random.Random(time.time_ns()).random() * 0.5
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=environment)
    while not any((tmp_path / "killed").glob("checkpoint-*.pt")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(moment)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, str(tmp_path / "killed"), "--resume"], check=True, capture_output=True, env=environment)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, env=environment)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole"), moment
    timeless = lambda d: [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in lines(d)]
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
