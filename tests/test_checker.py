"""The checker: right on every drawing, wrong when the caption is wrong, patient with blur and not with damage."""
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from checker import KEYS, UNKNOWN, check, compare, components, related, see
from world import (BACKGROUNDS, COLOURS, DETAILS, INVERSE, LANGUAGES, SHAPES, SIZES, SPLITS, TEXTURES, Scene,
                   Thing, caption, claim_of, parse, render, sample_scene)


def scenes(n, seed=0, split=None, **how):
    rng = random.Random(seed)
    return [sample_scene(rng, split or SPLITS[i % len(SPLITS)], **how) for i in range(n)]


def worn(picture, rng):
    """A picture as a small tokenizer gives it back: a little blurred and a little noisy."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


def test_checker_is_right_on_every_render():
    rng = random.Random(1)
    for i, scene in enumerate(scenes(500)):
        sight = see(render(scene))
        facts = compare(sight, claim_of(scene))
        assert all(facts[key] for key in KEYS if key != "relation" or scene.relations), (facts, scene)
        text = caption(scene, rng, LANGUAGES[i % 2], DETAILS[i // 2 % 2])
        assert compare(sight, parse(text))["all"], (text, scene)


def test_checker_sees_every_kind_of_thing():
    for colour in COLOURS:
        for i, shape in enumerate(SHAPES):
            for texture in TEXTURES:
                for size in SIZES:
                    background = tuple(BACKGROUNDS)[i % len(BACKGROUNDS)]
                    scene = Scene((Thing(colour, shape, texture, size, 0, 4),), background, ())
                    sight = see(render(scene))
                    assert sight.background == background
                    assert [(t.colour, t.shape, t.texture, t.size) for t in sight.things] == [
                        (colour, shape, texture, size)]


@pytest.mark.parametrize("rows, cols, cell", [(6, 10, 16), (9, 6, 16), (6, 6, 32)])
def test_checker_reads_other_sizes(rows, cols, cell):
    for scene in scenes(12, rows=rows, cols=cols):
        assert check(render(scene, cell), claim_of(scene), cell)["all"], scene


def test_checker_forgives_mild_blur_and_noise():
    noise = np.random.default_rng(0)
    right = [check(worn(render(scene), noise), claim_of(scene))["all"] for scene in scenes(300)]
    assert np.mean(right) >= 0.98


def test_checker_rejects_wrong_captions():
    rng, some = random.Random(2), scenes(300, split="any")
    wrong = [check(render(a), parse(caption(b, rng, LANGUAGES[i % 2], "fine")))
             for i, (a, b) in enumerate(zip(some, some[1:]))]
    rate = {key: np.mean([facts[key] for facts in wrong if facts[key] is not None]) for key in KEYS}
    assert rate["all"] == 0
    assert rate["colour"] < 0.15 and rate["shape"] < 0.2  # 1/8 and 1/6 for one thing, far less for more
    assert 0.2 < rate["background"] < 0.45  # 1/3
    assert rate["relation"] < 0.25 and rate["texture"] < 0.4 and rate["size"] < 0.5 and rate["count"] < 0.5


def changes(scene, rng):
    """(key, claim) for a claim with one single fact wrong, for every key."""
    full = claim_of(scene)
    swap = lambda i, **new: replace(
        full, things=(*full.things[:i], replace(full.things[i], **new), *full.things[i + 1:]))
    other = lambda words, word: rng.choice([w for w in words if w != word])
    i = rng.randrange(len(full.things))
    thing = full.things[i]
    yield "colour", swap(i, colour=other(COLOURS, thing.colour))
    yield "shape", swap(i, shape=other(SHAPES, thing.shape))
    yield "texture", swap(i, texture=other(TEXTURES, thing.texture))
    yield "size", swap(i, size=other(SIZES, thing.size))
    yield "background", replace(full, background=other(BACKGROUNDS, full.background))
    if full.relations:
        i = rng.randrange(len(full.relations))
        a, relation, b = full.relations[i]
        wrong = (a, other(INVERSE, relation), b)
        yield "relation", replace(full, relations=(*full.relations[:i], wrong, *full.relations[i + 1:]))


def test_checker_sees_each_single_changed_attribute():
    rng = random.Random(3)
    for scene in scenes(150):
        sight = see(render(scene))
        for key, claim in changes(scene, rng):
            facts = compare(sight, claim)
            assert {k for k in KEYS if facts[k] is False} == {key, "all"}, (scene, claim, facts)


def test_checker_counts():
    for scene in scenes(60, split="any", count=3):
        fewer = Scene(scene.things[:2], scene.background, scene.relations[:1])
        facts = check(render(scene), claim_of(fewer))
        assert {k for k in KEYS if facts[k] is False} == {"count", "all"}
        facts = check(render(fewer), claim_of(scene))
        assert facts["count"] is False and facts["colour"] is False and facts["relation"] is False
    empty = Image.new("RGB", (96, 96), BACKGROUNDS["beige"])
    assert see(empty).things == () and see(empty).background == "beige"
    assert not check(empty, parse("a red circle"))["count"]


def test_checker_says_none_where_the_caption_says_nothing():
    scene, = scenes(1, seed=4, count=1, split="train")
    thing = scene.things[0]
    facts = check(render(scene), parse(f"a {thing.colour} {thing.shape}"))
    assert facts == {"colour": True, "shape": True, "texture": None, "size": None, "count": True, "relation": None,
                     "background": None, "all": True}


def test_a_broken_thing_is_not_accepted():
    for scene in scenes(200, split="any", count=1):
        thing = scene.things[0]
        pixels = np.asarray(render(scene)).copy()
        top, left, side = thing.row * 16, thing.col * 16, thing.cells * 16
        pixels[top:top + side // 2, left:left + side] = BACKGROUNDS[scene.background]
        assert not check(pixels, claim_of(scene))["all"], scene
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert all(UNKNOWN in (t.colour, t.shape) for t in see(noise).things)


def test_a_colour_or_a_background_of_no_name_is_unknown():
    pixels = np.full((64, 64, 3), 246, np.uint8)
    pixels[17:47, 17:47] = (128, 128, 128)
    thing, = see(pixels).things
    assert (thing.colour, thing.shape, thing.size) == (UNKNOWN, "square", "large")
    assert see(np.full((64, 64, 3), (255, 0, 255), np.uint8)).background == UNKNOWN


def test_specks_are_not_things():
    scene, = scenes(1, seed=5, count=1, split="any")
    pixels = np.asarray(render(Scene(scene.things, "white", ()))).copy()
    row = 0 if scene.things[0].row > 1 else 60
    pixels[row:row + 3, 30:34] = 0
    assert len(see(pixels).things) == 1


def test_relations_need_things_that_face_each_other():
    a, b, c = (0, 0, 14, 14), (0, 24, 22, 46), (30, 24, 44, 38)  # top, left, bottom, right
    assert related(a, "left", b) and related(b, "right", a) and not related(b, "left", a)
    assert related(b, "above", c) and related(c, "below", b) and not related(c, "above", b)
    assert not any(related(a, relation, c) for relation in INVERSE)


def test_components_are_whole_and_apart():
    words = ["u.u..n", "uuu.nn", "......", "s....."]  # each letter is one part; they touch at corners at most
    mask = np.array([[letter != "." for letter in row] for row in words])
    parts = sorted("".join(words[r][c] for r, c in part) for part in components(mask))
    assert parts == ["nnn", "s", "uuuuu"]


def test_wrong_pictures_are_refused():
    for shape in ((64, 64), (64, 60, 3), (64, 64, 4)):
        with pytest.raises(ValueError, match="expected"):
            see(np.zeros(shape, np.uint8))
