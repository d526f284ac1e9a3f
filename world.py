"""Not in the paper: a rendered world of coloured shapes, the data for laptop-sized runs.

The paper trains on 200 million captioned pictures. To see MARS learn on one small machine, this file draws
pictures whose every fact is known, writes captions for them in English and Chinese, coarse and fine (like those
of Stages I and II, Sec. 3.4), and reads a caption back into the facts that it states, so that checker.py can
tell from pixels alone whether a generated picture is right.

    Scene --render--> picture          Scene --caption--> text --parse--> Claim

A picture is a grid of rows x cols cells of `cell` pixels: with 16 pixels, the paper's P, one cell is one token of
the visual tokenizer. Things are aligned to cells and textures repeat four times a cell, so that few codes draw
everything: a small thing is one token, a large one four.
"""
import json
import random
import re
import unicodedata
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# word -> (red, green, blue). No two colours, nor their shades, meet when a codec blurs them a little.
COLOURS = {"red": (222, 38, 44), "orange": (246, 138, 24), "yellow": (250, 222, 48), "green": (46, 164, 72),
           "cyan": (56, 204, 222), "blue": (44, 82, 214), "purple": (138, 58, 190), "pink": (246, 116, 180)}
BACKGROUNDS = {"white": (246, 246, 244), "beige": (226, 208, 172), "black": (26, 26, 30)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
TEXTURES = ("solid", "striped", "dotted")
SIZES = {"small": 1, "large": 2}  # side of the thing's box, in cells
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
CHINESE = {"red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色", "blue": "蓝色",
           "purple": "紫色", "pink": "粉色", "white": "白色", "black": "黑色",
           "beige": "米色", "circle": "圆形", "square": "方形", "triangle": "三角形", "diamond": "菱形",
           "star": "星形", "cross": "十字形", "solid": "纯色", "striped": "条纹", "dotted": "波点",
           "small": "小号", "large": "大号"}
SPLITS = ("train", "held_out_pair", "held_out_combination", "any")
LANGUAGES, DETAILS = ("en", "zh"), ("coarse", "fine")

# One shape each with its own colour: every shape is seen in 7 colours, every colour in at least 5 shapes.
HELD_OUT_PAIRS = frozenset({("green", "circle"), ("yellow", "square"), ("purple", "triangle"),
                            ("orange", "diamond"), ("blue", "star"), ("pink", "cross")})


@dataclass(frozen=True)
class Thing:
    """One coloured shape; its box has SIZES[size] cells a side."""
    colour: str
    shape: str
    texture: str
    size: str
    row: int  # top-left corner of the box, in cells
    col: int

    @property
    def cells(self) -> int:
        """Side of the box in cells."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """One to three things on a plain background."""
    things: tuple[Thing, ...]
    background: str
    relations: tuple[str, ...]  # relations[i] holds between things[i] and things[i + 1]
    rows: int = 6  # height of the picture, in cells
    cols: int = 6  # width of the picture, in cells


@dataclass(frozen=True)
class ThingClaim:
    """What a caption says of one thing; None where it says nothing."""
    colour: str
    shape: str
    texture: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a caption says, in normal form: two captions that say the same have equal claims."""
    things: tuple[ThingClaim, ...]  # sorted by colour, then shape
    relations: tuple[tuple[int, str, int], ...]  # (i, relation, j) with i < j, indices into things
    background: str | None


# ---------------------------------------------------------------------------------------------- pictures

def shade(colour: str) -> tuple[int, int, int]:
    """The dark tone of a colour: its stripes."""
    return tuple(round(0.5 * c) for c in COLOURS[colour])


def tint(colour: str) -> tuple[int, int, int]:
    """The light tone of a colour: its dots."""
    return tuple(round(0.3 * c + 0.7 * 255) for c in COLOURS[colour])


def silhouette(shape: str, side: int, inset: float) -> Image.Image:
    """A black and white (side, side) picture of a shape that fills its box but for `inset` pixels."""
    image = Image.new("L", (side, side), 0)
    draw, low, high = ImageDraw.Draw(image), inset, side - 1 - inset
    place = lambda points: [(low + x * (high - low), low + y * (high - low)) for x, y in points]
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=255)
    elif shape == "triangle":
        draw.polygon(place([(0.5, 0), (1, 1), (0, 1)]), fill=255)
    elif shape == "diamond":
        draw.polygon(place([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]), fill=255)
    elif shape == "cross":
        near = side // 12 * 4  # the middle third of the box, to the whole pixel
        far = side - 1 - near
        draw.rectangle((near, low, far, high), fill=255)
        draw.rectangle((low, near, high, far), fill=255)
    elif shape == "star":  # five points, stretched to fill the box; a fat body leaves room for the texture
        angles = np.pi * np.arange(10) / 5
        radii = np.where(np.arange(10) % 2, 0.58, 1.0)
        corners = np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)  # (10, 2)
        corners = (corners - corners.min(0)) / (corners.max(0) - corners.min(0))
        draw.polygon(place(corners.tolist()), fill=255)
    else:
        raise ValueError(f'shape {shape!r}: expected one of {", ".join(SHAPES)}')
    return image


