"""Not in the paper: a bilingual text for the small language model that stands in for Qwen.

Qwen has read trillions of tokens before MARS ever sees it. This text gives a tiny model what matters of that
here: captions of the rendered world, what follows from them (questions and answers, translations, the order in
which one would read the things off the picture), and some plain sentences that have nothing to do with pictures.
All colour-shape pairs occur: the language model knows every word and phrase that Stage I may hold out.
"""
import random
from dataclasses import dataclass

from world import (BACKGROUNDS, CHINESE, COLOURS, DETAILS, LANGUAGES, SHAPES, SIZES, TEXTURES, Scene, caption,
                   phrase, reading_order, sample_scene)

NUMBERS = {"en": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
           "zh": ("一", "二", "三", "四", "五", "六", "七", "八", "九", "十")}
NATURE = (("the sky is blue", "天空是蓝色"), ("grass is green", "草是绿色"), ("blood is red", "血是红色"),
          ("the sun is yellow", "太阳是黄色"), ("snow is white", "雪是白色"), ("coal is black", "煤是黑色"),
          ("wood is brown", "木头是棕色"), ("sand is beige", "沙子是米色"), ("a grape is purple", "葡萄是紫色"),
          ("a flamingo is pink", "火烈鸟是粉色"), ("an orange is orange", "橙子是橙色"), ("ash is grey", "灰是灰色"),
          ("a wheel is round like a circle", "轮子像圆形"), ("a tile is a square", "瓷砖是方形"),
          ("a roof looks like a triangle", "屋顶像三角形"), ("at night we see a star", "夜里能看见星形"))
OPPOSITES = (("left", "right"), ("above", "below"), ("small", "large"), ("white", "black"), ("day", "night"),
             ("hot", "cold"), ("左边", "右边"), ("上方", "下方"), ("小号", "大号"), ("白色", "黑色"), ("白天", "夜里"))
ASKED = {"en": {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"},
         "zh": {"left": "左边", "right": "右边", "above": "上方", "below": "下方"}}
QUESTIONS = {
    "en": {"colour": "what colour is the {}?", "shape": "what shape is {}?", "size": "is the {} small or large?",
           "texture": "is the {} solid, striped or dotted?", "count": "how many things are there?",
           "background": "what is the background?", "relation": "what is {r} the {}?",
           "order": "what do you see, in reading order?"},
    "zh": {"colour": "{}是什么颜色？", "shape": "{}的是什么形状？", "texture": "{}是纯色、条纹还是波点？",
           "size": "{}是大号还是小号？", "count": "一共有几个？", "background": "背景是什么颜色？",
           "relation": "{}的{r}是什么？", "order": "依次看到什么？"}}


@dataclass(frozen=True)
class Question:
    """A question about a caption that has one right answer."""
    kind: str          # a key of QUESTIONS
    text: str
    answer: str


def ask(scene: Scene, rng: random.Random, language: str, kind: str | None = None) -> Question:
    """A question about a scene that its fine caption answers; of the kind asked for, where the scene allows it."""
    thing = rng.choice(scene.things)
    same = lambda name: sum(getattr(t, name) == getattr(thing, name) for t in scene.things) == 1
    kinds = (["colour"] * same("shape") + ["shape"] * same("colour") + ["texture", "size", "count", "background"]
             + ["relation", "relation", "order", "order"] * (len(scene.things) > 1))
    kind = kind if kind in kinds else rng.choice(kinds)
    named, relation = [thing.colour, thing.shape], ""
    if kind == "colour":
        named, answer = [thing.shape], phrase([thing.colour], language)
    elif kind == "shape":
        named, answer = [thing.colour], phrase([thing.shape], language)
    elif kind == "count":
        answer = NUMBERS[language][len(scene.things) - 1]
    elif kind == "background":
        answer = scene.background if language == "en" else CHINESE[scene.background]
    elif kind == "relation":                    # relations[i]: things[i] is `relation` things[i + 1]
        i = rng.randrange(len(scene.relations))
        found, thing = scene.things[i:i + 2]
        named, relation = [thing.colour, thing.shape], scene.relations[i]
        answer = phrase([found.colour, found.shape], language)
    elif kind == "order":
        answer = ", ".join(phrase([t.size, t.texture, t.colour, t.shape], language) for t in reading_order(scene.things))
    else:
        answer = phrase([getattr(thing, kind)], language).removesuffix("的")
    text = QUESTIONS[language][kind].format(phrase(named, language), r=ASKED[language].get(relation, ""))
    return Question(kind, text, answer)


def _aside(rng: random.Random) -> str:
    """A sentence that no picture needs: nature, opposites, sums, a dictionary entry."""
    kind = rng.randrange(4)
    if kind == 0:
        pair = rng.choice(NATURE)
        return pair[rng.randrange(2)] if rng.random() < 0.5 else f"{pair[0]} = {pair[1]}"
    if kind == 1:
        a, b = rng.sample(rng.choice(OPPOSITES), 2)
        return f"{a} <> {b}"
    if kind == 2:
        a, b = rng.randint(1, 5), rng.randint(1, 5)
        language = rng.choice(LANGUAGES)
        plus, equals = {"en": (" plus ", " is "), "zh": ("加", "等于")}[language]
        words = NUMBERS[language]
        return words[a - 1] + plus + words[b - 1] + equals + words[a + b - 1]
    word = rng.choice((*COLOURS, *BACKGROUNDS, *SHAPES, *TEXTURES, *SIZES))
    a, b = rng.sample((word, CHINESE[word]), 2)
    return f"{a} = {b}"


def _phrases(rng: random.Random, count: int | None) -> str:
    """Names of things, said twice: again, or in the other language. The shortest text that makes a model look up."""
    scene = sample_scene(rng, "any", count)
    names = [[t.size, t.texture, t.colour, t.shape][rng.randrange(3):] for t in scene.things]
    first, second = (", ".join(phrase(name, language) for name in names) for language in rng.choices(LANGUAGES, k=2))
    return f"{first} = {second}"


def document(rng: random.Random, count: int | None = None) -> str:
    """One short text of the corpus, in either language or both. count: things in a scene, None for one to three."""
    kind = rng.random()
    if kind < 0.05:
        return _aside(rng)
    if kind < 0.3:
        return _phrases(rng, count)
    scene = sample_scene(rng, "any", count)
    if kind < 0.4:
        return caption(scene, rng, rng.choice(LANGUAGES), rng.choice(DETAILS))
    text = caption(scene, rng, rng.choice(LANGUAGES), "fine")
    if kind < 0.6:                                                # a translation, or the same in other words
        return f"{text} = {caption(scene, rng, rng.choice(LANGUAGES), 'fine')}"
    for _ in range(3):
        question = ask(scene, rng, rng.choice(LANGUAGES))
        text += f" {question.text} {question.answer}"
    return text
