"""Claims about Stages II and III (paper Sec. 3.4): aspect ratios, sizes in captions, filters, the cascade."""
import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import generate
import stages
import tables
import test_train
import train
from checkpoint import fingerprint
from data import Filters, Folder, Row, psnr, size_of, size_text, stage3_rows
from generate import Painter, Sampling, draw_codes
from mars import MARS, is_visual
from test_data import CODES, END, IMG, UNCOND, VOCABULARY
from train import PRESETS, Recipe


def small_preset():
    """All stages, a few steps each."""
    small = test_train.small_preset()
    return dataclasses.replace(small, aspects=((4, 4, 16), (4, 6, 16), (8, 4, 16)), large=((4, 4, 32),), ahead=4,
                               recipes=small.recipes | {"stage2": Recipe(4, 8, 1e-3), "stage3": Recipe(4, 4, 1e-3)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The --out of every stage, a few steps each, in one command."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "test", small_preset())
        train.main(["all", "--preset", "test", "--out", str(out), "--sample-every", "4"])
    return out


def refused(capsys, *arguments) -> str:
    """The one line that generate.py ends with."""
    with pytest.raises(SystemExit) as stop:
        generate.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.strip().splitlines()[-1]


# ----------------------------------------------------------------------------- Stage II

@pytest.mark.parametrize("image, expected", [
    ((640, 480), (256, 336)), ((480, 640), (336, 256)), ((512, 512), (256, 256)), ((1000, 100), (256, 512)),
    ((100, 1000), (512, 256)), ((31, 30), (256, 272))])
def test_the_shorter_side_is_fixed_the_ratio_kept_up_to_2_and_sides_are_multiples_of_the_factor(image, expected):
    assert size_of(Image.new("RGB", image), 256, 16) == expected


def test_the_size_stands_between_caption_and_picture_also_where_the_caption_is_dropped():
    size = [7, 8]
    assert data.text_to_image([5], CODES, VOCABULARY, size).tokens[:4] == [5, 7, 8, IMG]
    dropped = data.text_to_image(None, CODES, VOCABULARY, size)
    assert dropped.tokens[:4] == [UNCOND, 7, 8, IMG] and not any(dropped.is_target[:3])
    assert data.captioning([5], CODES, VOCABULARY, 1, size).tokens[:3] == [7, 8, IMG]
    assert size_text(96, 128) == " 96x128"


def test_every_size_asked_for_is_the_size_written(runs, tmp_path):
    painter = Painter.from_pretrained(runs / "stage2")
    assert set(painter.sizes) == {(96, 96), (96, 144), (192, 96)} and painter.sizes[0] == (96, 96)
    for height, width in painter.sizes:
        out = tmp_path / f"{height}.png"
        generate.main(["a red circle", "--weights", str(runs / "stage2"), "-o", str(out), "--size", f"{height}x{width}"])
        assert Image.open(out).size == (width, height)
    assert isinstance(painter.describe([Image.new("RGB", (90, 200)), Image.new("RGB", (50, 50))])[1], str)


def test_an_untrained_or_impossible_size_is_refused_with_a_list_of_what_there_is(runs, capsys):
    message = refused(capsys, "a red circle", "--weights", runs / "stage2", "--size", "96x97")
    assert "size 96x97: expected one that these weights were trained on" in message
    assert "96x96, 96x144, 192x96" in message
    assert "--size is 'wide', expected HxW" in refused(capsys, "a red circle", "--size", "wide")
    assert "size 96x144" in refused(capsys, "a red circle", "--weights", runs / "stage1", "--size", "96x144")


def test_stage_ii_goes_on_from_stage_i_with_the_language_untouched_and_batches_of_one_size(runs):
    before, after = (MARS.from_pretrained(runs / stage).state_dict() for stage in ("stage1", "stage2"))
    assert all(torch.equal(before[name], after[name]) for name in after if not is_visual(name))
    assert any(not torch.equal(before[name], after[name]) for name in after if is_visual(name))
    codes = data.Codes(runs / "stage2" / "codes")
    buckets = codes.buckets(codes.whole)
    assert sum(map(len, buckets.values())) == len(codes) and len(buckets) == 3
    assert all(codes[i].shape == size for size, rows in buckets.items() for i in rows)


def test_a_run_resumes_only_with_the_weights_that_it_began_with(runs, tmp_path, capsys):
    arguments = ["stage2", "--preset", "nano", "--steps", "2", "--batch", "2", "--data", str(photographs(tmp_path))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], recipes={"stage2": Recipe(2, 2, 1e-3)}))
        train.main([*arguments, "--init", str(runs / "stage1"), "--out", str(tmp_path / "out"), "--save-every", "1"])
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments, "--init", str(runs / "stage2"), "--out", str(tmp_path / "out"), "--resume"])
    assert stop.value.code == 2 and "that run began with another --init" in capsys.readouterr().err
    assert Painter.from_pretrained(tmp_path / "out").sizes == ((96, 96), (96, 192))