@lru_cache(maxsize=None)
def stencil(shape: str, texture: str, size: str, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a thing is, and where it has its second tone: two boolean (side, side) arrays, at 4x."""
    side, pixel = SIZES[size] * cell * 4, cell / 4  # `pixel` is a sixteenth of a cell, at 4x
    mask = silhouette(shape, side, inset=pixel)
    # A closed rim of the colour itself, 1.25 pixels wide or more, keeps the outline whole on every background.
    inside = np.asarray(mask.filter(ImageFilter.MinFilter(2 * round(1.25 * pixel) + 1))) > 0
    band = (np.arange(side) // pixel + 1) % 4 < 2  # 2 pixels in 4, so that all cells are alike
    pattern = {"solid": np.zeros((side, side), bool),
               "striped": np.broadcast_to(band[:, None], (side, side)),
               "dotted": band[:, None] & band[None, :]}[texture]
    return np.asarray(mask) > 0, inside & pattern


@lru_cache(maxsize=None)
def sprite(colour: str, shape: str, texture: str, size: str, background: str, cell: int) -> Image.Image:
    """One thing on its background, drawn at 4x and scaled down."""
    mask, pattern = stencil(shape, texture, size, cell)
    image = np.empty((*mask.shape, 3), np.uint8)
    image[:] = BACKGROUNDS[background]
    image[mask] = COLOURS[colour]
    image[pattern] = tint(colour) if texture == "dotted" else shade(colour)
    return Image.fromarray(image).reduce(4)


def render(scene: Scene, cell: int = 16) -> Image.Image:
    """The picture of a scene: (rows * cell) x (cols * cell) pixels, RGB."""
    image = Image.new("RGB", (scene.cols * cell, scene.rows * cell), BACKGROUNDS[scene.background])
    for t in scene.things:
        drawn = sprite(t.colour, t.shape, t.texture, t.size, scene.background, cell)
        image.paste(drawn, (t.col * cell, t.row * cell))
    return image


# ---------------------------------------------------------------------------------------------- sampling

def held_out_pair(colour: str, shape: str) -> bool:
    """Whether no training caption ever names this colour and shape together."""
    return (colour, shape) in HELD_OUT_PAIRS


def held_out_combination(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether two (colour, shape) pairs never share a training picture: about one in eight, by a stable hash."""
    return zlib.crc32("+".join(sorted(f"{colour} {shape}" for colour, shape in (a, b))).encode()) % 10 == 0


def split_of(pairs: list[tuple[str, str]]) -> str | None:
    """The split that things with these (colour, shape) pairs belong to; None for those of no split."""
    new_pair = any(held_out_pair(*pair) for pair in pairs)
    new_combination = any(held_out_combination(a, b) for a, b in combinations(pairs, 2))
    if new_pair and new_combination:
        return None
    return "held_out_pair" if new_pair else "held_out_combination" if new_combination else "train"


def sample_scene(rng: random.Random, split: str = "train", count: int | None = None,
                 rows: int = 6, cols: int = 6) -> Scene:
    """A random scene of a split; 'any' is 'train' and 'held_out_pair' together."""
    if split not in SPLITS:
        raise ValueError(f'split {split!r}: expected one of {", ".join(SPLITS)}')
    least = 2 if split == "held_out_combination" else 1
    if count is None:
        count = rng.choices((1, 2, 3)[least - 1:], (0.35, 0.4, 0.25)[least - 1:])[0]
    if not least <= count <= 3:
        raise ValueError(f"count {count}: expected {least} to 3 for split {split!r}")
    allowed = ("train", "held_out_pair") if split == "any" else (split,)
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    while split_of(pairs := rng.sample(every, count)) not in allowed:
        pass
    looks = [(colour, shape, rng.choice(TEXTURES), rng.choice(tuple(SIZES))) for colour, shape in pairs]
    corners, relations = _place(rng, [SIZES[look[3]] for look in looks], rows, cols)
    things = tuple(Thing(*look, *corner) for look, corner in zip(looks, corners))
    return Scene(things, rng.choice(tuple(BACKGROUNDS)), relations, rows, cols)


def _place(rng, sides, rows, cols):
    """Corners and relations of one to three boxes: in a row, in a column, or in an L, at least a cell apart."""
    axes = (("left", "right"), ("above", "below"))
    first = rng.randrange(2)
    relations = tuple(rng.choice(axes[(first + i) % 2]) for i in range(len(sides) - 1))
    for _ in range(1000):
        corners = [(0, 0)]  # relative to the first box
        for i, relation in enumerate(relations):
            ahead = relation in ("left", "above")  # then the next box lies to the right of this one, or below it
            near = sides[i] if ahead else sides[i + 1]
            far = (cols if relation in axes[0] else rows) - (sides[i + 1] if ahead else sides[i])
            if near + 1 > far:
                break
            step = rng.randint(near + 1, far) * (1 if ahead else -1)
            row, col = corners[-1]
            corners.append((row, col + step) if relation in axes[0] else (row + step, col))
        boxes = list(zip(corners, sides))
        top, left = min(r for r, _ in corners), min(c for _, c in corners)
        height, width = max(r + s for (r, _), s in boxes) - top, max(c + s for (_, c), s in boxes) - left
        apart = all(max(b[0] - a[0] - s, a[0] - b[0] - t, b[1] - a[1] - s, a[1] - b[1] - t) >= 1
                    for (a, s), (b, t) in combinations(boxes, 2))
        if len(corners) == len(sides) and apart and height <= rows and width <= cols:
            down, right = rng.randint(0, rows - height) - top, rng.randint(0, cols - width) - left
            return [(r + down, c + right) for r, c in corners], relations
    raise ValueError(f"{rows} x {cols} cells: too few for {len(sides)} things")


def training_scene(rng: random.Random, count: int | None = None, rows: int = 6, cols: int = 6) -> tuple[Scene, bool]:
    """A scene to train on and whether it may carry a caption: one in twenty-five shows a held-out pair, unnamed."""
    if rng.random() < 0.04:
        return sample_scene(rng, "held_out_pair", count, rows, cols), False
    return sample_scene(rng, "train", count, rows, cols), True


# ---------------------------------------------------------------------------------------------- captions

# X p Y (and Y q Z): upper case is the full phrase of a thing, lower case its short form, "the blue square".
# One caption in two tells the scene from its other end, so either thing may come first.
TEMPLATES = {
    "en": {
        1: ("{X}", "there is {X}", "a picture of {X}", "an image with {X}", "this image shows {X}"),
        2: ("{X} {p} {Y}", "there is {X} {p} {Y}", "a picture of {X} {p} {Y}", "{p} {Y} is {X}",
            "{Y} with {X} {p} it", "an image with {X}, which is {p} {Y}",
            "an image with {X} and {Y}, {x} is {p} {y}"),
        3: ("{X} {p} {Y}, and {y} is {q} {Z}", "there is {X} {p} {Y}, which is {q} {Z}",
            "{X} {p} {Y}, with {y} {q} {Z}", "{Y} {i} {X} and {q} {Z}",
            "a picture of {X} {p} {Y}. {j} {y} is {Z}",
            "{X}, {Y} and {Z}. {x} is {p} {y}, and {y} is {q} {z}")},
    "zh": {
        1: ("{X}", "一个{X}", "图中有一个{X}", "一张图片，里面有一个{X}", "画面里是一个{X}"),
        2: ("{Y}{p}的{X}", "一个{X}在一个{Y}的{p}", "图中有一个{X}，位于一个{Y}的{p}", "一个{Y}的{p}有一个{X}",
            "图中有一个{X}和一个{Y}，{x}在{y}的{p}"),
        3: ("{Y}{p}的{X}，{y}在{Z}的{q}", "一个{X}在一个{Y}的{p}，{y}在一个{Z}的{q}",
            "一个{Y}的{p}有一个{X}，{y}的{j}有一个{Z}", "图中一个{Y}的{p}是一个{X}，{y}位于一个{Z}的{q}",
            "图中有一个{X}、一个{Y}和一个{Z}，{x}在{y}的{p}，{y}在{z}的{q}")}}
GROUNDS = {"en": ("{} on a {g} background", "{} against a {g} background", "on a {g} background, {}"),
           "zh": ("{}，背景是{g}", "{}，{g}背景", "{g}背景上，{}")}
RELATIONS = {"en": {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
                    "above": ("above",), "below": ("below",)},
             "zh": {"left": ("左边", "左侧"), "right": ("右边", "右侧"), "above": ("上方", "上面"),
                    "below": ("下方", "下面")}}


def reading_order(things) -> list[Thing]:
    """Things from top to bottom, and from left to right where they share a row."""
    return sorted(things, key=lambda thing: (thing.row, thing.col))


def caption(scene: Scene, rng: random.Random, language: str, detail: str, in_order: bool = False) -> str:
    """One of many captions of a scene: 'fine' says everything, 'coarse' little more than colour, shape, relation.

    in_order: told from the end that comes first in reading order, not from either one.
    """
    if language not in LANGUAGES or detail not in DETAILS:
        raise ValueError(f"caption {language!r}, {detail!r}: expected one of {LANGUAGES} and one of {DETAILS}")
    said = lambda chance: detail == "fine" or rng.random() < chance
    things, relations = scene.things, scene.relations
    backwards = rng.random() < 0.5
    if reading_order((things[0], things[-1]))[0] is things[-1] if in_order else backwards:
        things, relations = things[::-1], tuple(INVERSE[r] for r in relations[::-1])
    words = {}
    for name, thing in zip("XYZ", things):
        short = (thing.colour, thing.shape)
        full = [thing.size] * said(0.3) + [thing.texture] * said(0.3) + [*short]
        words[name] = phrase(full, language, "a")
        words[name.lower()] = phrase(short, language, "the")
    # p and q relate X to Y and Y to Z; i and j are the same, told from the other side
    for (name, other), relation in zip(("pi", "qj"), relations):
        words[name] = rng.choice(RELATIONS[language][relation])
        words[other] = rng.choice(RELATIONS[language][INVERSE[relation]])
    text = rng.choice(TEMPLATES[language][len(things)]).format(**words)
    if said(0.1):
        ground = scene.background if language == "en" else CHINESE[scene.background]
        text = rng.choice(GROUNDS[language]).format(text, g=ground)
    return text


def phrase(words: list[str], language: str, article: str = "") -> str:
    """What a thing is called: ['large', 'striped', 'red', 'circle'] -> 'a large striped red circle', without an article
    'large striped red circle', or '大号条纹的红色圆形'."""
    if language == "zh":
        return "".join(CHINESE[word] + "的" * (word in TEXTURES) for word in words)
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words] if article else words)


