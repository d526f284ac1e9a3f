"""The rendered world: its pictures, its splits, its captions and the reading of them."""
import hashlib
import json
import random
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image

import world
from world import (BACKGROUNDS, COLOURS, LANGUAGES, SHAPES, SIZES, SPLITS, TEXTURES, Claim, Scene,
                   Thing, ThingClaim, caption, claim_of, held_out_combination, held_out_pair, parse, render,
                   sample_scene, split_of, sprite, training_scene, write_folder)


def scenes(n, seed=0, split=None, **how):
    rng = random.Random(seed)
    return [sample_scene(rng, split or SPLITS[i % len(SPLITS)], **how) for i in range(n)]


def pairs(scene):
    return [(thing.colour, thing.shape) for thing in scene.things]


def test_rendering_is_deterministic():
    digest = hashlib.sha256()
    for scene in scenes(100):
        digest.update(render(scene).tobytes())
    assert digest.hexdigest() == "abd1d9ddf2534ee929f4ecc5d0bea5c59f8aaff8dbd3055366ec55498ae7dc3d"


def test_a_picture_has_as_many_pixels_as_its_cells():
    for rows, cols, cell in ((6, 6, 16), (6, 10, 16), (9, 6, 8), (6, 6, 32)):
        scene, = scenes(1, rows=rows, cols=cols)
        assert render(scene, cell).size == (cols * cell, rows * cell)


def test_no_two_things_look_alike():
    looks = list(np.ndindex(len(COLOURS), len(SHAPES), len(TEXTURES)))
    for background in BACKGROUNDS:
        for size, cells in SIZES.items():
            drawn = np.stack([np.asarray(sprite(tuple(COLOURS)[c], SHAPES[s], TEXTURES[t], size, background, 16))
                              for c, s, t in looks]).reshape(len(looks), -1).astype(np.float32)
            square = (drawn ** 2).sum(1)
            apart = square[:, None] + square - 2 * drawn @ drawn.T + 1e9 * np.eye(len(looks))
            assert apart.min() ** 0.5 > 250, (background, size)  # half a dozen pixels of another tone


def test_colours_and_backgrounds_are_well_apart():
    tones = {**COLOURS, **BACKGROUNDS}
    for a, b in combinations(tones, 2):
        assert np.linalg.norm(np.subtract(tones[a], tones[b])) > 70, (a, b)


def test_relations_hold_and_things_keep_a_cell_apart():
    tight = scenes(1000, seed=1, split="any", count=3, rows=5, cols=5)
    for scene in scenes(1000) + tight:
        taken = np.zeros((scene.rows, scene.cols), int)
        for thing in scene.things:
            r, c, n = thing.row, thing.col, thing.cells
            assert 0 <= r <= scene.rows - n and 0 <= c <= scene.cols - n
            assert not taken[max(r - 1, 0):r + n + 1, max(c - 1, 0):c + n + 1].any()
            taken[r:r + n, c:c + n] = 1
        assert len(scene.relations) == len(scene.things) - 1
        for a, relation, b in zip(scene.things, scene.relations, scene.things[1:]):
            if relation in ("left", "right"):
                assert a.row == b.row and (a.col < b.col) == (relation == "left")
            else:
                assert a.col == b.col and (a.row < b.row) == (relation == "above")
        if len(scene.things) == 3:
            assert len({relation in ("left", "right") for relation in scene.relations}) == 2


def test_every_split_keeps_its_promise():
    for split in SPLITS:
        for scene in scenes(500, split=split):
            new_pairs = [held_out_pair(*pair) for pair in pairs(scene)]
            new_combinations = [held_out_combination(a, b) for a, b in combinations(pairs(scene), 2)]
            assert len(set(pairs(scene))) == len(scene.things)
            assert any(new_combinations) == (split == "held_out_combination")
            assert split == "any" or any(new_pairs) == (split == "held_out_pair")


def test_held_out_facts_are_few_and_stable():
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    assert sum(held_out_pair(*pair) for pair in every) == 6
    for i, words in enumerate((COLOURS, SHAPES)):
        assert max(sum(held_out_pair(*pair) for pair in every if pair[i] == word) for word in words) == 1
    held = [held_out_combination(a, b) for a, b in combinations(every, 2)]
    assert 0.08 < np.mean(held) < 0.13
    assert held == [held_out_combination(b, a) for a, b in combinations(every, 2)]
    assert held_out_combination(("red", "circle"), ("red", "triangle"))  # the same in every process


def test_counts_come_in_their_shares():
    counts = [len(scene.things) for scene in scenes(4000, split="any")]
    assert np.allclose([counts.count(n) / 4000 for n in (1, 2, 3)], (0.35, 0.4, 0.25), atol=0.03)


