"""Claims about text and images in one output (Sec. 4.6, Fig. 9): layout, what trains, drawing, the way from a title."""
import dataclasses
import json
import random

import pytest
import torch
from PIL import Image

import generate
import recipes
import stages
import train
import world
from data import RecipePictures, collate, joint, title_text
from evaluate import SPLITS, judge_recipe, recipe_accuracy, recipes_report
from generate import Painter, Sampling, may_follow, save_recipe, write_mixed
from mars import MARS, is_visual
from test_train import refused, run, small_preset
from tokenizer import Vocabulary
from train import PRESETS, Recipe

GREEDY = Sampling(cfg=1.0, temperature=0.0, top_k=0, top_p=1.0)
WILD = Sampling(cfg=1.0, temperature=5.0, top_k=0, top_p=1.0)
TITLES = [[3, 41, 7], [5, 6, 7, 8, 9, 10], [2]]


@pytest.fixture(autouse=True)
def preset_test(monkeypatch):
    """`--preset test`, with a recipe for this stage."""
    preset, recipe = small_preset(), Recipe(4, 4, 1e-3)
    preset = dataclasses.replace(preset, recipes={**preset.recipes, "joint": recipe})
    monkeypatch.setitem(PRESETS, "test", preset)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """What a few steps of all stages up to Stage I wrote."""
    out = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "test", small_preset())
        run("all", "--preset", "test", "--out", out, "--steps", 2)
    return out / "stage1"


# ----------------------------------------------------------------------------- the layout

def test_a_recipe_is_its_title_its_steps_and_one_block_of_pictures():
    v = Vocabulary(text=42, codes=16)
    start, end, opening, closing = (v.special(t) for t in ("<img>", "</img>", "<multi_images>", "</multi_images>"))
    sequence = joint([3, 4], [5, 6, 7], [torch.tensor([[0, 1]]), torch.tensor([[2, 15]])], v, eos=1)
    assert sequence.tokens == [3, 4, 5, 6, 7, opening, start, 42, 43, end, start, 44, 57, end, closing, 1]
    assert sequence.is_target == [False] * 2 + [True] * 14                       # all after the title
    assert title_text(" how to  draw\na star ") == "how to draw a star\n"


def test_every_picture_of_a_recipe_is_found_under_its_step():
    source = RecipePictures(20, seed=0)
    assert len(source) == sum(len(recipe.steps) for recipe in source.recipes)
    for j, recipe in enumerate(source.recipes):
        assert [source.captions(i) for i in source.of(j)] == [[step] for step in recipe.steps]
        assert [source.image(i).tobytes() for i in source.of(j)] == [world.render(s).tobytes() for s in recipe.scenes]
    assert RecipePictures(5, seed=0).recipes == source.recipes[:5] != RecipePictures(5, seed=1).recipes


# ----------------------------------------------------------------------------- what trains

def test_with_the_language_side_frozen_the_text_cannot_change_and_in_this_stage_all_trains(tmp_path, stage1):
    """The reason why the language side trains, by causality; and that it does."""
    before, text = MARS.from_pretrained(stage1), torch.arange(20)[None]
    assert any(is_visual(name) for name in before.state_dict())
    moved = MARS.from_pretrained(stage1)
    moved.freeze_language()
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    text_logits = lambda model: model(text)[..., :model.vocabulary.text]
    assert torch.equal(text_logits(moved), text_logits(before))                  # bit for bit those of Stage I
    run("joint", "--preset", "test", "--init", stage1, "--out", tmp_path)
    after, start = MARS.from_pretrained(tmp_path).state_dict(), before.state_dict()
    assert [name for name in after if torch.equal(after[name], start[name])] == []
    assert not torch.equal(text_logits(MARS.from_pretrained(tmp_path)), text_logits(before))


def test_the_memory_forecast_knows_that_all_trains():
    config = train.SIZES["qwen-7b"]
    with pytest.raises(ValueError, match=r"DDP on 8 GPUs of 120 GB takes 219.6 GB"):
        stages.check_memory(config, 8, 120 * 10 ** 9, shard=False, trains_language=True)


# ----------------------------------------------------------------------------- drawing

def test_whatever_the_weights_only_what_the_layout_allows_is_drawn(mars):
    """Random weights, nearly uniform draws: all endings come up, and every one is a whole text with whole pictures."""
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        found += write_mixed(mars, TITLES * 20, 1, 2, 2, WILD, generator, most=2, max_text=8)
    for text, codes in found:
        assert len(text) <= 8 and all(0 <= id < mars.vocabulary.text and id != 1 for id in text)
        assert codes.shape[1:] == (2, 2) and len(codes) <= 2
        assert all(0 <= code < mars.vocabulary.codes for code in codes.flatten())
    assert {len(codes) for _, codes in found} == {0, 1, 2} and max(len(text) for text, _ in found) == 8


