"""Claims about Stages II and III and joint output: sizes, the cascade, recipes (paper Sec. 3.4 and 4.6)."""
import base64
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import generate
import train
from conftest import make_mars
from data import EncodedImages, interlace, size_text
from distributed import Distributed
from mars import MARS, is_visual
from scale import training_memory
from test_train import arguments_of, folder, lines, preset, refused, run, runs, weights, write_lines   # noqa: fixtures
from tokenizer import TextTokenizer

GOLDEN = Path(__file__).parent / "golden"


def examples_of(kind, function, n: int = 200, **settings) -> tuple[train.Stage, list]:
    """A stage that is not trained, and n of its training sequences."""
    stage = function(kind(batch=n, **settings), Distributed())
    return stage, [content for _, content in stage.batch(random.Random(0))]


# ----------------------------------------------------------------------------- Stage I

@pytest.mark.parametrize("golden, precision", [("qwen3", "bf16"), ("qwen2-transformers5", "fp32")])
def test_stage_i_grows_out_of_a_published_folder_as_it_is(runs, tmp_path, golden, precision):
    pytest.importorskip("tiktoken")
    language = shutil.copytree(GOLDEN / golden, tmp_path / "qwen")
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (language / "qwen.tiktoken").write_bytes(ranks)                                    # and 208 control tokens
    arguments = [*arguments_of(runs, "stage1")[:-1], language, "--precision", precision]
    run(*arguments, "--out", tmp_path / "out", "--save-every", 3)
    before, after = MARS.from_pretrained(language).state_dict(), MARS.from_pretrained(tmp_path / "out").state_dict()
    same = torch.bfloat16 if precision == "bf16" else torch.float32
    assert all(torch.equal(tensor.to(same), after[name]) for name, tensor in before.items())
    assert generate.Pipeline.from_pretrained(tmp_path / "out").text_to_image(["球"])[0].size == (32, 32)
    written = weights(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-000004.pt").unlink()
    run(*arguments, "--out", tmp_path / "out", "--resume", "--save-every", 3)
    assert weights(tmp_path / "out") == written


def test_a_text_tokenizer_of_more_tokens_than_the_language_model_has_is_refused(runs, tmp_path, capsys):
    language = shutil.copytree(runs / "text", tmp_path / "text")
    TextTokenizer.train(map(chr, range(0x4e00, 0x4f00))).save_pretrained(language)
    message = refused(capsys, *arguments_of(runs, "stage1")[:-1], language, "--out", tmp_path / "out")
    assert "the text tokenizer has 515 tokens, the language model only 277" in message


def test_stage_i_goes_on_from_the_language_side_of_a_model_that_draws(runs, tmp_path):
    run(*arguments_of(runs, "stage1")[:-1], runs / "stage3", "--out", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(runs / "stage1")


# ----------------------------------------------------------------------------- Stage II

def test_stage_ii_learns_every_size_of_its_folders_and_generates_each(runs, tmp_path, capsys):
    pipeline = generate.Pipeline.from_pretrained(runs / "stage2")
    assert pipeline.sizes == ((32, 32), (32, 64))                                      # data, and data/pairs
    for height, width in pipeline.sizes:
        out = tmp_path / f"{width}.png"
        generate.main(["ball 1", "--weights", str(runs / "stage2"), "-o", str(out), "--size", f"{height}x{width}",
                       "--scale", "1"])
        assert Image.open(out).size == (width, height)
    grid = Image.open(runs / "stage2" / "samples" / "000004.png")
    assert grid.size[0] > 8 * 66 - 34 and grid.size[1] == 4 * 34 - 2                   # some are 64 pixels wide


def test_stage_ii_names_the_size_between_caption_and_image_and_first_of_all_in_captioning(runs, tmp_path):
    stage, sequences = examples_of(train.Stage2, train.stage2, data=(runs / "data", runs / "data" / "pairs"),
                                   init=runs / "stage1", out=tmp_path)
    tokenizer, v = generate.load_tokenizer(runs / "stage1"), stage.module.vocabulary
    sizes = {size: tokenizer.encode(size_text(*size)) for size in ((32, 32), (32, 64))}
    kinds = set()
    for sequence in sequences:
        start = sequence.tokens.index(v.special("<img>"))
        n = sequence.tokens.index(v.special("</img>")) - start - 1
        size = sizes[(32, 32) if n == 16 else (32, 64)]
        assert n in (16, 32) and sequence.tokens[:start][-len(size):] == size
        kinds.add((n, "captioning" if start == len(size) else "text to image"))
        if sequence.tokens[0] == v.special("<uncond>"):
            assert sequence.tokens[1:start] == size
            kinds.add("unconditional")
    assert len(kinds) == 5


def test_both_ratios_are_those_asked_for(runs, tmp_path):
    stage, sequences = examples_of(train.Stage2, train.stage2, 2000, data=(runs / "data",), init=runs / "stage1",
                                   out=tmp_path, captioning_ratio=0.2, caption_drop=0.3)
    v, eos = stage.module.vocabulary, generate.load_tokenizer(runs / "stage1").eos
    dropped = sum(sequence.tokens[0] == v.special("<uncond>") for sequence in sequences)
    captioning = sum(sequence.tokens[-1] == eos for sequence in sequences)
    assert captioning / 2000 == pytest.approx(0.2, abs=0.03) and dropped / 2000 == pytest.approx(0.24, abs=0.03)


def test_weights_saved_in_bfloat16_are_half_as_large_and_generate_in_float32(runs, tmp_path):
    run(*arguments_of(runs, "stage2"), "--out", tmp_path / "half", "--save-bf16")
    half, whole = ((path / "model.safetensors").stat().st_size for path in (tmp_path / "half", runs / "stage2"))
    assert half < 0.7 * whole
    pipeline = generate.Pipeline.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in [*pipeline.model.parameters(), *pipeline.vqgan.parameters()]} == {torch.float32}


def test_stages_go_on_from_the_folders_that_they_wrote(runs, tmp_path):
    for stage in ("stage2", "stage3"):
        first, out = runs / stage, tmp_path / stage
        run(*arguments_of(runs, stage)[:-1], first, "--steps", 1, "--lr", 1e-8, "--out", out)
        before, after = MARS.from_pretrained(first).state_dict(), MARS.from_pretrained(out).state_dict()
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------- Stage III

@pytest.mark.parametrize("corruption", [0.0, 0.25])
def test_the_cascade_reads_caption_size_and_a_corrupted_small_image(runs, tmp_path, corruption):
    stage, sequences = examples_of(train.Stage3, train.stage3, data=(runs / "data",), init=runs / "stage2",
                                   out=tmp_path, corruption=corruption, caption_drop=0.0, k=4, long_side=64)
    v, tokenizer = stage.module.vocabulary, generate.load_tokenizer(runs / "stage2")
    small, large = (EncodedImages(tmp_path / name / "0") for name in ("tokens-small", "tokens-large"))
    size, changed = tokenizer.encode(size_text(64, 64)), 0
    for sequence in sequences:
        start = sequence.tokens.index(v.special("<img>"))
        end = start + 17
        caption = tokenizer.decode(sequence.tokens[:start - len(size)])
        i = int(caption.split()[1])
        assert caption in small.captions(i) and sequence.tokens[start - len(size):start] == size
        low = torch.tensor(sequence.tokens[start + 1:end]) - v.text
        changed += (low != torch.from_numpy(small[i].astype(int)).flatten()).sum().item()
        assert sequence.tokens[end:-1] == [v.text + int(token) for token in interlace(large[i], small[i]).flatten()]
        assert sequence.is_target == [False] * end + [True] * 65
    assert changed / (16 * len(sequences)) == pytest.approx(corruption * 15 / 16, abs=0.03)     # 1 in 16 stays itself


def test_heads_2_to_k_are_asked_at_every_kth_token_the_same_ones_in_a_batch_on_any_number_of_processes(runs, tmp_path):
    stage, _ = examples_of(train.Stage3, train.stage3, 4, data=(runs / "data",), init=runs / "stage2",
                           out=tmp_path, k=4, long_side=64)
    examples = stage.batch(random.Random(0))
    whole = stage.tensors(examples, random.Random(7))[1]
    parts = [stage.tensors(examples[i:i + 1], random.Random(7))[1] for i in range(4)]
    asked = lambda targets: int((targets[..., 1:] != train.IGNORE).sum())
    assert asked(whole) == sum(map(asked, parts)) and 4 * 40 < asked(whole) < 4 * 65
    assert int((whole[..., 0] != train.IGNORE).sum()) == 4 * 65


def test_stage_iii_says_how_near_it_comes_and_what_bicubic_scaling_does(runs, tmp_path):
    last = lines(runs / "stage3")[-1]
    assert 0 < last["psnr"] < 60 and 0 < last["psnr_bicubic"] < 60
    assert Image.open(runs / "stage3" / "samples" / "000004.png").size == (8 * 66 - 2, 3 * 66 - 2)
    generate.main(["--upscale", str(runs / "data" / "1.png"), "--prompt", "ball 1", "--weights", str(runs / "stage3"),
                   "-o", str(tmp_path / "large.png"), "--scale", "1"])
    assert Image.open(tmp_path / "large.png").size == (64, 64)


def test_the_cascade_enlarges_images_of_every_shape_to_the_size_that_it_was_trained_on(runs, tmp_path):
    run("stage3", "--data", runs / "data" / "pairs", runs / "data", "--init", runs / "stage2", "--out",
        tmp_path / "out", "--k", 1, "--long-side", 40)
    wide, square = (EncodedImages(tmp_path / "out" / "tokens-large" / str(j)) for j in range(2))
    assert wide.shapes[0] == [5, 10] and square.shapes[0] == [5, 5]
    pipeline = generate.Pipeline.from_pretrained(tmp_path / "out")
    larger = pipeline.super_resolve([Image.new("RGB", size, "red") for size in ((80, 40), (30, 30))], ["ball 1"] * 2)
    assert [image.size for image in larger] == [(80, 40), (40, 40)]


# ----------------------------------------------------------------------------- Sec. 4.6: text and images

def test_with_the_language_side_frozen_the_text_cannot_change_and_in_this_stage_all_trains(runs):
    before, text = MARS.from_pretrained(runs / "stage1"), torch.arange(20)[None]
    moved = MARS.from_pretrained(runs / "stage1").freeze_language()
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    text_logits = lambda model: model(text)[..., :model.vocabulary.text]
    assert torch.equal(text_logits(moved), text_logits(before))                        # by causality
    after = MARS.from_pretrained(runs / "joint")
    unlike = [name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])]
    assert len(unlike) > 0.9 * len(after.state_dict()) and not all(map(is_visual, unlike))


