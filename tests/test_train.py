"""Claims about the loop: every stage runs, resumes, and refuses bad input with one line (Sec. 3.4, 4.1)."""
import dataclasses
import json
import math
import shutil
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import generate
import plot
import stages
import train
import world
from data import Codes
from generate import Painter, Sampling
from mars import MARS, count_parameters, is_visual, training_memory
from train import PRESETS, Recipe, learning_rate


def small_preset():
    """The nano preset with less of everything, but the tiny preset's pictures."""
    nano = PRESETS["nano"]
    return dataclasses.replace(
        nano, language=dataclasses.replace(nano.language, width=32, heads=2, kv_heads=2, ffn_width=64, layers=2),
        codec=dataclasses.replace(nano.codec, resolution=96), frames=((6, 6, 16),), pictures=48, row=64, documents=1000,
        recipes={"vqgan": Recipe(6, 8, 1e-3), "text": Recipe(6, 4, 1e-3), "stage1": Recipe(6, 8, 1e-3)})


@pytest.fixture(autouse=True)
def preset_test(monkeypatch):
    """`--preset test`."""
    monkeypatch.setitem(PRESETS, "test", small_preset())


def run(*arguments):
    train.main([str(argument) for argument in arguments])


def weights(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.rglob("*")) if p.suffix in (".safetensors", ".model")}


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------- the whole way

def test_one_command_goes_from_nothing_to_pictures_and_leaves_the_language_as_it_was(tmp_path, capsys):
    run("all", "--preset", "test", "--out", tmp_path, "--sample-every", 3, "--save-every", 3)
    for stage in ("vqgan", "text", "stage1"):
        found = lines(tmp_path / stage)
        assert [line["step"] for line in found] == list(range(6)) and all(math.isfinite(line["loss"]) for line in found)
    assert "ln V = ln" in capsys.readouterr().out
    assert Image.open(tmp_path / "vqgan" / "samples" / "000006.png").size == (8 * 98 - 2, 2 * 98 - 2)
    assert (tmp_path / "stage1" / "samples" / "000003.png").is_file()
    language, mars = MARS.from_pretrained(tmp_path / "text"), MARS.from_pretrained(tmp_path / "stage1")
    before, after = language.state_dict(), mars.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after if not is_visual(name))
    tokens = torch.arange(20)[None]
    assert torch.equal(mars(tokens)[..., :language.vocabulary.text], language(tokens))
    painter = Painter.from_pretrained(tmp_path / "stage1")
    assert painter.paint(["a red circle"], Sampling(), seed=0)[0].size == (96, 96)
    assert isinstance(painter.describe(painter.paint(["a red circle"]))[0], str)

    written = weights(tmp_path)                                  # killed between stages, it goes on where it was
    shutil.rmtree(tmp_path / "stage1")
    for path in (tmp_path / "vqgan").glob("checkpoint-*.pt"):
        path.unlink()
    run("all", "--preset", "test", "--out", tmp_path, "--sample-every", 3, "--save-every", 3, "--resume")
    assert weights(tmp_path) == written


