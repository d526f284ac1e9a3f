"""Claims about the loop: every stage runs, goes on where it ended, refuses bad input in one line (Sec. 3.4, 4.1)."""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import checkpoint
import generate
import train
from data import EncodedImages, encode_each
from distributed import Distributed
from files import lock
from images import resize_and_crop, to_pixels
from mars import MARS, is_visual
from pool import Pool
from run import Output
from sampling import GREEDY
from train import PRESETS, TrainConfig, learning_rate

ROOT = Path(__file__).parent.parent

# every stage, four steps of it; a token is 8 x 8 pixels
STEPS = dict(steps=4, batch=4, save_every=2, sample_every=2)
TINY = {"vqgan": STEPS | dict(resolution=32, hidden_channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, stem=2,
                              attn_resolutions=(), no_attn_mid_block=True, z_channels=8, num_embeddings=16,
                              quantized_embed_dim=4, norm_groups=4, lr=1e-3, gan=0.1, gan_start=2, disc_channels=4,
                              warm_up=1, ema=0.9, restart_every=2, crops=0.5),
        "text": STEPS | dict(width=32, layers=2, heads=2, text_vocab=300, max_seq_len=160),
        "stage1": STEPS | dict(noise=0.5),
        "stage2": STEPS,
        "stage3": STEPS | dict(long_side=64, k=4),
        "joint": STEPS}


@pytest.fixture(autouse=True)
def preset(monkeypatch):
    """`--preset tiny`."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def run(*arguments) -> None:
    """`python train.py ...` with the preset tiny."""
    train.main([str(argument) for argument in (*arguments, "--preset", "tiny")])


def refused(capsys, *arguments, program=None) -> str:
    """The line that a command leaves with, after checking that it is one and that the exit code is 2."""
    with pytest.raises(SystemExit) as stop:
        program([str(argument) for argument in arguments]) if program else run(*arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "not foreseen" not in message, message
    return message.strip().splitlines()[-1]


def make_folder(path: Path, size=(40, 40), n: int = 8) -> Path:
    """A folder of n drawings with captions in two languages, two of them held out, and of recipes."""
    path.mkdir(parents=True)
    rng, records = np.random.default_rng(n), []
    for i in range(n):
        image = Image.new("RGB", size, tuple(int(c) for c in rng.integers(0, 256, 3)))
        ImageDraw.Draw(image).ellipse((4, 4, 24, 24), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
        image.save(path / f"{i}.png")
        split = "train" if i < n - 2 else "unseen"
        records.append({"file_name": f"{i}.png", "text": [f"ball {i}", f"球 {i}"], "split": split})
    write_lines(path / "metadata.jsonl", records)
    write_lines(path / "recipes.jsonl", [{"title": f"make {i}", "steps": [f"1. {i}", "2. more"],
                                          "images": [f"{i}.png", f"{i + 1}.png"]} for i in range(n - 1)])
    return path


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """See make_folder."""
    return make_folder(tmp_path / "data")


MADE = {}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The --out of all stages in a row, once for all test files; the folder `data` in it is what they trained on."""
    if not MADE:
        out = MADE["out"] = tmp_path_factory.mktemp("runs")
        make_folder(make_folder(out / "data") / "pairs", (80, 40))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRESETS, "tiny", TINY)
            run("all", "--data", out / "data", "--out", out)
    return MADE["out"]


def arguments_of(runs: Path, stage: str) -> list:
    """The command of a stage of `runs`, without --out."""
    data = ["--data", *([runs / "data" / "pairs"] if stage == "stage2" else []), runs / "data"]
    more = {"stage1": ["--vqgan", runs / "vqgan", "--language", runs / "text"], "stage2": ["--init", runs / "stage1"],
            "stage3": ["--init", runs / "stage2"], "joint": ["--init", runs / "stage1"]}
    return [stage, *data, *more.get(stage, [])]