def test_recipes_become_pages_and_held_out_ones_are_not_trained_on(runs, folder, tmp_path, capsys):
    pages = sorted(path.name for path in (runs / "joint" / "samples" / "000004").glob("*.md"))
    assert pages == ["0.md", "1.md", "2.md", "3.md"]
    assert (runs / "joint" / "samples" / "000004" / "0.md").read_text(encoding="utf-8").startswith("# make ")
    recipes = [json.loads(line) for line in (folder / "recipes.jsonl").read_text(encoding="utf-8").splitlines()]
    write_lines(folder / "recipes.jsonl", [recipes[0]] + [recipe | {"split": "unseen"} for recipe in recipes[1:]])
    stage, sequences = examples_of(train.Joint, train.joint_stage, data=(folder,), init=runs / "stage1",
                                   out=tmp_path / "out")
    assert len({tuple(sequence.tokens) for sequence in sequences}) == 1


def test_a_title_is_spelled_alike_in_training_and_in_generation(runs, folder, tmp_path, monkeypatch):
    stage, sequences = examples_of(train.Joint, train.joint_stage, data=(folder,), init=runs / "stage1",
                                   out=tmp_path / "out")
    asked, pipeline = [], generate.Pipeline.from_pretrained(runs / "joint")
    monkeypatch.setattr(pipeline, "_write", lambda prompts, *more, **others: asked.extend(prompts) or [])
    pipeline.interleaved([f" make {i}" for i in range(7)])
    given = {tuple(s.tokens[:s.is_target.index(True)]) for s in sequences}
    assert given == set(map(tuple, asked)) and len(given) == 7