def test_weights_saved_in_bfloat16_are_half_as_large_and_drawn_from_in_float32_beside_a_shared_codec(
        runs, tmp_path, monkeypatch):
    small = test_train.small_preset()
    monkeypatch.setitem(PRESETS, "test", dataclasses.replace(small, recipes={"stage2": Recipe(4, 8, 1e-3)}))
    inner = tmp_path / "outer" / "inner"
    train.main(["stage2", "--preset", "test", "--init", str(runs / "stage1"), "--out", str(inner), "--steps", "1",
                "--save-bf16"])
    for part in (".", "vqgan"):
        half, whole = ((path / part / "model.safetensors").stat().st_size for path in (inner, runs / "stage2"))
        assert half < 0.6 * whole
    (inner / "vqgan").rename(tmp_path / "outer" / "vqgan")
    painter = Painter.from_pretrained(inner)
    assert {p.dtype for p in [*painter.model.parameters(), *painter.vqgan.parameters()]} == {torch.float32}
    assert painter.paint(["a red circle"])[0].size == (96, 96)


def test_weights_of_a_later_stage_inside_do_not_make_a_folder_another_one(tmp_path):
    for name in ("model", "vqgan/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").write_bytes(b"weights")
    before = fingerprint(tmp_path)
    (tmp_path / "stage3").mkdir()
    (tmp_path / "stage3" / "model.safetensors").write_bytes(b"later")
    assert fingerprint(tmp_path) == before
    (tmp_path / "vqgan" / "model.safetensors").write_bytes(b"another")
    assert fingerprint(tmp_path) != before


def photographs(folder):
    """A folder of two pictures with captions, one square and one wide."""
    for name, size in (("a", (120, 120)), ("b", (300, 100))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.jpg")
    (folder / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"{name}.jpg", "text": "a red circle"}) + "\n" for name in "ab"))
    return folder


def test_pictures_of_several_sizes_are_encoded_as_each_alone_would_be(runs):
    painter = Painter.from_pretrained(runs / "stage2")
    seeded = torch.Generator().manual_seed
    pictures = [torch.rand(3, 16 * h, 16 * w, generator=seeded(h)) for h, w in ((1, 2), (2, 1), (1, 2))]
    for codes, pixels in zip(data.encode_each(painter.vqgan, pictures), pictures):
        assert torch.equal(codes, painter.vqgan.encode(pixels[None])[0])


def test_filters_drop_count_and_name_what_they_drop(tmp_path, capsys):
    for name, size in (("a", (96, 96)), ("b", (40, 96)), ("c", (96, 400)), ("d", (96, 96)), ("e", (96, 96))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    lines = [{"file_name": f"{name}.png", "text": name} for name in "abcde"]
    lines[3]["clip_score"], lines[4]["aesthetic"] = 0.1, 3
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data.main(["encode", "--data", str(tmp_path), "--out", str(tmp_path / "codes"), "--min-side", "64", "--max-ratio",
               "2.5", "--min-clip-score", "0.2", "--min-aesthetic", "4.5"])
    printed = capsys.readouterr().out
    for why in ("side", "ratio", "clip_score", "aesthetic"):
        assert f"1 of 5 pictures left out, filtered by {why};" in printed
    assert data.Codes(tmp_path / "codes").whole == [0]
    lines[0]["clip_score"] = "high"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match='line 1: "clip_score" is \'high\', expected a number'):
        Folder(tmp_path)


