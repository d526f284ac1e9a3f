"""Recipes: steps that say all of their pictures, titles that settle the steps, reading what a model wrote."""
import random
from dataclasses import replace

import numpy as np
import pytest

import recipes
import world
from checker import check
from recipes import agrees, claims, markdown, parse_steps, sample, text_of
from world import COLOURS, LANGUAGES, SPLITS, claim_of, render, split_of

ENGLISH = ("draw a large striped red circle on a white background.",
           "draw a small solid blue square below the red circle.")
CHINESE = ("画一个大号条纹的红色圆形，背景是白色。", "在红色圆形的下方画一个小号纯色的蓝色方形。")


def samples(n, seed=0, language=None):
    rng = random.Random(seed)
    return [sample(rng, SPLITS[i % len(SPLITS)], language or LANGUAGES[i % 2]) for i in range(n)]


def test_every_picture_shows_what_its_steps_say_and_adds_one_thing_to_the_one_before():
    for i, recipe in enumerate(samples(300)):
        told = claims(recipe.steps)
        assert told == tuple(claim_of(scene) for scene in recipe.scenes)
        pictures = [render(scene) for scene in recipe.scenes]
        assert len(pictures) == len(recipe.steps) in (2, 3) and all(picture.size == (96, 96) for picture in pictures)
        assert i >= 100 or all(check(picture, claim)["all"] for picture, claim in zip(pictures, told)), recipe
        for k, (before, after) in enumerate(zip(pictures, pictures[1:]), 1):
            new = recipe.scenes[k].things[k]
            changed = np.argwhere((np.asarray(before) != np.asarray(after)).any(2)) // 16 - (new.row, new.col)
            assert len(changed) and changed.min() >= 0 and changed.max() < new.cells, recipe


def test_a_wrong_picture_fails_its_steps():
    for recipe in samples(10, seed=1):
        told = claims(recipe.steps)
        for k, scene in enumerate(recipe.scenes):
            thing = scene.things[-1]
            wrong = [replace(scene, background="black" if scene.background == "white" else "white")]
            for change in ({"colour": next(c for c in COLOURS if c != thing.colour)},
                           {"shape": "star" if thing.shape != "star" else "cross"},
                           {"texture": "solid" if thing.texture != "solid" else "dotted"}):
                wrong.append(replace(scene, things=(*scene.things[:-1], replace(thing, **change))))
            wrong += [other for other in recipe.scenes if other != scene]
            assert not any(check(render(other), told[k])["all"] for other in wrong), recipe


def test_steps_keep_the_splits_promise():
    rng = random.Random(0)
    for split in ("train", "held_out_pair", "held_out_combination"):
        for _ in range(50):
            recipe = sample(rng, split)
            pairs = [(thing.colour, thing.shape) for thing in claims(recipe.steps)[-1].things]
            assert split_of(pairs) == split and agrees(recipe.title, recipe.steps)  # so the title names no others


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("count", (2, 3))
def test_every_title_agrees_with_its_steps_and_names_things_in_their_order(monkeypatch, language, count):
    every = recipes.TITLES[language]
    for template in every[count]:
        monkeypatch.setattr(recipes, "TITLES", {language: {**every, count: (template,)}})
        for recipe in [r for r in samples(60, seed=count, language=language) if len(r.steps) == count]:
            assert agrees(recipe.title, recipe.steps), recipe
            names = [f"{t.colour} {t.shape}" if language == "en" else world.CHINESE[t.colour] + world.CHINESE[t.shape]
                     for t in recipe.scenes[-1].things]
            places = [recipe.title.index(name) for name in names]
            assert places == sorted(places), recipe


