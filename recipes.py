"""Sec. 4.6 and Fig. 9, in the rendered world: from a title to numbered steps and a picture for each of them.

The paper fine-tunes MARS on 10,000 cooking recipes: given a title, the model writes the steps, then one
<multi_images> block with their pictures. Our recipes tell how to draw a scene thing by thing, so that checker.py can
tell whether every picture adds to the one before just what its step says:

    how to draw a red circle above a blue square
    1. draw a large striped red circle on a white background. 2. draw a small solid blue square below the red circle.
"""
import random
import re
from dataclasses import dataclass, replace
from urllib.parse import quote

from world import GROUNDS, INVERSE, LANGUAGES, RELATIONS, Claim, Scene, holds, parse, phrase, sample_scene

OPENINGS = {"en": ("how to draw ", "steps to draw "), "zh": ("怎样画", "如何画")}
# As in world.TEMPLATES. A title names X, Y and Z in the order in which they are drawn, so that it settles the steps.
TITLES = {
    "en": {2: ("{X} {p} {Y}", "{X} with {Y} {i} it", "{X} and {Y}, {x} is {p} {y}"),
           3: ("{X} {p} {Y}, which is {q} {Z}", "{X} {p} {Y}, with {y} {q} {Z}", "{X} {p} {Y}, and {Z} {j} {y}")},
    "zh": {2: ("{X}{i}的{Y}", "一个{X}在一个{Y}的{p}", "一个{X}和一个{Y}，{x}在{y}的{p}"),
           3: ("{X}{i}的{Y}，{y}的{j}有一个{Z}", "一个{X}在一个{Y}的{p}，{y}在一个{Z}的{q}",
               "一个{X}、一个{Y}和一个{Z}，{x}在{y}的{p}，{y}在{z}的{q}")}}
STEPS = {"en": ("draw {X} on a {g} background.", "draw {X} {r} {w}."),  # the first, and all others: X goes beside w
         "zh": ("画一个{X}，背景是{g}。", "在{w}的{r}画一个{X}。")}


@dataclass(frozen=True)
class DrawingRecipe:
    """Fig. 9: what a model gets, the title, and what it has to give, a step and a picture for each thing."""
    title: str
    steps: tuple[str, ...]       # sentences without their numbers
    scenes: tuple[Scene, ...]    # scenes[k] holds the first k + 1 things
    language: str                # of the title and the steps: 'en' or 'zh'


# ----------------------------------------------------------------------------- writing

def sample(rng: random.Random, split: str = "train", language: str | None = None) -> DrawingRecipe:
    """Not in the paper, which has 10,000 recipes of its own: a random one, of two or three things of a split.

    The title says colours, shapes and relations, the rest as often as a coarse caption does; the steps say everything,
    in one wording. language None: either. Raises ValueError for a split or a language that there is not.
    """
    language = rng.choice(LANGUAGES) if language is None else language
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}: expected one of {LANGUAGES}")
    scene = sample_scene(rng, split, rng.choice((2, 3)))
    counts = range(1, len(scene.things) + 1)
    scenes = tuple(replace(scene, things=scene.things[:n], relations=scene.relations[:n - 1]) for n in counts)
    return DrawingRecipe(_title(scene, rng, language), tuple(_step(s, language) for s in scenes), scenes, language)


def _title(scene, rng, language):
    """One of many titles of a scene."""
    words = {}
    for name, thing in zip("XYZ", scene.things):
        said = [word for word in (thing.size, thing.texture) if rng.random() < 0.3]
        words[name] = phrase([*said, thing.colour, thing.shape], language, "a")
        words[name.lower()] = phrase([thing.colour, thing.shape], language, "the")
    for (name, other), relation in zip(("pi", "qj"), scene.relations):  # i and j: the same, told from the other side
        words[name] = rng.choice(RELATIONS[language][relation])
        words[other] = rng.choice(RELATIONS[language][INVERSE[relation]])
    text = rng.choice(TITLES[language][len(scene.things)]).format(**words)
    if rng.random() < 0.1:
        text = GROUNDS[language][0].format(text, g=phrase([scene.background], language))
    return rng.choice(OPENINGS[language]) + text