def test_curves_are_the_smoothed_loss_and_all_that_was_measured(tmp_path):
    rows = [{"step": i, "loss": float(i), **({"all": 0.5} if i == 99 else {})} for i in range(100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = plot.curves(plot.read_metrics(tmp_path / "metrics.jsonl"))
    assert found == {"loss": [(49, 24.5), (99, 74.5)], "all": [(99, 0.5)]}
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "lo')
    with pytest.raises(ValueError, match="metrics.jsonl, line 1: not JSON"):
        plot.read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("stage", ["vqgan", "text", "stage1"])
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path, stage):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    before = []
    if stage == "stage1":
        run("vqgan", "--preset", "test", "--out", tmp_path / "vqgan", "--steps", 2)
        run("text", "--preset", "test", "--out", tmp_path / "text", "--steps", 2)
        before = ["--vqgan", tmp_path / "vqgan", "--language", tmp_path / "text"]
    common = [stage, "--preset", "test", "--sample-every", 2, *before]
    run(*common, "--out", whole, "--save-every", 4)
    run(*common, "--out", parts, "--save-every", 4)
    for path in parts.rglob("*.safetensors"):
        path.unlink()                                                    # as if killed after the checkpoint of step 4
    (parts / "checkpoint-000005.pt").write_bytes(b"half a file")
    run(*common, "--out", parts, "--save-every", 4, "--resume")
    assert weights(parts) == weights(whole)
    timeless = lambda rows: [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]
    assert timeless(lines(parts)) == timeless(lines(whole))


def test_codes_without_captions_are_found_and_compete_in_the_last_eighth_of_the_steps(tmp_path, monkeypatch):
    seen, loss = [], MARS.loss

    def note(model, tokens, is_target, chunk=None):
        seen.append((model.margin, model.uncaptioned))
        return loss(model, tokens, is_target, chunk)
    monkeypatch.setattr(MARS, "loss", note)
    monkeypatch.setattr(world, "training_scene", lambda rng, *size: (world.sample_scene(rng, "any", *size), rng.random() < 0.5))
    run("stage1", "--preset", "test", "--vqgan", generate.TINY / "vqgan", "--steps", 16, "--out", tmp_path)
    assert [margin for margin, _ in seen] == [-math.inf] * 14 + [2.0] * 2
    codes, uncaptioned = Codes(tmp_path / "codes"), seen[0][1]
    captioned = [i for i in range(48) if codes.captions(i)]
    with_caption, without = (set(np.concatenate([codes[i].ravel() for i in rows]).tolist())
                             for rows in (captioned, set(range(48)) - set(captioned)))
    assert set(uncaptioned.nonzero()[:, 0].tolist()) == without - with_caption != set()


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    run("text", "--preset", "test", "--out", tmp_path, "--save-every", 1)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-000005.pt", "checkpoint-000006.pt"]


def test_learning_rate_rises_for_one_per_cent_and_falls_along_a_cosine_to_a_tenth():
    recipe = Recipe(steps=1000, batch=1, lr=1.0)
    assert learning_rate(0, recipe) == pytest.approx(0.1) and learning_rate(9, recipe) == 1.0
    assert learning_rate(505, recipe) == pytest.approx(0.55, abs=1e-3)
    assert learning_rate(999, recipe) == pytest.approx(0.1, abs=1e-3)


def test_the_optimizer_holds_what_trains_and_nothing_else(mars):
    optimizer = train.make_optimizer(mars, Recipe(1, 1, 1e-3))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in mars.named_parameters() if is_visual(name)}
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


# ----------------------------------------------------------------------------- one's own pictures

def photographs(path):
    """Eight pictures unlike in size, mode, format and orientation, each with a caption of its own."""
    path.mkdir()
    words = ["a sunset", "the sea", "a forest", "snow", "一朵花", "a street at night", "sand", "a blue door"]
    kinds = [("RGB", "jpg", (120, 80)), ("RGBA", "png", (70, 90)), ("L", "png", (64, 64)), ("P", "gif", (200, 90)),
             ("RGB", "webp", (64, 200)), ("RGB", "bmp", (81, 67)), ("LA", "png", (90, 90)), ("RGB", "jpg", (100, 140))]
    rng, records = np.random.default_rng(0), []
    for i, (mode, suffix, size) in enumerate(kinds):
        image = Image.new("RGB", size, tuple(int(c) for c in rng.integers(0, 256, 3)))
        for _ in range(4):
            x, y = (int(rng.integers(0, n)) for n in size)
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            ImageDraw.Draw(image).ellipse((x - 25, y - 25, x + 25, y + 25), fill=colour)
        exif = Image.Exif()
        if i == 7:
            exif[0x0112] = 8
        image.convert(mode).save(path / f"{i}.{suffix}", **({"exif": exif} if suffix == "jpg" else {}))
        records.append({"file_name": f"{i}.{suffix}", "text": words[i]})
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (path / "metadata.jsonl").write_text(lines + "\n")
    return words