# ---------------------------------------------------------------------------------------------- reading

def _claim(things, relations, background):
    """A Claim in normal form."""
    order = sorted(range(len(things)), key=lambda i: (things[i].colour, things[i].shape))
    rank = {old: new for new, old in enumerate(order)}
    told = {(rank[i], r, rank[j]) if rank[i] < rank[j] else (rank[j], INVERSE[r], rank[i]) for i, r, j in relations}
    return Claim(tuple(things[i] for i in order), tuple(sorted(told)), background)


def holds(said: Claim, fact: Claim) -> bool:
    """Whether all that is said is so, and every thing that there is was named."""
    agree = lambda a, b: all(getattr(a, key) in (None, getattr(b, key)) for key in ("colour", "shape", "texture", "size"))
    return (len(said.things) == len(fact.things) and all(map(agree, said.things, fact.things))
            and set(said.relations) <= set(fact.relations) and said.background in (None, fact.background))


def claim_of(scene: Scene) -> Claim:
    """Everything there is to say of a scene: what its fine captions claim."""
    things = [ThingClaim(t.colour, t.shape, t.texture, t.size) for t in scene.things]
    return _claim(things, [(i, r, i + 1) for i, r in enumerate(scene.relations)], scene.background)


@lru_cache(maxsize=None)
def _lexicon():
    """{word: (kind, value)} of both languages, and the pattern that splits a text into such words."""
    words = {}
    kinds = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES, "size": SIZES, "background": BACKGROUNDS}
    for kind, values in kinds.items():
        for value in values:
            words[value] = words[CHINESE[value]] = (kind, value)
    for value in INVERSE:
        words.update({word: ("relation", value) for word in RELATIONS["en"][value]})
        words.update({word: ("side", value) for word in RELATIONS["zh"][value]})
    words.update({word: words[same] for word, same in (  # what people also write
        ("big", "large"), ("on the left of", "left of"), ("on the right of", "right of"),
        ("under", "below"), ("over", "above"), ("正方形", "方形"), ("圆点", "波点"), ("大", "大号"), ("小", "小号"))})
    marks = {"and": ("and", "和"), "with": ("with",), "it": ("it",), "at": ("在", "位于"), "stop": (".", ";", "。"),
             "ground": ("background", "背景"),
             "filler": ("a", "an", "the", "there", "is", "are", "of", "on", "against", "picture", "image", "this",
                        "shows", "which", ",", ":", "!", "?", '"', "'", "、", "的", "一个", "一张", "图中", "有",
                        "图片", "里面", "画面里", "是", "上")}
    words.update({word: (kind, word) for kind, group in marks.items() for word in group})
    longest_first = sorted(words, key=len, reverse=True)
    whole = [rf"(?<![a-z]){re.escape(w)}(?![a-z])" if w.isascii() and w[0].isalpha() else re.escape(w)
             for w in longest_first]
    return words, re.compile("|".join([*whole, r"[a-z0-9]+", r"\S"]))