def test_a_title_disagrees_with_steps_that_lead_elsewhere():
    for steps in (ENGLISH, CHINESE):
        for title in ("how to draw a red circle above a blue square", "怎样画蓝色方形上方的红色圆形",
                      "HOW TO DRAW a red circle and a blue square",
                      "a large red circle and a solid blue square on a white background"):
            assert agrees(title, steps), title
        for title in ("a green circle above a blue square", "a red star above a blue square", "a blue square",
                      "a red circle below a blue square", "a red circle left of a blue square",
                      "a small red circle above a blue square", "a dotted red circle above a blue square",
                      "a red circle above a blue square on a black background", "怎样画蓝色方形下方的红色圆形",
                      "a red circle above a blue square, which is above a pink star"):
            assert not agrees(title, steps), title
    with pytest.raises(ValueError, match="^title 'how to draw a dog': unknown word 'dog'$"):
        agrees("how to draw a dog", ENGLISH)


def test_parse_steps_reads_back_what_text_of_writes():
    for recipe in samples(200, seed=2):
        assert parse_steps(text_of(recipe)) == recipe.steps
        assert parse_steps("\n".join(text_of(recipe).split(" ")) + "\n") == recipe.steps
    assert parse_steps(f"1. {ENGLISH[0]} 2. {ENGLISH[1]}") == ENGLISH
    assert parse_steps(f"1、{CHINESE[0]}2、{CHINESE[1]}") == CHINESE
    assert claims(ENGLISH) == claims(CHINESE)


@pytest.mark.parametrize("text", ["", "draw a red circle.", "first: 1. draw", "1. ", "2. draw", "1. draw 3. draw",
                                  "1. draw 2. ", "2. draw 1. draw", "1. a 2. b 3. c 4. d", "1、画1、画", "1 draw 2 draw"])
def test_a_text_that_is_no_numbered_list_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="expected one to three, numbered") as error:
        parse_steps(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize("steps, why", [
    ((), "0 steps"), (ENGLISH * 2, "4 steps"),
    (("a large striped red circle on a white background.",), "step 1.*one sentence"),
    (("draw a large striped red dog on a white background.",), "step 1.*unknown word 'dog'"),
    (("draw a large striped red circle.",), "step 1.*the background"),
    (("draw a large red circle on a white background.",), "step 1.*size and texture"),
    (("画一个大号红色圆形，背景是白色。",), "step 1.*size and texture"),
    (("draw a large solid red circle above a small solid blue square on a white background.",), "step 1.*one new"),
    ((ENGLISH[0], "draw a small solid blue square."), "step 2.*one new thing, and where"),
    ((ENGLISH[0], "draw a small blue square below the red circle."), "step 2.*size and texture"),
    ((ENGLISH[0], "draw a small solid blue square below the red star."), "step 2.*one new"),
    ((ENGLISH[0], ENGLISH[0]), "step 2.*one new"),
    ((ENGLISH[0], "draw a small solid blue square below."), "step 2.*lacks its second thing"),
    ((ENGLISH[0], "draw a small solid blue square below the dotted red circle."), "step 2.*both dotted and striped"),
    ((*ENGLISH, "draw a small solid pink star. the red circle is left of the blue square."), "step 3.*one new"),
    ((*ENGLISH, "draw a small solid pink star left of the red circle and above the blue square."), "step 3.*one new"),
    ((CHINESE[0], "在红色圆形的下方画一个小号纯色的蓝色方形，背景是黑色。"), "step 2.*two backgrounds")])
def test_a_step_that_does_not_say_what_to_add_is_refused_in_one_line(steps, why):
    with pytest.raises(ValueError, match=why) as error:
        claims(steps)
    assert "\n" not in str(error.value)


def test_the_page_shows_every_step_above_its_picture():
    page = markdown("how to draw\n a red circle", ENGLISH, ["my red-1.png", "红-2.png"])
    assert page == (f"# how to draw a red circle\n\n1. {ENGLISH[0]}\n\n   ![step 1](my%20red-1.png)\n\n"
                    f"2. {ENGLISH[1]}\n\n   ![step 2](%E7%BA%A2-2.png)\n")
    with pytest.raises(ValueError, match="1 pictures for 2 steps"):
        markdown("a red circle", ENGLISH, ["1.png"])


def test_wrong_requests_are_refused():
    for wrong in ({"split": "test"}, {"language": "de"}, {"language": ""}):
        with pytest.raises(ValueError, match="expected one of"):
            sample(random.Random(0), **wrong)