def _step(scene, language):
    """The step that draws the last thing of a scene."""
    thing = scene.things[-1]
    words = {"X": phrase([thing.size, thing.texture, thing.colour, thing.shape], language, "a"),
             "g": phrase([scene.background], language)}
    if scene.relations:
        before = scene.things[-2]
        words["w"] = phrase([before.colour, before.shape], language, "the")
        words["r"] = RELATIONS[language][INVERSE[scene.relations[-1]]][0]
    return STEPS[language][len(scene.things) > 1].format(**words)


def text_of(recipe: DrawingRecipe) -> str:
    """Fig. 9: what the model has to write after the title, before the pictures: '1. draw ... 2. draw ...'."""
    mark, gap = {"en": (". ", " "), "zh": ("、", "")}[recipe.language]
    return gap.join(f"{k}{mark}{step}" for k, step in enumerate(recipe.steps, 1))


# ----------------------------------------------------------------------------- reading

def parse_steps(text: str) -> tuple[str, ...]:
    """Fig. 9: what a model wrote -> its steps, each of which gets a picture; turns `text_of` round.

    Raises ValueError, one line, where it is not a list numbered 1., 2., ... (or 1、2、...) of one to three steps.
    """
    before, *parts = re.split(r"(\d+)[.、]", text.strip())
    numbers, steps = [int(n) for n in parts[::2]], tuple(" ".join(step.split()) for step in parts[1::2])
    if before or not all(steps) or numbers not in ([1], [1, 2], [1, 2, 3]):
        raise ValueError(f'steps {text!r}: expected one to three, numbered "1. draw a ... 2. draw a ..."')
    return steps


def claims(steps: tuple[str, ...]) -> tuple[Claim, ...]:
    """Not in the paper, which shows its pictures only: what the picture of each step has to show, in either language.

    That is all that the steps so far say. Raises ValueError, one line, for a step that cannot be read, or does not add
    just one thing, of stated size, texture, colour and shape, beside one that is there; the first says the background.
    """
    if not 1 <= len(steps) <= 3:
        raise ValueError(f"{len(steps)} steps: expected one to three")
    found, told, known = [], "", set()
    for k, step in enumerate(steps, 1):
        what = f"step {k}, {step!r}"
        sentence, verbs = re.subn(r"\bdraw\b|画", "", step, flags=re.IGNORECASE)
        if verbs != 1:
            raise ValueError(f"{what}: expected one sentence such as 'draw a large solid red circle ...'")
        told += sentence + ". "
        claim = _read(told, what)
        new = [i for i, thing in enumerate(claim.things) if (thing.colour, thing.shape) not in known]
        linked = k == 1 or any(i in new or j in new for i, _, j in claim.relations)
        if len(new) != 1 or not linked or len(claim.relations) != k - 1:
            raise ValueError(f"{what}: expected one new thing, and where it is from one that was drawn before")
        if claim.background is None or any(None in (thing.texture, thing.size) for thing in claim.things):
            raise ValueError(f"{what}: expected size and texture of the thing, and in step 1 the background")
        known = {(thing.colour, thing.shape) for thing in claim.things}
        found.append(claim)
    return tuple(found)


def agrees(title: str, steps: tuple[str, ...]) -> bool:
    """Not in the paper: whether the steps lead to what the title asks for, and to nothing else.

    The title may be one of ours or any caption that world.py reads. What it leaves open the steps may choose. Raises
    ValueError, one line, where the title or a step cannot be read.
    """
    asked, done = " ".join(title.lower().split()), claims(steps)[-1]
    for opening in (*OPENINGS["en"], *OPENINGS["zh"]):
        asked = asked.removeprefix(opening)
    return holds(_read(asked, f"title {title!r}"), done)


def _read(text, what):
    """world.parse, whose errors then speak of `what`."""
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f'{what}: {str(error).removeprefix(f"caption {text!r}: ")}') from None


def markdown(title: str, steps: tuple[str, ...], names: list[str]) -> str:
    """Fig. 9, as a page: the title, then each step above its picture, whose file name `names` gives.

    Raises ValueError where there are not as many names as steps.
    """
    if len(names) != len(steps):
        raise ValueError(f"{len(names)} pictures for {len(steps)} steps; expected one for each")
    parts = [f"{k}. {step}\n\n   ![step {k}]({quote(name)})\n" for k, (step, name) in enumerate(zip(steps, names), 1)]
    return "\n".join([f'# {" ".join(title.split())}\n', *parts])