def parse(text: str) -> Claim:
    """What a caption says, in either language; ValueError with one clear line where it cannot be read."""
    words, pattern = _lexicon()
    flat = " ".join(unicodedata.normalize("NFKC", text).lower().split())  # NFKC: a full-width comma becomes ','
    things, items, background = [], [], None  # items: ('thing', index), ('relation', 'left'), ('and', 'and'), ...
    said = {}  # of the thing being read, up to its noun

    def fail(why):
        raise ValueError(f"caption {text!r}: {why}")

    for word in pattern.findall(flat):
        kind, value = words.get(word) or fail(f"unknown word {word!r}")
        if kind in ("colour", "texture", "size"):
            if said.setdefault(kind, value) != value:
                fail(f"one thing is both {said[kind]} and {value}")
        elif kind == "shape":
            if "colour" not in said:
                fail(f"{word!r} has no colour")
            items.append(("thing", _mention(things, ThingClaim(shape=value, **said), fail)))
            said = {}
        elif kind == "background":
            if background not in (None, value):
                fail(f"two backgrounds, {background} and {value}")
            background = value
        elif kind in ("ground", "stop") and said:
            break
        else:
            items.append((kind, value))
    if said:
        fail(f'{" ".join(said.values())!r} is said of no thing')
    if not 1 <= len(things) <= 3:
        fail(f'{len(things)} things found, expected one to three such as "a red circle"')
    return _claim(things, _relations(items, fail), background)