def test_every_training_sequence_is_one_that_the_grammar_allows():
    v, rng = Vocabulary(text=42, codes=16), random.Random(0)
    for n in (1, 2, 3):
        pictures = [torch.tensor([[rng.randrange(16) for _ in range(3)]]) for _ in range(n)]
        written = joint([], [5, 6, 7], pictures, v, eos=1).tokens
        for t, id in enumerate(written):
            assert any(id in ids for ids in may_follow(written[:t], v, 1, 3, 3, 8)), (t, id)
    last = written.index(v.special("</multi_images>"))
    assert may_follow(written[:last], v, 1, 3, 3, 8) == [range(written[last], written[last] + 1)]       # no fourth
    opening = v.special("<multi_images>")
    assert may_follow([5] * 8, v, 1, 3, 3, 8) == [range(1, 2), range(opening, opening + 1)]             # text is full


@torch.no_grad()
def test_cached_mixed_drawing_equals_drawing_with_the_whole_sequence_each_time_alone_and_in_a_batch(mars):
    v, eos = mars.vocabulary, 1
    closing = v.special("</multi_images>")
    mars.text_head.weight[eos] = -mars.norm.weight                                # rarely the end before pictures
    together, found = write_mixed(mars, TITLES, eos, 2, 2, GREEDY, most=2, max_text=8), []
    for title, (text, codes) in zip(TITLES, together):
        written = []
        while not written or written[-1] not in (eos, closing):
            logits = mars(torch.tensor([[*title, *written]]))[0, -1]
            allowed = [id for ids in may_follow(written, v, eos, 4, 2, 8) for id in ids]
            written.append(max(allowed, key=lambda id: logits[id].item()))
        assert written == (joint([], text, codes, v, eos).tokens[:-1] if len(codes) else [*text, eos])
        (alone_text, alone_codes), = write_mixed(mars, [title], eos, 2, 2, GREEDY, most=2, max_text=8)
        assert text == alone_text and torch.equal(codes, alone_codes)
        found.append((len(text), len(codes)))
    assert len(set(found)) > 1 and max(found)[1] > 0, found                       # rows end at unlike times