def test_a_score_that_the_manifest_lacks_is_not_held_against_a_picture():
    filters = Filters(min_clip_score=0.3)
    assert filters.reason(Image.new("RGB", (9, 9)), {}) is None
    assert filters.reason(Image.new("RGB", (9, 9)), {"clip_score": 0.2}) == "clip_score"


# ----------------------------------------------------------------------------- Stage III

def test_the_large_picture_has_a_long_side_of_1024_and_the_proportions_of_the_small_one():
    assert [data.enlarge(size, 1024, 16) for size in ((256, 256), (256, 512), (336, 256), (96, 192))] == [
        (1024, 1024), (512, 1024), (1024, 784), (512, 1024)]


def test_the_cascade_reads_caption_size_and_small_picture_and_is_asked_for_the_large_one():
    small = np.array([[1]])
    sequence = data.text_to_image([5], CODES, VOCABULARY, [7], small)
    assert sequence.tokens == [5, 7, IMG, 43, 45, 43, 42, 44, END]
    assert sequence.is_target == [False] * 4 + [True] * 5


def test_the_large_picture_is_written_interlaced_so_that_each_code_is_a_few_distances_from_its_small_one(mars):
    order = data.interlaced((4, 6), (2, 3))
    assert order.tolist()[:12] == [0, 2, 4, 12, 14, 16, 1, 3, 5, 13, 15, 17] and sorted(order) == list(range(24))
    small = [row // 2 * 3 + col // 2 for row, col in (divmod(int(code), 6) for code in order)]
    assert {place - code for place, code in enumerate(small)} == {0, 6, 12, 18}          # raster: many more
    assert sorted(data.interlaced((5, 3), (3, 2))) == list(range(15))                    # nor whole multiples
    low, codes = np.arange(6).reshape(2, 3), np.arange(24).reshape(4, 6) % 16
    written = data.text_to_image([5], codes, VOCABULARY, [7], low).tokens[-25:-1]
    assert [token - VOCABULARY.text for token in written] == codes.flatten()[order].tolist()
    # and drawing puts them back: at temperature 0 the picture drawn, written again, is what the model goes on with
    drawn = draw_codes(mars, [[5]], 4, 6, Sampling(cfg=1.0, temperature=0.0), size=[7], low=[torch.tensor(low)])[0]
    tokens = torch.tensor([data.text_to_image([5], drawn.numpy(), mars.vocabulary, [7], low).tokens])
    likeliest = mars(tokens)[0, -26:-2, mars.vocabulary.text:mars.vocabulary.text + 16].argmax(-1)
    assert torch.equal(likeliest + mars.vocabulary.text, tokens[0, -25:-1])


@pytest.mark.parametrize("corruption", [0.0, 0.25])
def test_a_set_share_of_the_small_pictures_codes_is_corrupted(corruption):
    low = [np.full((20, 20), 7, np.uint16)] * 3
    source = data.World(3, seed=0)
    rows = stage3_rows(source, low, [0, 1, 2], 8, random.Random(0), corruption, codes=1000)
    changed = np.mean([row.low != 7 for row in rows])
    assert abs(changed - corruption) < 0.03 and (corruption or not changed) and all(map(np.all, [a == 7 for a in low]))
    assert isinstance(rows[0], Row) and not rows[0].is_captioning


def test_the_cascade_starts_as_stage_ii_and_rows_of_another_codebook_start_anew(mars):
    same = MARS.from_earlier_stage(mars, ahead=3)
    tokens = torch.tensor([[1, 2, 50, 43, 44]])
    assert torch.equal(same(tokens), mars(tokens)) and len(same.visual_ahead) == 2
    other = MARS.from_earlier_stage(mars, ahead=1, codebook=torch.randn(30, 8), generator=torch.Generator())
    assert other.vocabulary.codes == 30
    assert torch.equal(other.visual_embedding.weight[30:36], mars.visual_embedding.weight[16:22])      # special tokens
    assert torch.equal(other(torch.tensor([[1, 2]]))[..., :42], mars(torch.tensor([[1, 2]]))[..., :42])


def test_a_longer_stage_iii_goes_on_with_the_heads_that_the_earlier_one_had(mars):
    first = MARS.from_earlier_stage(mars, ahead=3)
    with torch.no_grad():
        for parameter in first.visual_ahead.parameters():
            parameter.fill_(0.5)
    hidden, third = torch.randn(2, mars.config.width), first.visual_ahead[1]
    more = MARS.from_earlier_stage(first, ahead=5, generator=torch.Generator())
    assert torch.equal(more.ahead(hidden, 3), third(hidden)) and not torch.equal(more.ahead(hidden, 3), hidden)
    assert torch.equal(more.ahead(hidden, 5), hidden)                      # a new head starts as none
    assert len(MARS.from_earlier_stage(more, ahead=2).visual_ahead) == 1


def test_stage_iii_goes_on_from_the_folder_that_it_wrote(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "test", small_preset())
    first, out = runs / "stage3", tmp_path / "more"
    train.main(["stage3", "--preset", "test", "--init", str(first), "--steps", "1", "--lr", "1e-9", "--out", str(out)])
    before, after = MARS.from_pretrained(first).state_dict(), MARS.from_pretrained(out).state_dict()
    assert any(name.startswith("visual_ahead.") for name in after)
    torch.testing.assert_close(after, before)                              # but for one step of hardly any length


def test_heads_asked_at_every_kth_token_cost_two_and_none_is_left_without_gradient(mars):
    tokens = torch.tensor([[1, 58, 45, 43, 42, 44, 45, 59]])
    is_target = tokens >= 42
    mars_loss, places = mars.loss(tokens, is_target).item(), []
    model = MARS.from_earlier_stage(mars, ahead=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.visual_ahead.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    whole, total = model.loss(tokens, is_target).item(), 0.0
    for head in model.visual_ahead:
        head.register_forward_hook(lambda head, given, _: places.append(len(given[0])))
    for phase in range(4):
        model.phase = phase
        before, loss = sum(places), model.loss(tokens, is_target).item()
        total += (2 * loss - mars_loss) * (sum(places) - before)    # that of heads 2 to 4, over the places asked
        assert sum(places) - before <= tokens.shape[1]              # all three together: one more head's work
    assert sum(places) == 5 + 4 + 3                                 # each head at each place once, in four steps
    assert (mars_loss + total / 7) / 4 == pytest.approx(whole, rel=1e-5)     # Eq. 2 by another road; 7 targets
    model.loss(tokens, is_target).backward()
    assert all(parameter.grad is not None for parameter in model.visual_ahead.parameters())


def test_a_picture_drawn_or_given_comes_out_larger(runs, tmp_path, capsys):
    out, weights = tmp_path / "large.png", ["--weights", str(runs / "stage2"), "--cascade", str(runs / "stage3")]
    generate.main(["a red circle", "--upscale", *weights, "-o", str(out)])
    assert Image.open(out).size == (192, 192)
    Image.new("RGB", (33, 20), "blue").save(tmp_path / "mine.png")
    for heads in ("1", "5", "0"):                               # 5 does not divide 144
        generate.main(["--upscale", str(tmp_path / "mine.png"), "--prompt", "a red circle", *weights, "-o", str(out),
                       "--heads", heads])
        assert Image.open(out).size == (192, 192)
    pictures = []
    for how in ([], ["--verify"]):                              # at temperature 0 the same picture, in fewer passes
        generate.main(["--upscale", str(tmp_path / "mine.png"), "--prompt", "a red circle", *weights, "-o", str(out),
                       "--best-of", "1", *how])
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    assert "belong together" in refused(capsys, "--upscale", tmp_path / "mine.png")
    assert "stage3: not found" in refused(capsys, "a red circle", "--upscale", "--weights", runs / "stage2")
    assert "expected those of train.py stage3" in refused(
        capsys, "a red circle", "--upscale", "--weights", runs / "stage2", "--cascade", runs / "stage1")
    assert "these weights only upscale" in refused(capsys, "a red circle", "--weights", runs / "stage3")
    assert "expected one that the cascade enlarges" in refused(capsys, "x", "--upscale", "--size", "192x96", *weights)
    generate.main(["--upscale", str(tmp_path / "mine.png"), "--prompt", "x", *weights, "-o", str(out)])
    assert "mine.png is cropped to 96 x 96" in capsys.readouterr().err


def test_one_head_draws_as_head_1_alone_and_the_seed_decides(runs):
    painter = Painter.from_pretrained(runs / "stage3")
    image, hot = Image.new("RGB", (48, 48), "red"), Sampling(cfg=1.0, temperature=2.0)
    first, again, other = (painter.upscale([image], ["x"], hot, seed=seed)[0].tobytes() for seed in (0, 0, 1))
    assert first == again != other
    single = MARS(dataclasses.replace(painter.model.config, ahead=1))
    single.load_state_dict({k: v for k, v in painter.model.state_dict().items() if "ahead" not in k})
    alone = Painter(single, painter.vqgan, painter.tokenizer, painter.side)
    one = Sampling(cfg=1.0, temperature=0.0, heads=1)
    assert alone.upscale([image], ["x"], one)[0].tobytes() == painter.upscale([image], ["x"], one)[0].tobytes()


def test_a_verified_large_picture_is_the_one_of_head_1_alone(runs):
    painter, image, passes = Painter.from_pretrained(runs / "stage3"), Image.new("RGB", (96, 96), "red"), []
    painter.model.norm.register_forward_hook(lambda *_: passes.append(1))
    certain = Sampling(cfg=1.0, temperature=0.0)
    alone = painter.upscale([image], ["x"], dataclasses.replace(certain, heads=1))[0]
    of_one = len(passes)
    verified = painter.upscale([image], ["x"], certain, verify=True)[0]
    assert verified.tobytes() == alone.tobytes() and of_one == 144 and len(passes) - of_one <= 144


def test_of_several_large_pictures_the_one_stays_that_is_nearest_to_the_small_one_when_made_small_again(runs):
    painter, image = Painter.from_pretrained(runs / "stage3"), Image.new("RGB", (96, 96), "red")
    certain, varied = (Sampling(cfg=1.0, temperature=t, heads=1) for t in (0.0, 0.6))
    made = [painter.upscale([image], ["x"], varied if seed else certain, seed=seed)[0] for seed in range(3)]
    nearest = max(made, key=lambda large: psnr([large.resize((96, 96), Image.Resampling.BICUBIC)], [image]))
    assert painter.upscale([image], ["x"], certain, best_of=3)[0].tobytes() == nearest.tobytes()
    assert len({large.tobytes() for large in made}) == 3


def test_tables_2_and_4_score_each_stage_that_there_is(runs, tmp_path, capsys):
    two, out = tmp_path / "two", tmp_path / "table.json"
    shutil.copytree(runs / "stage2", two)
    common = ["--weights", str(two), "--prompts", "20", "--seeds", "1", "--out", str(out)]
    tables.main(["4", *common])
    assert list(json.loads(out.read_text())["rows"]) == ["Stage II"]
    shutil.copytree(runs / "stage3", two / "stage3")
    tables.main(["4", "--stage1", str(runs / "stage1"), *common])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["Stage I", "Stage II", "Stage III"] and all(row["frechet"]["mean"] > 0 for row in rows.values())
    tables.main(["2", "--prompts", "20", "--seeds", "1", "--out", str(out)])              # the weights that ship
    assert json.loads(out.read_text())["rows"]["MARS"]["all"]["mean"] > 60
    assert "the paper's MARS: color 69.13, shape 54.31" in capsys.readouterr().out


def test_psnr_is_the_mean_over_pictures_and_rounding_is_its_floor():
    grey = [Image.new("RGB", (4, 4), (v, v, v)) for v in (10, 20, 20)]
    assert psnr(grey[:1], grey[1:2]) == pytest.approx(10 * np.log10(255 ** 2 / 100))
    assert psnr(grey[1:2], grey[2:]) == pytest.approx(58.92, abs=0.01)


def test_stage_iii_says_how_near_it_comes_beside_bicubic_scaling(runs):
    assert data.Codes(runs / "stage3" / "codes")[0].shape == (12, 12)
    assert data.Codes(runs / "stage3" / "codes-low")[0].shape == (6, 6)
    last = test_train.lines(runs / "stage3")[-1]
    assert last["psnr_bicubic"] > 10 and min(last["psnr_1"], last["psnr_4"]) > 0
    assert (runs / "stage3" / "samples" / "000004.png").is_file()
    assert stages.STAGES["stage3"] is stages.Stage3