def weights(directory: Path) -> dict[str, bytes]:
    """All weights and tokenizers in a folder."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*"))
            if p.suffix in (".safetensors", ".model") and "tokens" not in str(p.relative_to(directory))}


def lines(directory: Path) -> list[dict]:
    """metrics.jsonl, without what depends on the clock."""
    rows = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ----------------------------------------------------------------------------- the whole way

def test_one_command_goes_from_nothing_through_every_stage_of_a_preset(runs):
    for stage in TINY:
        found = lines(runs / stage)
        assert [line["step"] for line in found] == [0, 1, 2, 3]
        assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in found)
    assert {"psnr", "usage", "generator", "psnr_train", "psnr_held_out"} <= lines(runs / "vqgan")[-1].keys()
    assert all("held_out_loss" in lines(runs / stage)[-1] for stage in ("stage1", "stage2"))
    pipeline = generate.Pipeline.from_pretrained(runs / "stage1")
    assert pipeline.text_to_image(["ball 1"])[0].size == (32, 32)


def test_the_language_side_is_the_same_to_the_bit_after_stages_i_to_iii(runs):
    language = MARS.from_pretrained(runs / "text")
    before, tokens = language.state_dict(), torch.arange(20)[None]
    for stage in ("stage1", "stage2", "stage3"):
        model = MARS.from_pretrained(runs / stage)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in after if not is_visual(name))
        assert torch.equal(model(tokens)[..., :language.vocabulary.text], language(tokens))


def test_checkpoints_hold_what_trains_and_nothing_of_the_frozen_language(runs):
    state = torch.load(runs / "stage1" / "checkpoint-000004.pt", weights_only=True)
    trained = {name for name in MARS.from_pretrained(runs / "stage1").state_dict() if is_visual(name)}
    assert set(state["model"]) == trained and set(state["optimizer"]["state"]) == trained


def test_the_first_loss_is_said_to_be_near_the_uniform_one(runs, tmp_path, capsys):
    run(*arguments_of(runs, "text"), "--out", tmp_path / "out")
    said = capsys.readouterr().out
    first, ln_v = map(float, re.search(r"first loss ([0-9.]+); ln V = ln [0-9]+ = ([0-9.]+)", said).groups())
    assert ln_v == pytest.approx(math.log(MARS.from_pretrained(tmp_path / "out").vocabulary.size), abs=1e-3)
    assert abs(first - ln_v) < 0.7                                     # random rows of variance 1


def test_learning_rate_rises_for_one_per_cent_and_falls_along_a_cosine_to_a_tenth():
    config = TrainConfig(steps=1000, lr=1.0)
    assert learning_rate(0, config) == pytest.approx(0.1) and learning_rate(9, config) == 1.0
    assert learning_rate(505, config) == pytest.approx(0.55, abs=1e-3)
    assert learning_rate(999, config) == pytest.approx(0.1, abs=1e-3)


def test_the_optimizer_holds_what_trains_and_nothing_else(mars):
    optimizer = train.make_optimizer(mars, TrainConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in mars.named_parameters() if is_visual(name)}
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    decayed, plain = (group["params"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {p.ndim for p in decayed} == {2} and {p.ndim for p in plain} == {1}
    vqgan = train.VQGAN(train.VQGANConfig(hidden_channels=32, channel_mult=(1,), num_embeddings=16))
    plain = train.make_optimizer(vqgan, TrainConfig()).param_groups[1]["params"]
    assert any(p is vqgan.quantize.embedding.weight for p in plain)            # no decay on the codebook


def test_bf16_trains_float32_weights_and_draws_samples_from_a_frozen_side_in_bfloat16(runs, tmp_path):
    run(*arguments_of(runs, "text"), "--out", tmp_path / "text", "--save-bf16")
    arguments = arguments_of(runs, "stage1")[:-1] + [tmp_path / "text"]
    for precision in ("fp32", "bf16"):
        run(*arguments, "--out", tmp_path / precision, "--precision", precision)
    a, b = ([row["loss"] for row in lines(tmp_path / name)] for name in ("fp32", "bf16"))
    assert a == pytest.approx(b, rel=0.02) and a != b
    state = torch.load(tmp_path / "bf16" / "checkpoint-000004.pt", weights_only=True)
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    assert (tmp_path / "bf16" / "samples" / "000004.png").is_file()


# ----------------------------------------------------------------------------- samples

def test_sample_grids_show_originals_above_images_and_name_their_prompts(runs):
    grid = Image.open(runs / "stage1" / "samples" / "000004.png")
    prompts = (runs / "stage1" / "samples" / "000004.txt").read_text(encoding="utf-8").splitlines()
    assert grid.size == (8 * 34 - 2, 4 * 34 - 2) and len(prompts) == 16
    tokens = EncodedImages(runs / "stage1" / "tokens" / "0")
    assert set(prompts) <= {text for i in range(6) for text in tokens.captions(i)}         # none of a held-out image
    pipeline = generate.Pipeline.from_pretrained(runs / "stage1")
    number = int(prompts[0].split()[1])
    original = generate.decode_each(pipeline.vqgan, torch.from_numpy(tokens[number].astype(np.int64))[None])[0]
    assert grid.crop((0, 0, 32, 32)).tobytes() == original.tobytes()
    assert grid.crop((0, 34, 32, 66)).tobytes() == pipeline.text_to_image(prompts, seeds=range(16))[0].tobytes()


def test_prompts_of_a_file_are_drawn_instead(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\n\n红球\n", encoding="utf-8")
    run(*arguments_of(runs, "stage1"), "--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt")
    assert Image.open(tmp_path / "out" / "samples" / "000004.png").size == (2 * 34 - 2, 32)
    assert (tmp_path / "out" / "samples" / "000004.txt").read_text(encoding="utf-8") == "a red ball\n红球\n"


def test_images_of_a_held_out_split_are_never_trained_on(runs, tmp_path, monkeypatch):
    drawn, draw = set(), train.Pool.draw

    def note(pool, rng):
        images, i = draw(pool, rng)
        drawn.add(images.name(i))
        return images, i
    monkeypatch.setattr(train.Pool, "draw", note)
    run(*arguments_of(runs, "stage1"), "--out", tmp_path / "out", "--batch", 32, "--caption-drop", 0)
    assert drawn == {f"{i}.png" for i in range(6)}


def test_an_image_is_drawn_as_often_as_its_weight_says_and_a_folder_as_often_as_another(runs):
    encoded = [EncodedImages(runs / "stage2" / "tokens" / str(j)) for j in range(2)]
    encoded[0].records[0]["facts"]["weight"] = 5.0
    stage, tokenizer = train.Stage2(data=(runs / "data",)), generate.load_tokenizer(runs / "text")
    pool, rng = train.Pool(stage, Distributed(), encoded, tokenizer, 160, 32), random.Random(0)
    drawn = [pool.draw(rng) for _ in range(4000)]
    of_first = [i for images, i in drawn if images is encoded[0]]
    assert len(of_first) == pytest.approx(2000, abs=150) and of_first.count(0) == pytest.approx(1000, abs=120)


# ----------------------------------------------------------------------------- a run goes on where it ended

@pytest.mark.parametrize("stage", TINY)
def test_a_resumed_run_ends_in_the_same_bytes(runs, tmp_path, stage):
    parts = tmp_path / stage
    shutil.copytree(runs / stage, parts)                       # as if killed after the checkpoint of step 2
    for path in [*parts.rglob("model.safetensors"), parts / "checkpoint-000004.pt"]:
        path.unlink()
    (parts / "checkpoint-000003.pt").write_bytes(b"half a file")
    (parts / ".tmp-model-x.safetensors").write_bytes(b"half a file, too")
    run(*arguments_of(runs, stage), "--out", parts, "--resume")
    assert weights(parts) == weights(runs / stage)
    assert lines(parts) == lines(runs / stage)


def test_all_stages_go_on_with_the_one_that_was_killed_until_the_last_asked_for(runs, tmp_path):
    parts = tmp_path / "runs"
    shutil.copytree(runs, parts)
    shutil.rmtree(parts / "stage3")
    for path in (parts / "joint").iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    command = ["all", "--data", parts / "data", "--out", parts, "--resume"]
    run(*command, "--until", "stage2")
    assert not (parts / "stage3").exists()
    run(*command)
    assert weights(parts) == weights(runs)


def test_resume_where_nothing_is_yet_starts_from_step_0_and_says_so(runs, tmp_path, capsys):
    run(*arguments_of(runs, "text"), "--out", tmp_path / "out", "--resume")
    assert "starts from step 0" in capsys.readouterr().out
    assert weights(tmp_path / "out") == weights(runs / "text")
    run(*arguments_of(runs, "text"), "--out", tmp_path / "out", "--resume")
    assert "goes on from step 4" in capsys.readouterr().out


def test_a_finished_run_can_be_lengthened_and_a_running_one_cannot(runs, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(runs / "text", out)
    run(*arguments_of(runs, "text"), "--out", out, "--resume", "--steps", 6)
    assert [row["step"] for row in lines(out)] == list(range(6))
    assert torch.load(out / "checkpoint-000006.pt", weights_only=True)["step"] == 6
    (out / "checkpoint-000006.pt").unlink()
    message = refused(capsys, *arguments_of(runs, "text"), "--out", out, "--resume", "--steps", 8)
    assert "this run has steps = 6, but now steps is 8" in message


@pytest.mark.parametrize("stage, flags, name", [
    ("text", ["--seed", 1], "seed = 0"), ("text", ["--batch", 8], "batch = 4"), ("text", ["--lr", 1e-4], "lr = 0.001"),
    ("text", ["--width", 64], "width = 32"), ("text", ["--steps", 3], "steps = 4"),
    ("text", ["--text-vocab", 320], "text_vocab = 300"), ("stage1", ["--precision", "bf16"], "precision = fp32"),
    ("stage1", ["--caption-drop", 0.2], "caption_drop = 0.1"), ("stage3", ["--k", 2], "k = 4")])
def test_a_run_goes_on_with_its_own_settings_alone(runs, tmp_path, capsys, stage, flags, name):
    shutil.copytree(runs / stage, tmp_path / "out")
    message = refused(capsys, *arguments_of(runs, stage), "--out", tmp_path / "out", "--resume", *flags)
    assert f"out: this run has {name}, but now" in message and weights(tmp_path / "out") == weights(runs / stage)


@pytest.mark.parametrize("change", ["caption", "image", "line more", "tokenizer", "language", "vqgan", "init"])
def test_a_run_goes_on_with_its_own_data_and_inputs_alone(runs, tmp_path, capsys, change):
    data, stage, inputs = tmp_path / "data", "stage1", {"vqgan": runs / "vqgan", "language": runs / "text"}
    shutil.copytree(runs / "data", data)
    manifest = (data / "metadata.jsonl").read_text(encoding="utf-8")
    if change == "caption":
        (data / "metadata.jsonl").write_text(manifest.replace("ball 3", "bell 3"), encoding="utf-8")
    elif change == "image":
        shutil.copy(data / "1.png", data / "0.png")
    elif change == "line more":
        (data / "metadata.jsonl").write_text(manifest + manifest.splitlines()[0], encoding="utf-8")
    elif change == "init":
        stage, inputs = "stage3", {"init": runs / "joint"}
    else:
        name = "vqgan" if change == "vqgan" else "language"
        other = inputs[name] = shutil.copytree(inputs[name], tmp_path / "other")
        if change == "tokenizer":
            generate.TextTokenizer.train(["other words"], 9).save_pretrained(other)
        else:
            model = (train.VQGAN if change == "vqgan" else MARS).from_pretrained(other)
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1
            model.save_pretrained(other)
    shutil.copytree(runs / stage, tmp_path / "out")
    flags = [part for name, path in inputs.items() for part in (f"--{name}", path)]
    message = refused(capsys, stage, "--data", data, *flags, "--out", tmp_path / "out", "--resume")
    named = {"tokenizer": "text_tokenizer", "language": "language_content", "vqgan": "vqgan_content",
             "init": "init_content"}.get(change, "data_content")
    assert f"out: this run has {named} = " in message and "expected the same to go on" in message


def test_a_changed_image_of_the_image_tokenizer_or_text_of_the_language_model_is_noticed_too(runs, tmp_path, capsys):
    data = shutil.copytree(runs / "data", tmp_path / "data")
    Image.new("RGB", (40, 40), "red").save(data / "0.png")
    manifest = (data / "metadata.jsonl").read_text(encoding="utf-8")
    (data / "metadata.jsonl").write_text(manifest.replace("ball 3", "bell 3"), encoding="utf-8")
    for stage in ("vqgan", "text"):
        shutil.copytree(runs / stage, tmp_path / stage)
        arguments = [stage, "--data", data, "--out", tmp_path / stage, "--resume"]
        assert "this run has data_content" in refused(capsys, *arguments)
    (data / "metadata.jsonl").write_text(manifest, encoding="utf-8")
    message = refused(capsys, "vqgan", "--data", data, "--out", tmp_path / "vqgan", "--resume")
    assert "this run has image_content" in message


def test_an_out_that_holds_anything_else_or_an_input_is_refused(runs, tmp_path, capsys):
    text = arguments_of(runs, "text")
    out = shutil.copytree(runs / "text", tmp_path / "out")
    assert "holds a run already; pass --resume" in refused(capsys, *text, "--out", out)
    vqgan = [*arguments_of(runs, "vqgan"), "--out", out, "--resume"]
    assert "this run has stage = textstage, but now stage is vqganstage" in refused(capsys, *vqgan)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for more in ([], ["--resume"]):
        message = refused(capsys, *text, "--out", tmp_path / "mine", *more)
        assert "mine: holds files, but no run of train.py" in message
    data = make_folder(tmp_path / "data")
    assert f"holds {data}, an input" in refused(capsys, "text", "--data", data, "--out", data)
    assert f"holds {data}, an input" in refused(capsys, "text", "--data", data, "--out", data.parent)
    assert [p.name for p in (tmp_path / "mine").iterdir() if not p.name.startswith(".")] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, *text, "--out", tmp_path / "file")
    with lock(tmp_path / "busy"):
        assert "another run is at work here" in refused(capsys, *text, "--out", tmp_path / "busy")


@pytest.mark.parametrize("name, content, expected", [
    ("run.json", "{}", "run.json: not what train.py writes"),
    ("run.json", '{"stage": "textstage", "steps": null}', "run.json: not what train.py writes"),
    ("run.json", "[]", "run.json: expected a JSON object"),
    ("metrics.jsonl", '{"a": 1}\n', 'metrics.jsonl: expected a line a step, such as {"step": 0'),
    ("metrics.jsonl", '{"step": "x"}\n', 'metrics.jsonl: expected a line a step, such as {"step": 0'),
    ("metrics.jsonl", None, "metrics.jsonl: not a regular file"),
    ("checkpoint", {"step": "x"}, "its checkpoint is of step 'x', expected one of 1 to 4"),
    ("checkpoint", {"step": 99}, "its checkpoint is of step 99, expected one of 1 to 4"),
    ("checkpoint", {"run": {"stage": "joint", "steps": 4}}, "this run has stage = joint, but now stage is textstage"),
    ("checkpoint", {"model": [1]}, "its checkpoint is not one of train.py"),
    ("checkpoint", {"optimizer": {}}, "its checkpoint is not one of train.py"),
    ("checkpoint", {"moments": torch.zeros(3)}, "is (3,), expected (")])
def test_what_lies_in_out_is_checked_before_a_run_goes_on(runs, tmp_path, capsys, name, content, expected):
    out = shutil.copytree(runs / "text", tmp_path / "out")
    if name == "checkpoint":
        (out / "checkpoint-000002.pt").unlink()
        state = torch.load(out / "checkpoint-000004.pt", weights_only=True)
        if "moments" in content:
            next(iter(state["optimizer"]["state"].values()))["exp_avg"] = content["moments"]
        torch.save(state | content, out / "checkpoint-000004.pt")
    elif content is None:
        (out / name).unlink()
        os.mkfifo(out / name)
    else:
        (out / name).write_text(content)
    assert expected in refused(capsys, *arguments_of(runs, "text"), "--out", out, "--resume")


def test_metrics_are_not_written_through_a_link(runs, tmp_path):
    out = shutil.copytree(runs / "text", tmp_path / "out")
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    run(*arguments_of(runs, "text"), "--out", out, "--resume", "--steps", 5)
    assert not (tmp_path / "elsewhere").exists() and [row["step"] for row in lines(out)] == [4]


@pytest.mark.parametrize("wrong", [["--data", "nowhere"], ["--text-seq-len", 999], ["--width", 35, "--heads", 5]])
def test_a_run_that_is_refused_before_its_first_step_leaves_its_folder_free(runs, tmp_path, capsys, wrong):
    refused(capsys, *arguments_of(runs, "text"), "--out", tmp_path / "out", *wrong)
    run(*arguments_of(runs, "text"), "--out", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(runs / "text")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_save_and_leave(runs, tmp_path, capsys, monkeypatch, number):
    out, backward = tmp_path / "out", torch.Tensor.backward
    calls = []

    def interrupted(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return backward(*arguments, **more)
    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(*arguments_of(runs, "text"), "--out", out)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err.endswith("\nstopped after step 3 and saved; --resume goes on\n")
    run(*arguments_of(runs, "text"), "--out", out, "--resume")
    assert weights(out) == weights(runs / "text")


def test_a_full_disk_leaves_the_last_checkpoint_whole(runs, tmp_path, capsys, monkeypatch):
    save = torch.save

    def full(state, file):
        if state["step"] == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)
    monkeypatch.setattr(checkpoint.torch, "save", full)
    message = refused(capsys, *arguments_of(runs, "text"), "--out", tmp_path / "out")
    assert "checkpoint-000004.pt: cannot be written (No space left on device)" in message
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-000002.pt"]


def test_a_reader_of_the_output_that_goes_away_does_not_end_a_run(runs, tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_train as t\n" \
              "t.PRESETS['tiny'] = t.TINY; t.run(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments_of(runs, "text")), "--out",
                                str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert weights(tmp_path / "out") == weights(runs / "text")


def test_a_stream_without_a_reader_swallows_what_is_written():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        stream = Output(file)
        for _ in range(3):
            print("nobody reads this", file=stream, flush=True)
        assert stream.fileno() == writer


# ----------------------------------------------------------------------------- one's own images

def photographs(path: Path) -> list[str]:
    """Eight images unlike in size, mode, format and orientation, each with a caption of its own, which is returned."""
    path.mkdir()
    words = ["a sunset", "the sea", "a forest", "snow", "一朵花", "a street at night", "sand", "a blue door"]
    kinds = [("RGB", "jpg", (120, 80)), ("RGBA", "png", (70, 90)), ("L", "png", (64, 64)), ("P", "gif", (200, 90)),
             ("RGB", "webp", (64, 200)), ("RGB", "bmp", (81, 67)), ("LA", "png", (90, 90)), ("RGB", "jpg", (100, 140))]
    rng = np.random.default_rng(0)
    for i, (mode, suffix, size) in enumerate(kinds):
        image = Image.new("RGB", size, tuple(int(c) for c in rng.integers(0, 256, 3)))
        for _ in range(4):
            x, y = (int(rng.integers(0, n)) for n in size)
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            ImageDraw.Draw(image).ellipse((x - 25, y - 25, x + 25, y + 25), fill=colour)
        exif = Image.Exif()
        if i == 7:
            exif[0x0112] = 8                                                           # it lies on its side
        image.convert(mode).save(path / f"{i}.{suffix}", **({"exif": exif} if suffix == "jpg" else {}))
        (path / f"{i}.txt").write_text(words[i], encoding="utf-8")
    return words


def test_eight_photographs_of_all_kinds_are_learned_by_heart(tmp_path):
    words, photos = photographs(tmp_path / "photos"), tmp_path / "photos"
    common = ["--data", photos, "--batch", 8, "--sample-every", 1000, "--save-every", 1000]
    run("vqgan", *common, "--out", tmp_path / "vqgan", "--steps", 20)
    run("text", *common, "--out", tmp_path / "text", "--steps", 60, "--lr", 1e-2, "--width", 64)
    run("stage1", *common, "--out", tmp_path / "mars", "--steps", 300, "--lr", 5e-3, "--captioning-ratio", 0.4,
        "--vqgan", tmp_path / "vqgan", "--language", tmp_path / "text")
    assert lines(tmp_path / "vqgan")[-1]["psnr"] > lines(tmp_path / "vqgan")[0]["psnr"] + 1
    pipeline, dataset = generate.Pipeline.from_pretrained(tmp_path / "mars"), train.open_dataset(photos)
    images = [dataset.image(i) for i in range(8)]
    tokens = encode_each(pipeline.vqgan, [to_pixels(resize_and_crop(image, 32, 32)) for image in images])
    assert len({t.numpy().tobytes() for t in tokens}) == 8
    drawn = []
    pipeline.text_to_image(words, GREEDY, on_tokens=drawn.append)
    assert (drawn[-1].view(8, 4, 4) == torch.stack(tokens)).float().mean() > 0.9
    assert sum(a == b for a, b in zip(pipeline.caption_images(images), words)) >= 7


@pytest.mark.parametrize("captions", [["a cat"], ["红苹果", "绿色的猫", "一只狗"], ["x", "y", "z"] * 3])
def test_a_language_model_learns_from_few_captions_of_any_script(tmp_path, captions):
    path = make_folder(tmp_path / "data", n=len(captions) + 2)
    write_lines(path / "metadata.jsonl", [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)])
    run("text", "--data", path, "--out", tmp_path / "out")
    tokenizer = generate.load_tokenizer(tmp_path / "out")
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in captions)


def test_images_without_any_caption_train_unconditionally_but_teach_no_language(runs, tmp_path, capsys):
    path = make_folder(tmp_path / "data")
    write_lines(path / "metadata.jsonl", [{"file_name": f"{i}.png", "text": ""} for i in range(8)])
    message = refused(capsys, "text", "--data", path, "--out", tmp_path / "text")
    assert message == f"train.py: {path}: no text in it; expected captions, or text.txt with a document a line"
    run("stage1", "--data", path, *arguments_of(runs, "stage1")[3:], "--out", tmp_path / "out")
    assert "8 of 8 images without a caption" in capsys.readouterr().out
    assert not (tmp_path / "out" / "samples").exists()


def test_text_txt_comes_before_captions_and_needs_no_images(tmp_path):
    (tmp_path / "text.txt").write_text("one document\n\nanother\n", encoding="utf-8")
    run("text", "--data", tmp_path, "--out", tmp_path / "out")
    assert lines(tmp_path / "out")


# ----------------------------------------------------------------------------- bad input: one line, exit code 2

def test_a_caption_that_is_too_long_is_named_before_training_and_left_out_on_demand(runs, folder, tmp_path, capsys):
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    records[2]["text"] = ["long " * 100, "ball 2"]
    records[4]["text"] = "longer " * 100
    write_lines(folder / "metadata.jsonl", records)
    arguments = ["stage1", "--data", folder, *arguments_of(runs, "stage1")[3:]]
    message = refused(capsys, *arguments, "--out", tmp_path / "refused")
    assert "2.png: a caption of " in message and "expected at most 128: 'long long" in message
    assert "(and 1 more); --skip-bad leaves out" in message
    run(*arguments, "--out", tmp_path / "out", "--skip-bad")
    assert f"2 left out; {tmp_path / 'out' / 'left-out.json'} says why" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "left-out.json").read_text(encoding="utf-8"))
    assert [name for name, _ in found] == ["2.png", "4.png"]


@pytest.mark.parametrize("stage", ["vqgan", "stage1"])
def test_a_broken_image_is_named_and_left_out_on_demand(runs, folder, tmp_path, capsys, stage):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    arguments = [stage, "--data", folder, *arguments_of(runs, stage)[3:]]
    message = refused(capsys, *arguments, "--batch", 16, "--out", tmp_path / "refused")
    assert "3.png: not a whole image" in message
    run(*arguments, "--out", tmp_path / "out", "--skip-bad")
    assert "left out" in capsys.readouterr().out
    listed = [p for p in (tmp_path / "out").rglob("*.json") if "3.png" in p.read_text(encoding="utf-8")]
    assert listed


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(runs, tmp_path, capsys, monkeypatch):
    calls, loss = [], MARS.loss

    def broken(*arguments):
        calls.append(1)
        return loss(*arguments) * (math.nan if len(calls) == 4 else 1)
    monkeypatch.setattr(MARS, "loss", broken)
    message = refused(capsys, *arguments_of(runs, "text"), "--out", tmp_path, "--batch", 12)
    assert "the loss is nan at step 3; the last checkpoint is good; in the batch: 'ball " in message
    assert len((tmp_path / "bad-batch.txt").read_text(encoding="utf-8").splitlines()) == 12
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002.pt"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.tensor(math.inf))
    message = refused(capsys, *arguments_of(runs, "text"), "--out", tmp_path)
    assert "the norm of the gradient is inf at step 0; the last checkpoint is good; in the batch: '" in message


def test_what_would_fail_at_the_first_sample_is_refused_before_training(runs, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("word " * 200, encoding="utf-8")
    (tmp_path / "none.txt").write_text("\n\n", encoding="utf-8")
    stage1, expected = arguments_of(runs, "stage1"), {"long.txt": "the longest prompt has 10", "lost.txt": "not found",
                                                      "none.txt": "the longest prompt has 0 tokens, expected 1 to 128"}
    for name, words in expected.items():
        message = refused(capsys, *stage1, "--out", tmp_path / "out", "--prompts", tmp_path / name)
        assert f"{name}: {words}" in message
    for stage in ("stage2", "joint"):
        message = refused(capsys, *arguments_of(runs, stage)[:-1], runs / "stage3", "--out", tmp_path / "out")
        assert "stage3: weights of stage3, expected those of stage1 or stage2" in message
    for long_side in (2, 5000):
        message = refused(capsys, *arguments_of(runs, "stage3"), "--out", tmp_path / "out", "--long-side", long_side)
        assert f"long_side is {long_side}, expected at least 32, and images of " in message
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize("make, expected", [
    (os.mkfifo, "not a regular file, expected a file"), (os.mkdir, "a folder, expected a file"),
    (lambda path: path.symlink_to(__file__), "it leaves the folder")])
def test_text_txt_that_is_no_regular_file_of_the_folder_is_refused(folder, tmp_path, capsys, make, expected):
    make(folder / "text.txt")
    message = refused(capsys, "text", "--data", folder, "--out", tmp_path / "out")
    assert "'text.txt' cannot be read (" in message and expected in message


def test_names_are_short_captions_and_of_images_made_of_others_only_what_brings_new_words():
    class Images(list):
        captions, facts = (lambda self, i: self[i][0]), (lambda self, i: self[i][1])
    pairs = Images([(["cat left of dog", "cat left of dog 64x128"], {"cells": ["cat", "dog"]}),
                    (["dog left of cat"], {"cells": ["dog", "cat"]}), (["狗在猫的左边"], {"cells": ["dog", "cat"]})])
    singles = Images([(["cat", "A cat", "猫"], {}), (["dog", "狗"], {})])
    pool = Pool.__new__(Pool)
    pool.folders = [(pairs, range(3), None), (singles, range(2), None)]
    assert pool.names() == sorted(["cat", "猫", "dog", "狗", "cat left of dog", "狗在猫的左边"])


def test_flags_go_before_the_preset_and_help_shows_what_the_preset_has(capsys):
    assert train.read_flags(["stage1"])[1].save_bf16 and train.read_flags(["stage1"])[1].steps == 33_000
    assert not train.read_flags(["stage1", "--no-save-bf16"])[1].save_bf16
    assert not train.read_flags(["vqgan", "--no-local-encoder", "--no-no-attn-mid-block"])[1].no_attn_mid_block
    with pytest.raises(SystemExit):
        train.read_flags(["stage1", "--help"])
    assert "(default: 33000)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stage, flag", [
    ("vqgan", "--k=4"), ("text", "--init=weights"), ("stage2", "--vqgan=x"), ("stage3", "--captioning-ratio=0.5"),
    ("stage3", "--prompts=x"), ("joint", "--corruption=0.5"), ("all", "--vqgan=x"), ("text", "--colour")])
def test_a_flag_that_a_stage_does_not_use_is_unknown_to_it(capsys, stage, flag):
    assert f"unrecognized arguments: {flag}" in refused(capsys, stage, flag, "--out", "nowhere")


def test_settings_out_of_range_and_that_do_not_fit_are_refused(runs, tmp_path, capsys):
    text = [*arguments_of(runs, "text"), "--out", tmp_path / "out"]
    assert "--steps is 0, expected 1 to 1000000000" in refused(capsys, *text, "--steps", 0)
    assert "--lr is nan, expected a finite number" in refused(capsys, *text, "--lr", "nan")
    assert "--ema is 1.0, expected 0 to 0.9999" in refused(capsys, *arguments_of(runs, "vqgan"), "--ema", 1)
    assert "--shard spreads a model over processes" in refused(capsys, *text, "--shard")
    for device in ("moon", "meta", "mps", ""):
        assert f"device {device!r}" in refused(capsys, *text, "--device", device)
    assert "--steps is 10000000000, expected 1 to" in refused(capsys, *text, "--steps", 10**10)
    assert "preset 'qwen' has no stage text, expected one of vqgan" in refused(capsys, "text", "--preset=qwen",
                                                                              program=train.main)
    message = refused(capsys, *arguments_of(runs, "vqgan"), "--out", tmp_path / "v", "--resolution", 16)
    assert "resolution is 16, expected at least 24" in message
    assert "nowhere" in refused(capsys, "stage1", "--data", runs / "data", "--vqgan", tmp_path / "nowhere",
                                "--out", tmp_path / "s")


def test_bad_folders_are_refused_by_name(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = refused(capsys, "vqgan", "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert "empty: no image in it; expected metadata.jsonl" in message
    message = refused(capsys, "vqgan", "--data", tmp_path / "nowhere", "--out", tmp_path / "out2")
    assert "nowhere: no such folder" in message
    message = refused(capsys, "vqgan", "--data", runs / "stage1" / "tokens" / "0", "--out", tmp_path / "out3")
    assert "holds image tokens, not images; expected a folder of images here" in message
    path = make_folder(tmp_path / "held")
    write_lines(path / "metadata.jsonl", [{"file_name": "0.png", "text": "x", "split": "test"}])
    for stage in ("vqgan", "stage1"):
        arguments = [stage, "--data", path, *arguments_of(runs, stage)[3:]]
        message = refused(capsys, *arguments, "--out", tmp_path / f"out-{stage}")
        assert "no image to train on is left" in message