def test_a_folder_of_ones_own_photographs_trains_and_eight_of_them_are_over_fitted(tmp_path):
    words = photographs(tmp_path / "photos")
    common = ["--preset", "test", "--data", tmp_path / "photos", "--sample-every", 1000]
    run("vqgan", *common, "--out", tmp_path / "vqgan", "--steps", 20, "--lr", 3e-5)
    run("text", *common, "--out", tmp_path / "text", "--steps", 60, "--lr", 1e-2)
    run("stage1", *common, "--out", tmp_path / "mars", "--steps", 300, "--lr", 5e-3, "--caption-share", 0.4,
        "--vqgan", tmp_path / "vqgan", "--language", tmp_path / "text")
    codec = lines(tmp_path / "vqgan")
    assert codec[-1]["psnr"] > 35, codec[-1]
    painter = Painter.from_pretrained(tmp_path / "mars")
    source = data.Folder(tmp_path / "photos")
    truth = torch.stack([generate.to_pixels(data.fit(source.image(i), 96, 96)) for i in range(8)])
    codes = painter.vqgan.encode(truth)
    captions = [painter.encode_prompt(text) for text in words]
    drawn = generate.draw_codes(painter.model, captions, 6, 6, Sampling(cfg=1.0, temperature=0.0))
    assert (drawn == codes).float().mean() > 0.9
    assert sum(a == b for a, b in zip(painter.describe([source.image(i) for i in range(8)]), words)) >= 7


# ----------------------------------------------------------------------------- bad input: one line, exit code 2

