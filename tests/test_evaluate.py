"""Claims about the judge, the questions and the report (paper Sec. 4), on drawn shapes and a pipeline that cheats."""
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

import evaluate
import judge as judging
from conftest import make_mars
from dataset import Dataset
from evaluate import EvaluateConfig, main
from images import grid, psnr, resize_and_crop, to_image, to_pixels
from judge import Judge, choose, interval, questions, rows_of, table
from sampling import Sampling
from tokenizer import TextTokenizer

COLORS = dict(zip("red green blue orange purple black".split(), "红色 绿色 蓝色 橙色 紫色 黑色".split()))
SHAPES = {"circle": "圆形", "square": "方形", "bar": "横条", "stick": "竖条", "corner": "角"}
BOXES = {"square": (8, 8, 56, 56), "bar": (4, 26, 60, 38), "stick": (26, 4, 38, 60), "corner": (0, 0, 24, 24)}
EMOJI = Path(__file__).parent.parent / "data" / "emoji"


def draw_shape(color: str, shape: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 8, 56, 56), fill=color) if shape == "circle" else pen.rectangle(BOXES[shape], fill=color)
    return image


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Thirty shapes; blue ones are held out, the Chinese of black ones is withheld, "disc" is an alias."""
    folder, lines = tmp_path_factory.mktemp("shapes"), []
    for color in COLORS:
        for shape in SHAPES:
            draw_shape(color, shape).save(folder / f"{color}-{shape}.png")
            en, zh = f"{color} {shape}", COLORS[color] + SHAPES[shape]
            withheld = {"zh withheld": [zh]} if color == "black" else {}
            alias = {"alias": [f"{color} disc"]} if shape == "circle" else {}
            lines.append({"file_name": f"{color}-{shape}.png", "color": color, "concept": shape,
                          "text": [en, f"a {en}", en.upper(), *([] if withheld else [zh, f"一个{zh}"])],
                          "split": "unseen color" if color == "blue" else "train",
                          "names": {"en": [en], "zh": [zh]}, "held_out_text": withheld | alias})
    write_lines(folder / "metadata.jsonl", lines)
    write_lines(folder / "recipes.jsonl", [
        {"title": f"how to make a {color} {shape}", "steps": [f"1. {color} square", f"2. {color} {shape}"],
         "images": [f"{color}-square.png", f"{color}-{shape}.png"], "split": "train" if color != "red" else "held-out"}
        for color in ("red", "green") for shape in ("bar", "stick")])
    text = "red circle in Chinese is 红色圆形\n红色圆形的英文是red circle\n"
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "pairs" / "images").mkdir(parents=True)
    cells = [("red-circle", "green-bar"), ("black-stick", "red-square"), ("green-circle", "red-bar")]
    for i, (a, b) in enumerate(cells):
        wide, pair = i != 1, Image.new("RGB", (128, 64) if i != 1 else (64, 128))
        pair.paste(draw_shape(*a.split("-")), (0, 0))
        pair.paste(draw_shape(*b.split("-")), (64, 0) if wide else (0, 64))
        pair.save(folder / "pairs" / f"{i}.png")
    write_lines(folder / "pairs" / "metadata.jsonl", [
        {"file_name": f"{i}.png", "text": f"pair {i}", "cells": list(pair)} for i, pair in enumerate(cells)])
    return folder


@pytest.fixture(scope="module")
def judge(folder) -> Judge:
    return Judge(Dataset(folder))


class Codes:
    """An image tokenizer that forgets nothing: image i of a batch is token i. Its parameters say where it is."""
    factor, config = 64, SimpleNamespace(num_embeddings=100)

    def parameters(self):
        yield torch.zeros(1)

    def encode(self, pixels):
        self.pixels = pixels
        return torch.arange(len(pixels)).view(-1, 1, 1)

    def decode(self, tokens):
        return self.pixels[tokens.flatten()]


class Cheat:
    """A pipeline that looks the answer up; `mistake(n)` says what to answer in place of answer n."""
    def __init__(self, dataset, pairs=None, mistake=lambda n: n, long_side=0):
        self.datasets = [dataset] + [pairs] * bool(pairs)
        self.sizes, self.vqgan, self.mistake, self.sampling = ((64, 64), (64, 128), (128, 64)), Codes(), mistake, []
        self.tokenizer = TextTokenizer.train(["red circle in Chinese is 红色圆形 的英文是"], 300)
        self.model = make_mars(text_vocab=len(self.tokenizer), k=4, long_side=long_side, max_seq_len=128)
        self.drawn = {text: (d, i) for d in self.datasets for i in range(len(d)) for text in [
            *d.captions(i), *sum(d.facts(i).get("held_out_text", {}).values(), [])]}

    def text_to_image(self, prompts, sampling, seeds, *, size, best_of):
        self.sampling += [(sampling, seed, size, best_of) for seed in seeds]
        found = [self.drawn[text] for text in prompts]
        return [d.image(self.mistake(i)).resize(size[::-1]) for d, i in found]

    def caption_images(self, images, best_of, seed):
        pixels = {self.datasets[0].image(i).tobytes(): i for i in range(len(self.datasets[0]))}
        return [self.datasets[0].captions(self.mistake(pixels[image.tobytes()]))[0].upper() for image in images]

    def interleaved(self, titles, sampling, seeds):
        pages = []
        for title in titles:
            *_, color, shape = title.split()
            names = [f"{color} square", f"{color} {shape}"]
            pages.append(("\n".join(f"{i}. {name}" for i, name in enumerate(names, 1)),
                          [self.datasets[0].image(self.mistake(self.drawn[name][1])) for name in names]))
        return pages

    def super_resolve(self, images, prompts, sampling, on_tokens=lambda tokens: None):
        for _ in range(5 if sampling.k == 1 else 2):
            on_tokens(None)
        return [resize_and_crop(self.datasets[0].image(self.mistake(self.drawn[text][1])), 128, 128)
                for text in prompts]

    def reconstruct(self, images):
        return images


def run(folder, pipeline, monkeypatch, tmp_path, *flags) -> tuple[dict, dict]:
    """The command -> its report, and (task, split, language, what) -> accuracy or value."""
    monkeypatch.setattr(evaluate.Pipeline, "from_pretrained", lambda directory, device: pipeline)
    main(["--data", str(folder), "--out", str(tmp_path / "report.json"), *flags])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found = {tuple(row[name] for name in ("task", "split", "language", "what")): row.get("accuracy", row.get("value"))
             for row in report["rows"]}
    return report, found


# ----------------------------------------------------------------------------- the judge

def test_true_images_are_all_correct_and_shuffled_prompts_are_correct_by_chance(judge):
    n = len(judge.dataset)
    indices = judge.nearest([judge.dataset.image(i) for i in range(n)])
    assert indices.shape == (n, 5) and judge.correct(indices, [[i] for i in range(n)])[:, 0].all()
    hits = 0
    for seed in range(10):
        order = random.Random(seed).sample(range(n), n)
        hits += int(judge.correct(indices, [[i] for i in order])[:, 0].sum())
    assert hits / (10 * n) < 0.1                                       # chance is 1 / 30


def test_an_image_of_another_size_with_noise_is_still_nearest_to_its_own(judge):
    generator, right = torch.Generator().manual_seed(0), []
    for i in range(len(judge.dataset)):
        pixels = to_pixels(judge.dataset.image(i).resize((96, 96)))
        noisy = to_image(pixels + 0.2 * torch.randn(pixels.shape, generator=generator))
        right.append(judge.nearest([noisy])[0, 0] == i)
    assert all(right)


def test_images_all_but_alike_count_as_one_and_others_do_not(tmp_path):
    for name, level in (("a", 100), ("b", 102), ("c", 110)):           # b is 0.8% of the range from a, c is 4%
        Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / f"{name}.png")
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": f"{name}.png", "text": name} for name in "abc"])
    judge = Judge(Dataset(tmp_path))
    indices = judge.nearest([judge.dataset.image(0)])
    assert indices.tolist() == [[0, 1, 2]]
    assert judge.correct(indices, [[1]]).tolist() == [[True, True, False]]
    assert judge.correct(indices, [[2]]).tolist() == [[False, False, True]]
    assert judge.correct(indices, [[]]).tolist() == [[False, False, False]]


def test_a_prompt_that_several_images_have_asks_for_any_of_them(tmp_path):
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a dog" if name < "c" else "a cat")
    judge = Judge(Dataset(tmp_path))
    assert judge.images_of(" A  Dog") == [0, 1] and judge.images_of("a bird") == []
    indices = judge.nearest([judge.dataset.image(i) for i in range(3)])[:, :1]
    assert judge.correct(indices, [judge.images_of("a dog")] * 3).flatten().tolist() == [True, True, False]


def test_facts_of_another_kind_are_refused_in_one_line(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for names in (["a"], {"en": "a"}, {"en": [1]}):
        write_lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "a", "names": names}])
        with pytest.raises(ValueError, match='a.png: "names" is .*expected an object'):
            Judge(Dataset(tmp_path))


@pytest.mark.skipif(not (EMOJI / "metadata.jsonl").is_file(), reason="needs data/emoji, see openmoji.py")
def test_fewer_than_one_emoji_in_a_hundred_has_a_neighbour_that_counts_as_one():
    small = Judge(Dataset(EMOJI)).small
    distances = torch.cdist(small, small).square() / small.shape[1]
    assert 0 < (distances.fill_diagonal_(1).amin(1) <= judging.TOLERANCE).float().mean() < 0.01


# ----------------------------------------------------------------------------- what is asked

def test_questions_are_of_their_split_and_language_one_an_image(judge):
    asked = questions(judge.dataset, 100, seed=3)
    counts = {}
    for split, language, text, i in asked:
        facts, is_chinese = judge.dataset.facts(i), any("\u4e00" <= c <= "\u9fff" for c in text)
        assert (language == "zh") == is_chinese and i in judge.images_of(text)
        assert (facts["split"] != "train") == (split == "unseen color")
        assert split in ("seen", "unseen color") or text in facts["held_out_text"][split]
        assert split not in ("seen", "unseen color") or text in judge.dataset.captions(i)
        counts.setdefault((split, language), []).append(i)
    assert {key: len(images) for key, images in counts.items()} == {
        ("seen", "en"): 25, ("seen", "zh"): 20, ("alias", "en"): 5, ("unseen color", "en"): 5,
        ("unseen color", "zh"): 5, ("zh withheld", "zh"): 5}
    assert all(len(set(images)) == len(images) for images in counts.values())
    few = questions(judge.dataset, 3, seed=3)
    assert len(few) == 18 and few == questions(judge.dataset, 3, seed=3) != questions(judge.dataset, 3, seed=4)


def test_one_language_is_called_all_and_a_folder_without_captions_is_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no image has a caption"):
        questions(Dataset(tmp_path), 5, seed=0)
    (tmp_path / "a.txt").write_text("a black square")
    assert questions(Dataset(tmp_path), 5, seed=0) == [("seen", "all", "a black square", 0)]


def test_choose_takes_at_most_n_of_each_pool_and_seen_first():
    chosen = choose({("b",): [1, 2, 3], ("unseen",): [4], ("seen",): [5, 6]}, 2, seed=0)
    assert [name for (name,), _ in chosen] == ["seen", "seen", "b", "b", "unseen"]


# ----------------------------------------------------------------------------- the report

def test_interval_is_wilsons_and_stays_within_0_and_1():
    assert interval(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    for n in range(1, 400):
        assert interval(0, n)[0] >= 0 and interval(n, n)[1] <= 1


def test_rows_count_marks_and_average_values():
    rows = rows_of({("drawing", "seen", "en", "top-1"): [True, False, True, True],
                    ("reconstruction", "seen", "all", "PSNR"): [20.0, 30.0], ("nothing", "was", "ever", "noted"): []})
    assert rows[0] == {"task": "drawing", "split": "seen", "language": "en", "what": "top-1", "correct": 3, "n": 4,
                       "accuracy": 0.75, "low": interval(3, 4)[0], "high": interval(3, 4)[1]}
    assert len(rows) == 2 and rows[1]["value"] == 25 and rows[1]["n"] == 2
    assert "75.0%    30.1 to 95.4 of 4" in table(rows) and "25" in table(rows).split("\n")[2]


# ----------------------------------------------------------------------------- the tasks

def test_a_perfect_pipeline_has_all_correct_in_every_row(folder, monkeypatch, tmp_path, capsys):
    pipeline = Cheat(Dataset(folder))
    report, found = run(folder, pipeline, monkeypatch, tmp_path, "--guidance", "3", "--best-of", "2", "--seed", "7")
    accuracy = {row["what"]: row["accuracy"] for row in report["rows"] if row["what"] != "translation" and "low" in row}
    assert set(accuracy) == {"top-1", "top-5", "color", "concept", "exact"} and set(accuracy.values()) == {1.0}
    assert found["reconstruction", "unseen color", "all", "PSNR"] > 50
    assert found["reconstruction", "all", "all", "codebook usage"] == 0.3
    assert (report["weights"], report["data"], report["seed"]) == ("emoji", folder.name, 7)
    assert report["sampling"]["guidance"] == 3 and report["sampling"]["best_of"] == 2
    sampling, seeds, sizes, best_of = zip(*pipeline.sampling)
    assert sampling[0].guidance == 3 and seeds == tuple(range(7, 7 + 65))
    assert set(sizes) == {(64, 64)} and set(best_of) == {2}
    assert "drawing" in capsys.readouterr().out


def test_a_wrong_color_costs_top_1_and_color_but_not_the_concept(folder, monkeypatch, tmp_path):
    pipeline = Cheat(Dataset(folder), mistake=lambda i: (i + len(SHAPES)) % 30)        # the next color, the same shape
    _, found = run(folder, pipeline, monkeypatch, tmp_path)
    for split, language in (("seen", "en"), ("seen", "zh"), ("unseen color", "en"), ("zh withheld", "zh")):
        assert found["drawing", split, language, "top-1"] == found["drawing", split, language, "color"] == 0
        assert found["drawing", split, language, "concept"] == 1
    assert found["captioning", "seen", "all", "exact"] == found["captioning", "unseen color", "all", "exact"] == 0


def test_top_5_counts_an_image_that_is_second(folder, monkeypatch, tmp_path):
    pipeline = Cheat(Dataset(folder))
    wrong = Cheat(Dataset(folder), mistake=lambda i: (i + len(SHAPES)) % 30)
    exact = pipeline.text_to_image
    pipeline.text_to_image = lambda *arguments, **more: [
        Image.blend(right, other, 0.52)
        for right, other in zip(exact(*arguments, **more), wrong.text_to_image(*arguments, **more))]
    _, found = run(folder, pipeline, monkeypatch, tmp_path)
    assert found["drawing", "seen", "en", "top-5"] > 0.8 > 0.2 > found["drawing", "seen", "en", "top-1"]


def test_perplexity_is_that_of_the_text_head_alone(folder, judge):
    pipeline, found = Cheat(judge.dataset), evaluate.defaultdict(list)
    c = EvaluateConfig(data=folder)
    with torch.inference_mode():
        evaluate.language(found, pipeline, judge, c)
        total, n = 0.0, 0
        for line in (folder / "text.txt").read_text(encoding="utf-8").splitlines():
            ids = [*pipeline.tokenizer.encode(line), pipeline.tokenizer.eos][:64]
            logits = pipeline.model(torch.tensor([ids]))[0, :, :pipeline.model.vocabulary.text]
            total -= sum(float(logits[t].log_softmax(-1)[ids[t + 1]]) for t in range(len(ids) - 1))
            n += len(ids) - 1
    assert found["language", "text.txt", "all", "perplexity"] == [pytest.approx(math.exp(total / n), rel=1e-4)]


def test_a_translation_counts_if_greedy_text_is_a_name(folder, judge, monkeypatch):
    pipeline, found = Cheat(judge.dataset), evaluate.defaultdict(list)
    names = {judge.dataset.facts(i)["names"][a][0]: judge.dataset.facts(i)["names"][b][0]
             for i in range(len(judge.dataset)) for a, b in (("en", "zh"), ("zh", "en"))}

    def answer(model, prompts, tokenizer, *_):
        asked = [tokenizer.decode(ids).removesuffix(" in chinese is").removesuffix("的英文是") for ids in prompts]
        return [(tokenizer.encode("stick" if "stick" in name else names[name]), None) for name in asked]
    monkeypatch.setattr(evaluate, "generate_text", answer)
    with torch.inference_mode():
        evaluate.language(found, pipeline, judge, EvaluateConfig(data=folder))
    assert sum(found["language", "names", "zh", "translation"]) == 24                  # all but the sticks
    assert sum(found["language", "names", "en", "translation"]) == 30


def test_each_image_of_a_pair_is_judged_by_itself_in_its_place(folder, monkeypatch, tmp_path):
    flags, pairs = ("--pairs", str(folder / "pairs")), Dataset(folder / "pairs")
    report, found = run(folder, Cheat(Dataset(folder), pairs), monkeypatch, tmp_path, *flags)
    assert {row["task"] for row in report["rows"]} == {"several, 64x128", "several, 128x64", "several, all sizes"}
    assert set(found.values()) == {1.0}
    assert [row["n"] for row in report["rows"]] == [2, 4, 2, 2, 1, 2, 1, 1, 3, 6, 3, 3]
    swap = Cheat(Dataset(folder), pairs)
    exact = swap.text_to_image
    def swapped(*arguments, size, **more):
        halves = [(image.crop((0, 0, 64, 64)), image.crop((size[1] - 64, size[0] - 64, size[1], size[0])))
                  for image in exact(*arguments, size=size, **more)]
        images = [Image.new("RGB", size[::-1]) for _ in halves]
        for image, (first, second) in zip(images, halves):
            image.paste(second, (0, 0))
            image.paste(first, (size[1] - 64, size[0] - 64))
        return images
    swap.text_to_image = swapped
    _, found = run(folder, swap, monkeypatch, tmp_path, *flags)
    assert {what: value for (task, _, _, what), value in found.items() if task == "several, 64x128"} == {
        "all": 0, "cell": 0, "objects": 1, "relation": 0}


def test_the_relation_is_not_judged_where_an_object_is_missing(folder, monkeypatch, tmp_path):
    pipeline = Cheat(Dataset(folder), Dataset(folder / "pairs"), mistake=lambda i: 0)   # the first pair, always
    _, found = run(folder, pipeline, monkeypatch, tmp_path, "--pairs", str(folder / "pairs"))
    assert found["several, 64x128", "seen", "all", "objects"] == 0.5                    # one of two
    assert found["several, 64x128", "seen", "all", "relation"] == 1
    assert found["several, 128x64", "seen", "all", "objects"] == 0
    assert ("several, 128x64", "seen", "all", "relation") not in found


def test_recipes_are_parsed_and_each_image_is_that_of_its_step(folder, monkeypatch, tmp_path):
    _, found = run(folder, Cheat(Dataset(folder)), monkeypatch, tmp_path, "--recipes")
    assert {key[1] for key in found} == {"seen", "held-out"} and set(found.values()) == {1.0}
    pipeline = Cheat(Dataset(folder), mistake=lambda i: 0 if i % 5 == 1 else i)        # for a square a circle
    _, found = run(folder, pipeline, monkeypatch, tmp_path, "--recipes")
    assert [found["recipes", "seen", "en", what] for what in ("parsed", "steps", "image", "all")] == [1, 1, 0.5, 0]
    pipeline.interleaved = lambda titles, *_, **__: [("1. red square\n3. red bar", []) for _ in titles]
    _, found = run(folder, pipeline, monkeypatch, tmp_path, "--recipes")
    assert [found["recipes", "seen", "en", what] for what in ("parsed", "steps", "image", "all")] == [0, 0, 0, 0]


def test_enlarging_reports_psnr_top_1_and_forward_passes_of_each_way(folder, monkeypatch, tmp_path):
    pipeline, best = Cheat(Dataset(folder), long_side=128), psnr(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)))
    _, found = run(folder, pipeline, monkeypatch, tmp_path, "--stage3", "weights", "--prompts", "3")
    ways = ("K = 1", "K = 4", "K = 4 verified")
    assert list(dict.fromkeys(key[0] for key in found)) == [
        f"x128, {way}" for way in ("before", "bicubic", "image tokenizer", *ways)]
    assert [found[f"x128, {way}", "seen", "all", "passes"] for way in ways] == [5, 2, 2]
    assert all(found[f"x128, {way}", "seen", language, "top-1"] == 1
               for way in ("before", *ways) for language in ("en", "zh"))
    for way in ("bicubic", "image tokenizer", *ways):                # the true images are 64 pixels, enlarged so too
        assert found[f"x128, {way}", "seen", "all", "PSNR"] == pytest.approx(best)
    assert all(found[f"x128, {way}", "seen", "all", "seconds"] > 0 for way in ways)


def test_what_is_shuffled_is_correct_by_chance_in_every_task(folder, judge):
    """One of thirty drawings is right; 10 runs of each task."""
    found, rng = evaluate.defaultdict(list), random.Random(0)
    shuffled = Cheat(judge.dataset, Dataset(folder / "pairs"), mistake=lambda i: rng.randrange(30), long_side=128)
    enlarger, square = Cheat(judge.dataset, mistake=shuffled.mistake, long_side=128), lambda: rng.choice(
        [judge.dataset.image(i) for i in range(30)])
    shuffled.text_to_image = lambda prompts, *_, size, **__: [grid(
        [square(), square()] if size != (64, 64) else [square()], columns=size[1] // 64, gap=0) for _ in prompts]
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.Pipeline, "from_pretrained", lambda *_: enlarger)
        for seed in range(10):
            c = EvaluateConfig(data=folder, pairs=folder / "pairs", stage3=folder, seed=seed, prompts=2)
            for task in (evaluate.several, evaluate.recipes, evaluate.enlarging):
                part = evaluate.defaultdict(list)
                task(part, shuffled, judge, c)
                for name, marks in part.items():
                    found[name] += marks
    rate = lambda task, what: [sum(marks) / len(marks) for name, marks in found.items()
                               if name[0].startswith(task) and name[3] == what]
    assert all(0 <= p < 0.2 for p in rate("several", "cell")) and max(rate("several", "all")) < 0.1
    assert all(0 <= p < 0.2 for p in rate("recipes", "image")) and max(rate("recipes", "all")) < 0.1
    assert all(0 <= p < 0.2 for p in rate("x128", "top-1")) and len(rate("x128", "top-1")) == 8
    assert max(rate("x128, K", "PSNR")) < 20 < min(rate("x128, bicubic", "PSNR"))


def test_bad_flags_end_in_one_line(capsys, tmp_path):
    for flags, message in ((["--recipes", "--guidance", "2"], "do nothing with --recipes"),
                           (["--recipes", "--k", "4"], "do nothing with --recipes"),
                           (["--prompts", "0"], "--prompts is 0"), (["--weights", str(tmp_path)], "config.json")):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        assert ended.value.code == 2 and message in capsys.readouterr().err.strip().split("\n")[-1]


def test_data_without_what_is_asked_for_end_in_one_line(folder, monkeypatch, tmp_path, capsys):
    empty = shutil.copytree(folder, tmp_path / "empty")
    (empty / "recipes.jsonl").write_text("", encoding="utf-8")
    lines = [json.loads(line) | {"split": "unseen"} for line in
             (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    write_lines(empty / "metadata.jsonl", lines)
    for flags, message in ((["--recipes"], "no recipe in its recipes.jsonl"),
                           (["--stage3", str(folder)], "every image is held out")):
        with pytest.raises(SystemExit) as ended:
            run(empty, Cheat(Dataset(folder), long_side=128), monkeypatch, tmp_path, *flags)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_settings_are_a_sampling():
    assert isinstance(EvaluateConfig(temperature=0.5), Sampling)