def test_recipes_that_cannot_be_trained_on_are_named_and_left_out_on_demand(runs, folder, tmp_path, capsys):
    recipes = [json.loads(line) for line in (folder / "recipes.jsonl").read_text(encoding="utf-8").splitlines()]
    recipes[0]["images"][1] = "none.png"
    recipes[1]["steps"][0] = "stir " * 100
    recipes[2]["title"] = "  "
    write_lines(folder / "recipes.jsonl", recipes)
    arguments = ["joint", "--data", folder, "--init", runs / "stage1"]
    message = refused(capsys, *arguments, "--out", tmp_path / "refused")
    assert "make 0: its image none.png is not among those of" in message and "(and 2 more)" in message
    run(*arguments, "--out", tmp_path / "out", "--skip-bad")
    found = dict(json.loads((tmp_path / "out" / "left-out.json").read_text(encoding="utf-8")))
    assert list(found) == ["make 0", "make 1", "1. 2\n2. more"] and "expected at most 160" in found["make 1"]


# ----------------------------------------------------------------------------- what it takes

@pytest.mark.parametrize("joint", [False, True])
def test_the_memory_that_is_checked_is_the_forecasts_and_knows_when_all_trains(joint):
    model = make_mars()
    n, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (False, True))
    forecast = list(training_memory(model.config, 2).values())[:2]
    if joint:
        model.requires_grad_(True)
        forecast = [16 * n, 16 * n / 2]
    assert forecast[0] == (16 * n if joint else 16 * trained + 2 * (n - trained))
    for shard, need in enumerate(forecast):
        train.check_memory(model, 2, need, bool(shard))
        with pytest.raises(ValueError, match="training takes 0.0 GB of each GPU, which has 0.0; expected --shard on"):
            train.check_memory(model, 2, need - 1, bool(shard))