def refused(program, arguments, capsys):
    """The line that a command leaves with, after checking that it is one and that the exit code is 2."""
    with pytest.raises(SystemExit) as stop:
        program([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_unknown_flags_and_values_out_of_range_are_refused(capsys):
    assert "unrecognized arguments: --colour" in refused(generate.main, ["x", "--colour", "red"], capsys)
    assert "--top-p is 0.0, expected" in refused(generate.main, ["x", "--top-p", "0"], capsys)
    assert "expected a prompt, --caption IMAGE" in refused(generate.main, [], capsys)
    assert "unrecognized arguments: --colour" in refused(train.main, ["text", "--out", "x", "--colour"], capsys)
    assert "--steps is 0, expected at least 1" in refused(train.main, ["text", "--out", "x", "--steps", "0"], capsys)


@pytest.mark.parametrize("stage, flag", [("vqgan", "--ahead=4"), ("text", "--init=weights"), ("stage2", "--vqgan=x"),
                                         ("stage3", "--caption-share=0.5"), ("joint", "--corruption=0.5")])
def test_a_flag_that_a_stage_does_not_use_is_refused_not_ignored(stage, flag, capsys):
    message = refused(train.main, [stage, flag, "--out", "nowhere"], capsys)
    assert flag.split("=")[0] + " is for stage" in message and f"{stage} does not use it" in message


def test_all_stages_in_a_row_refuse_a_stage_that_was_trained_before(capsys):
    assert "--vqgan names an earlier stage" in refused(train.main, ["all", "--vqgan=x", "--out", "nowhere"], capsys)


def test_bad_data_and_bad_folders_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    small = ["--preset", "test", "--out", tmp_path / "new"]
    message = refused(train.main, ["vqgan", *small, "--data", tmp_path / "empty"], capsys)
    assert "empty/metadata.jsonl: no such file" in message
    message = refused(train.main, ["text", "--preset", "test", "--out", tmp_path / "file" / "x"], capsys)
    assert "cannot write there" in message
    message = refused(train.main, ["text", *small, "--resume"], capsys)
    assert "no checkpoint to resume from" in message
    message = refused(train.main, ["text", "--preset", "qwen", "--out", tmp_path / "new"], capsys)
    assert "preset 'qwen' has no recipe for text" in message
    message = refused(generate.main, ["x", "--device", "moon"], capsys)
    assert message.startswith("generate.py: device 'moon': ")
    message = refused(train.main, ["stage1", *small, "--vqgan", tmp_path / "nowhere"], capsys)
    assert "nowhere" in message
    (tmp_path / "new" / "checkpoint-000001.pt").write_bytes(b"")
    assert "holds an earlier run; pass --resume" in refused(train.main, ["text", *small], capsys)
    assert "none.png: no such image" in refused(generate.main, ["--caption", tmp_path / "none.png"], capsys)
    assert "nowhere: not found" in refused(generate.main, ["x", "--weights", tmp_path / "nowhere"], capsys)


def test_a_broken_picture_is_named_while_the_folder_is_encoded(tmp_path, capsys):
    photographs(tmp_path / "photos")
    whole = (tmp_path / "photos" / "5.bmp").read_bytes()
    (tmp_path / "photos" / "5.bmp").write_bytes(whole[:100])
    arguments = ["vqgan", "--preset", "test", "--data", tmp_path / "photos", "--out", tmp_path / "o"]
    message = refused(train.main, arguments, capsys)
    assert "5.bmp: not a whole image file" in message


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path, capsys, monkeypatch):
    backward = stages.TextStage.backward
    def broken(self, step, rng):
        logs, tokens, names = backward(self, step, rng)
        return {"loss": math.nan if step == 3 else logs["loss"]}, tokens, lambda: names() * 3
    monkeypatch.setattr(stages.TextStage, "backward", broken)
    message = refused(train.main, ["text", "--preset", "test", "--out", tmp_path, "--save-every", 2], capsys)
    assert "the loss is nan at step 3; the last good checkpoint is " in message and "checkpoint-000002.pt" in message
    assert "and 8 more, all in" in message and len((tmp_path / "bad-batch.txt").read_text().splitlines()) == 12


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, capsys, monkeypatch):
    save = torch.save
    def full(state, path):
        if state["step"] == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)
    monkeypatch.setattr(torch, "save", full)
    message = refused(train.main, ["text", "--preset", "test", "--out", tmp_path, "--save-every", 2], capsys)
    assert "cannot write the checkpoint of step 4" in message and "the last whole one is" in message
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint-000002.pt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_sigterm_and_ctrl_c_save_and_leave(tmp_path, capsys, monkeypatch, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("text", "--preset", "test", "--out", whole)
    backward = stages.TextStage.backward
    def interrupted(self, step, rng):
        if step == 2:
            os.kill(os.getpid(), number)
        return backward(self, step, rng)
    monkeypatch.setattr(stages.TextStage, "backward", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("text", "--preset", "test", "--out", parts)
    assert stop.value.code == 128 + number
    assert "stopped after step 3 and saved" in capsys.readouterr().err
    monkeypatch.setattr(stages.TextStage, "backward", backward)
    run("text", "--preset", "test", "--out", parts, "--resume")
    assert weights(parts) == weights(whole)


def test_the_forecast_says_what_to_pass_where_ddp_does_not_fit():
    config = train.SIZES["qwen-7b"]
    assert "DDP on 8 GPUs" in stages.check_memory(config, 8, 180 * 10 ** 9, shard=False)
    with pytest.raises(ValueError, match=r"DDP on 8 GPUs of 80 GB takes 1\d\d.\d GB of each; pass --shard, which takes"):
        stages.check_memory(config, 8, 80 * 10 ** 9, shard=False)
    assert "--shard on 8 GPUs" in stages.check_memory(config, 8, 80 * 10 ** 9, shard=True)
    with pytest.raises(ValueError, match="expected at least 2 GPUs with --shard"):
        stages.check_memory(config, 1, 80 * 10 ** 9, shard=True)


def test_the_readmes_memory_table_is_the_forecast():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name, cells in (("qwen2.5-0.5b", "0.49 + 0.35 billion | 6.6 GB"), ("qwen-7b", "7.72 + 6.01 billion | 111.5 GB")):
        frozen, trained = count_parameters(train.SIZES[name])
        ddp, _ = training_memory(frozen, trained, 8)
        assert f"{frozen / 1e9:.2f} + {trained / 1e9:.2f} billion | {ddp / 1e9:.1f} GB" == cells
        assert cells in readme
    assert "takes 15.9 GB of each" in stages.check_memory(train.SIZES["qwen-7b"], 8, 80 * 10 ** 9, shard=True)
