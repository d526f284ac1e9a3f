"""Claims about the report."""
import random

import pytest

import corpus
import world
from evaluate import accuracy, counted, interval, questions


def test_interval_is_wilsons():
    assert interval(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert interval(0, 10)[0] == pytest.approx(0, abs=1e-9) and interval(10, 10)[1] == pytest.approx(1)
    assert counted({"what": "all"}, [True, False, True, True])["share"] == 0.75


def test_questions_are_half_chinese_and_of_their_split():
    for split in ("train", "held_out_pair", "held_out_combination"):
        asked = questions(split, 40, seed=3)
        assert sum(language == "zh" for _, _, language in asked) == 20
        for scene, text, language in asked:
            pairs = [(t.colour, t.shape) for t in scene.things]
            assert world.split_of(pairs) == split
            assert world.holds(world.parse(text), world.claim_of(scene))
    assert questions("train", 5, seed=3) == questions("train", 5, seed=3) != questions("train", 5, seed=4)


def test_true_renders_are_all_right_and_renders_of_other_scenes_are_not():
    asked = questions("train", 100, seed=0)
    images, texts = [world.render(scene) for scene, _, _ in asked], [text for _, text, _ in asked]
    assert set(accuracy(images, texts).values()) == {1.0}
    assert accuracy(images[1:] + images[:1], texts)["all"] < 0.05


def test_a_caption_that_errs_in_one_word_or_leaves_a_thing_out_is_not_exact():
    scene = world.Scene((world.Thing("red", "circle", "solid", "small", 0, 0),
                         world.Thing("blue", "square", "dotted", "large", 4, 0)), "white", ("above",))
    fact = world.claim_of(scene)
    assert world.holds(world.parse("a red circle above a blue square"), fact)
    assert world.holds(world.parse("a large dotted blue square below a red circle on a white background"), fact)
    for wrong in ("a red circle below a blue square", "a red circle", "a red star above a blue square",
                  "a large red circle above a blue square", "a red circle above a blue square on a black background"):
        assert not world.holds(world.parse(wrong), fact)


def test_every_question_of_the_corpus_is_answered_by_its_caption():
    """The reading order follows from the relations alone: nothing is asked that the caption does not say."""
    rng = random.Random(0)
    for _ in range(300):
        scene = world.sample_scene(rng, "any")
        question = corpus.ask(scene, rng, "en")
        claim = world.claim_of(scene)
        if question.kind == "background":
            assert question.answer == claim.background
        if question.kind == "count":
            assert question.answer == ("one", "two", "three")[len(claim.things) - 1]
        if question.kind == "order":
            ordered = world.reading_order(scene.things)
            for a, b in zip(ordered, ordered[1:]):
                i, j = scene.things.index(a), scene.things.index(b)
                if abs(i - j) == 1:
                    relation = scene.relations[min(i, j)] if i < j else world.INVERSE[scene.relations[min(i, j)]]
                    assert relation in ("left", "above")