def _relations(items, fail):
    """The (i, relation, j) that a row of things, relations and small words tells."""
    found = []
    last = None     # the thing spoken of last
    subject = None  # the thing that the last relation was said of
    host = None     # X in "X with ... above it"
    at = None       # X in X在Y的上方
    pending = None  # a relation that still lacks a thing: (relation, i, j), one of i and j or both None

    def relate(i, relation, j):
        if i is None or j is None or i == j:
            fail(f"{relation!r} needs two things")
        found.append((i, relation, j))
        return i

    for (before, _), (kind, value) in zip([(None, None), *items], items):
        if kind == "thing":
            last = value
            if pending:
                relation, i, j = pending
                if i is not None:  # X above [Y]
                    subject, pending = relate(i, relation, last), None
                elif j is not None:  # above Y is [X], Y上方的[X]
                    subject, pending = relate(last, relation, j), None
                else:  # above [Y] is X
                    pending = (relation, None, last)
        elif kind in ("relation", "side") and pending:
            fail(f"{pending[0]!r} needs two things")
        elif kind == "relation":  # "X above Y and left of Z" goes on to speak of X
            pending = (value, subject if before == "and" and subject is not None else last, None)
        elif kind == "side" and at is not None:  # X在Y的[上方]
            subject, at = relate(at, value, last), None
        elif kind == "side":  # Y[上方]的X
            pending = (value, None, last)
        elif kind == "it":  # Y with X above [it]
            subject, pending = relate(last, pending[0] if pending else "it", host), None
        elif kind == "with":
            host = last
        elif kind == "at":
            at = last
        elif kind == "stop":
            last = subject = host = at = None
    if pending or at is not None:
        fail("a relation lacks its second thing")
    return found