def test_held_out_pairs_never_carry_a_caption(tmp_path):
    rng = random.Random(0)
    drawn = [training_scene(rng) for _ in range(4000)]
    assert all(captioned != any(held_out_pair(*pair) for pair in pairs(scene)) for scene, captioned in drawn)
    assert 0.03 < np.mean([not captioned for _, captioned in drawn]) < 0.05

    write_folder(tmp_path / "world", 100, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "world" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == sorted(p.name for p in (tmp_path / "world").glob("*.png"))
    assert Image.open(tmp_path / "world" / lines[0]["file_name"]).size == (96, 96)
    told = [parse(line["text"]) for line in lines if line["text"]]
    assert 85 <= len(told) < 100
    assert all(split_of([(t.colour, t.shape) for t in claim.things]) == "train" for claim in told)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("count", (1, 2, 3))
def test_parse_inverts_every_caption(monkeypatch, language, count):
    rng = random.Random(count)
    for template in world.TEMPLATES[language][count]:
        for ground in world.GROUNDS[language]:
            monkeypatch.setattr(world, "TEMPLATES", {language: {count: (template,)}})
            monkeypatch.setattr(world, "GROUNDS", {language: (ground,)})
            for scene in scenes(30, seed=count, split="any", count=count):
                full = claim_of(scene)
                text = caption(scene, rng, language, "fine")
                assert parse(text) == full, text
                text = caption(scene, rng, language, "coarse")
                told = parse(text)
                assert told.relations == full.relations and told.background in (None, full.background), text
                for some, thing in zip(told.things, full.things, strict=True):
                    assert (some.colour, some.shape) == (thing.colour, thing.shape), text
                    assert some.texture in (None, thing.texture) and some.size in (None, thing.size), text


def test_the_plain_captions_are_among_the_templates():
    scene = Scene((Thing("red", "circle", "solid", "large", 0, 1), Thing("blue", "square", "dotted", "small", 4, 1)),
                  "white", ("above",))
    rng = random.Random(0)
    said = {caption(scene, rng, language, "coarse") for language in LANGUAGES for _ in range(2000)}
    assert {"a red circle above a blue square", "a blue square below a red circle", "蓝色方形上方的红色圆形",
            "一个红色圆形在一个蓝色方形的上方", "a large solid red circle above a blue square"} <= said
    assert len(said) > 500


def test_either_thing_comes_first_in_a_caption():
    rng = random.Random(0)
    for language in LANGUAGES:
        first = 0
        for scene in scenes(600, split="any", count=2):
            text = caption(scene, rng, language, "coarse")
            a, b = (f"{t.colour} {t.shape}" if language == "en" else world.CHINESE[t.colour] + world.CHINESE[t.shape]
                    for t in scene.things)
            first += text.index(a) < text.index(b)
        assert 0.4 < first / 600 < 0.6


def test_articles_and_lengths_of_english_captions():
    rng = random.Random(0)
    for scene in scenes(2000):
        words = caption(scene, rng, "en", "fine").replace(",", "").replace(".", "").split()
        assert len(words) <= 40
        assert all((after[0] in "aeio") == (article == "an") for article, after in zip(words, words[1:])
                   if article in ("a", "an"))
        coarse = caption(scene, rng, "en", "coarse")
        assert " a orange" not in f" {coarse}"


def test_parse_reads_what_people_type():
    claim = Claim((ThingClaim("blue", "square"), ThingClaim("red", "circle")), ((0, "below", 1),), None)
    for text in ("a red circle above a blue square", "  A RED circle,   above a Blue Square! ", "red circle over blue square",
                 "蓝色方形上方的红色圆形", "红色圆形，在蓝色的正方形的上方。", "红色圆形 在 蓝色方形 上面", "a red circle above 蓝色方形",
                 "The red circle is above the blue square. The blue square is below the red circle."):
        assert parse(text) == claim, text
    assert parse("a big red star, beige background") == Claim(
        (ThingClaim("red", "star", None, "large"),), (), "beige")


@pytest.mark.parametrize("text, why", [
    ("a red dog", "unknown word 'dog'"), ("", "0 things found"), ("a circle", "has no colour"),
    ("a red", "is said of no thing"), ("a red green circle", "both red and green"), ("红色圆形在左边", "needs two things"),
    ("a red circle above", "lacks its second thing"), ("a red circle above a red circle", "needs two things"),
    ("a red circle on a red background", "is said of no thing"), ("a large red circle. the small red circle", "both"),
    ("a red circle above left of a blue star", "needs two things"),
    ("a red star, a red cross, a red circle, a red square", "4 things found")])
def test_parse_refuses_with_one_clear_line(text, why):
    with pytest.raises(ValueError, match=why) as error:
        parse(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


def test_wrong_requests_are_refused():
    rng = random.Random(0)
    for call in (lambda: sample_scene(rng, "test"), lambda: sample_scene(rng, count=4), lambda: sample_scene(rng, rows=2),
                 lambda: sample_scene(rng, "held_out_combination", count=1),
                 lambda: caption(sample_scene(rng), rng, "de", "fine")):
        with pytest.raises(ValueError, match="expected|too few"):
            call()


@pytest.mark.parametrize("cell, distinct", [(16, 2160), (32, 5435)])
def test_the_world_has_as_many_distinct_cells_as_the_readme_says(cell, distinct):
    """Of 16 x 16 pixels, beside the three plain backgrounds; the large pictures of Stage III have 32 pixels a cell."""
    found = set()
    for look in product(COLOURS, SHAPES, TEXTURES, SIZES, BACKGROUNDS):
        drawn = np.asarray(sprite(*look, cell))
        places = range(0, len(drawn), 16)
        found |= {drawn[y:y + 16, x:x + 16].tobytes() for y in places for x in places}
    assert len(found) == distinct