def test_four_recipes_are_over_fitted_until_their_titles_give_them_back_exactly(stage1):
    painter = Painter.from_pretrained(stage1)
    model, tokenizer, v = painter.model, painter.tokenizer, painter.model.vocabulary
    source = [recipes.sample(random.Random(j)) for j in range(4)]
    codes = [painter.vqgan.encode(torch.stack([generate.to_pixels(world.render(s)) for s in recipe.scenes]))
             for recipe in source]
    tokens, is_target = collate([joint(tokenizer.encode(title_text(r.title)), tokenizer.encode(recipes.text_of(r)), c, v,
                                       tokenizer.eos) for r, c in zip(source, codes)], v.special("<pad>"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model.loss(tokens, is_target)
        loss.backward()
        optimizer.step()
    prompts = [tokenizer.encode(title_text(recipe.title)) for recipe in source]
    drawn = write_mixed(model, prompts, tokenizer.eos, 6, 6, GREEDY)
    assert [tokenizer.decode(ids).strip() for ids, _ in drawn] == [recipes.text_of(recipe) for recipe in source]
    assert all(torch.equal(found, true) for (_, found), true in zip(drawn, codes))


# ----------------------------------------------------------------------------- the whole path

def test_a_title_becomes_a_page_with_a_picture_under_each_step(tmp_path, stage1, capsys):
    """A few steps of the stage write weights that the command draws from; no such weights write whole steps yet."""
    run("joint", "--preset", "test", "--init", stage1, "--out", tmp_path / "joint", "--sample-every", 2)
    logs = [json.loads(line) for line in (tmp_path / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert set(logs[1]) >= {"steps", "number", "picture", "title", "all"} and "all" not in logs[0]
    assert (tmp_path / "joint" / "samples" / "000004" / "1.md").is_file()
    out = tmp_path / "pages" / "a page.md"
    generate.main(["--recipe", "how to draw a red star", "--weights", str(tmp_path / "joint"), "--temperature", "5",
                   "--top-k", "0", "--top-p", "1", "-o", str(out)])
    pictures = sorted(out.parent.glob("a page-*.png"))
    assert all(Image.open(path).size == (96, 96) for path in pictures)
    page = out.read_text()
    assert page.startswith("# how to draw a red star\n") and page.count("](a%20page-") == len(pictures)
    assert "the model did not write a step for each picture" in capsys.readouterr().err
    assert not list(out.parent.glob("*.tmp"))


def test_a_page_has_each_step_above_its_picture_or_the_text_as_it_is(tmp_path):
    recipe = recipes.sample(random.Random(0), language="en")
    images = [world.render(scene) for scene in recipe.scenes]
    assert save_recipe(tmp_path / "page.md", recipe.title, recipes.text_of(recipe), images) is None
    names = [f"page-{k}.png" for k in range(1, len(images) + 1)]
    assert (tmp_path / "page.md").read_text() == recipes.markdown(recipe.title, recipe.steps, names)
    assert all(Image.open(tmp_path / name).tobytes() == image.tobytes() for name, image in zip(names, images))
    note = save_recipe(tmp_path / "other.md", "a  star", recipes.text_of(recipe), images[:1])
    assert "1 pictures for" in note
    text = recipes.text_of(recipe)
    assert (tmp_path / "other.md").read_text() == f"# a star\n\n{text}\n\n![picture 1](other-1.png)\n"
    assert "expected one to three" in save_recipe(tmp_path / "none.md", "a star", "draw", [])
    assert (tmp_path / "none.md").read_text() == "# a star\n\ndraw\n"


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_a_recipe_is_judged_by_its_steps_their_pictures_and_its_title(language):
    recipe = recipes.sample(random.Random(1), language=language)
    text, images = recipes.text_of(recipe), [world.render(scene) for scene in recipe.scenes]
    n, all_right = len(images), judge_recipe(recipe.title, text, images)
    assert all_right == {"steps": [True], "number": [True], "picture": [True] * n, "title": [True], "all": [True]}
    found = judge_recipe(recipe.title, text, images[::-1])                       # each picture against its own step
    assert sum(found["picture"]) == n % 2 and found["all"] == [False] and found["title"] == [True]
    found = judge_recipe(recipe.title, text, images[:-1])
    assert found["number"] == [False] and found["picture"] == [True] * (n - 1) + [False]
    other = recipes.sample(random.Random(2), language=language)
    found = judge_recipe(other.title, text, images)
    assert found["title"] == found["all"] == [False] and all(found["picture"])
    nothing = judge_recipe(recipe.title, "1. draw", images)
    assert not any(mark for marks in nothing.values() for mark in marks) and len(nothing["picture"]) == n
    assert recipe_accuracy([all_right, nothing]) == dict.fromkeys(nothing, 0.5)


def test_the_report_counts_each_split_and_language():
    class Perfect:
        """Draws what the title's own recipe says."""
        def draw_recipes(self, titles, sampling, seed):
            split = list(SPLITS.values())[self.calls]
            self.calls += 1
            rng = random.Random(f"3/recipes/{split}")
            asked = [recipes.sample(rng, split, world.LANGUAGES[i % 2]) for i in range(len(titles))]
            assert [recipe.title for recipe in asked] == titles
            return [(recipes.text_of(r), [world.render(s) for s in r.scenes]) for r in asked]
    painter = Perfect()
    painter.calls = 0
    rows = recipes_report(painter, 4, 3, GREEDY)
    assert len(rows) == 3 * 3 * 5 and all(row["share"] == 1 and row["task"] == "recipes" for row in rows)
    assert {row["n"] for row in rows if row["what"] == "all"} == {2, 4}


# ----------------------------------------------------------------------------- bad input: one line, exit code 2

def test_bad_titles_paths_and_data_are_refused_in_one_line(tmp_path, stage1, capsys):
    weights = ["--weights", stage1]
    assert "the title is empty" in refused(generate.main, ["--recipe", " ", *weights], capsys)
    assert "at most" in refused(generate.main, ["--recipe", "star " * 400, *weights], capsys)
    (tmp_path / "file").write_text("")
    message = refused(generate.main, ["--recipe", "a star", *weights, "-o", tmp_path / "file" / "out.md"], capsys)
    assert message.startswith("generate.py: ") and "cannot write" in message
    (tmp_path / "folder.md").mkdir()
    message = refused(generate.main, ["--recipe", "a star", *weights, "-o", tmp_path / "folder.md"], capsys)
    assert "folder.md: cannot write the page" in message
    message = refused(generate.main, ["--recipe", "a star", *weights, "-o", "x.png"], capsys)
    assert "'x.png', but --recipe writes Markdown" in message
    assert "one of them" in refused(generate.main, ["a star", "--recipe", "a star"], capsys)
    small = ["joint", "--preset", "test", "--out", tmp_path / "new"]
    message = refused(train.main, [*small, "--init", stage1, "--data", tmp_path], capsys)
    assert "but recipes are written of the rendered world alone" in message
    message = refused(train.main, [*small, "--init", stage1.parent / "text"], capsys)
    assert "a language model alone" in message