def _mention(things, new, fail):
    """Index of a thing spoken of: the same colour and shape mean the same thing, so what is said of it adds up."""
    for i, old in enumerate(things):
        if (old.colour, old.shape) == (new.colour, new.shape):
            for field in ("texture", "size"):
                said = {getattr(old, field), getattr(new, field)} - {None}
                if len(said) == 2:
                    fail(f'the {new.colour} {new.shape} is both {" and ".join(sorted(said))}')
            things[i] = ThingClaim(new.colour, new.shape, new.texture or old.texture, new.size or old.size)
            return i
    things.append(new)
    return len(things) - 1


# ---------------------------------------------------------------------------------------------- as a folder

def write_folder(path: str | Path, n: int, seed: int, cell: int = 16) -> None:
    """Write n training pictures as an ordinary image folder: PNG files and a metadata.jsonl of file_name and text.

    Language and detail of each caption are drawn evenly; a scene with a held-out pair has "text": "".
    """
    rng, path = random.Random(seed), Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for i in range(n):
            scene, captioned = training_scene(rng)
            name = f"{i:06d}.png"
            render(scene, cell).save(path / name)
            text = caption(scene, rng, rng.choice(LANGUAGES), rng.choice(DETAILS)) if captioned else ""
            lines.write(json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n")
