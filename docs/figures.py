"""Draws the figures of README.md and docs/, and writes what they quote: numbers from JSON, and links to lines of code.

    python docs/figures.py drawings      docs/layouts.svg (docs/architecture.svg is drawn by hand)
    python docs/figures.py samples       docs/samples.png and docs/stages.png: what the weights draw
    python docs/figures.py collect       results/training.json from those of runs/STAGE that are there
    python docs/figures.py curves        docs/curves.svg from results/training.json (pip install matplotlib)
    python docs/figures.py update        numbers and line links of README.md and docs/*.md

A page marks what is written into it; tests/test_docs.py holds that it is up to date:

    <!--= drawing, seen, en, top-1 -->97.1%<!--/-->       a row of weights/emoji/report.json
    <!--= table3.json: with, 1400, drawing, seen, en, top-1 -->99.4%<!--/-->      of results/table3.json
    <!--= sizes --> ... <!--/-->                          a table: a key of TABLES
    [`MARS.loss`](mars.py#L172)                           the line of a class or a function
"""
import contextlib
import functools
import io
import json
import math
import re
import sys
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Parser, ends_in_one_line
from experiments import plot
from files import read_json, read_text, write_json, write_text

WEIGHTS = ROOT / "weights" / "emoji"
REPORT = "weights/emoji/report.json"
STAGES = ("vqgan", "text", "stage1", "joint", "nano/first", "nano/stage2", "nano/stage3")    # runs whose weights ship


# ----------------------------------------------------------------------------- the sequence layouts

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" width="900" height="{height}">
<style>
text {{ font: 13px Helvetica, Arial, DejaVu Sans, sans-serif; fill: #222222 }}
text.title {{ font-size: 15px; font-weight: bold }}
g text {{ text-anchor: middle }}
g.text rect {{ fill: #dbeaf7; stroke: #0072b2 }}
g.visual rect {{ fill: #fde3cf; stroke: #d55e00 }}
</style>
<rect width="900" height="{height}" fill="#ffffff"/>
{parts}
</svg>
"""


def bar(x: float, y: float, width: float) -> str:
    """What marks a target of the loss, in SVG."""
    return f'<rect x="{x:g}" y="{y}" width="{width:g}" height="5" fill="#222222"/>'


def token(x: float, y: float, word: str, kind: str, width: float) -> str:
    """A token of `kind`, "text" or "visual", in SVG."""
    return (f'<g class="{kind}" transform="translate({x:g},{y})"><rect width="{width:g}" height="24" rx="6"/>'
            f'<text x="{width / 2:g}" y="17">{escape(word)}</text></g>')


def sequences() -> tuple[list, list[str], int]:
    """Sec. 3.4 and 4.6: (title, sequence) of the five layouts, as data.py builds them; a word for each id; V_t."""
    import torch
    from data import captioning, joint, text_to_image
    from tokenizer import SPECIAL_TOKENS, Vocabulary
    words = "<eos> red apple 64x128 128x128 how to make a polar bear 1. 2. 3. snowflake".split()
    v, ids = Vocabulary(len(words), 10), lambda text: [words.index(word) for word in text.split()]
    image, wide = torch.tensor([[5, 7], [8, 9]]), torch.tensor([[5, 7, 7, 5], [8, 9, 9, 8]])
    large = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [6, 6, 5, 5], [8, 9, 0, 0]])
    rows = [("Stage I, text to image", text_to_image(ids("red apple"), image, v)),
            ("Stage I, captioning", captioning(ids("red apple"), image, v, 0)),
            ("Stage II, free aspect ratio", text_to_image(ids("red apple"), wide, v, ids("64x128"))),
            ("Stage III, the cascade: small image, large image",
             text_to_image(ids("red apple"), large, v, ids("128x128"), image)),
            ("Joint output: title, steps, an image of each step",
             joint(ids("how to make a polar bear"), ids("1. bear 2. snowflake 3. polar bear"),
                   [image, image.flip(1), image.flip(0)], v, 0))]
    return rows, [*words, *map(str, range(10)), *SPECIAL_TOKENS], v.text


def layouts() -> str:
    """An SVG of the sequences, a bar below each target of the loss."""
    (rows, words, first_visual), parts, y = sequences(), [], 24
    for title, sequence in rows:
        parts.append(f'<text class="title" x="12" y="{y}">{title}</text>')
        x, y = 12, y + 10
        for id, is_target in zip(sequence.tokens, sequence.is_target):
            width = max(22, 7.6 * len(words[id]) + 10)
            if x + width > 890:
                x, y = 12, y + 44
            parts.append(token(x, y, words[id], "text" if id < first_visual else "visual", width))
            parts += [bar(x, y + 28, width)] * is_target
            x += width + 3
        y += 64
    parts += [token(12, y - 16, "", "text", 24), token(250, y - 16, "", "visual", 24), bar(500, y - 6, 24)]
    for x, text in {44: "text token, text expert", 282: "visual token, visual expert",
                    532: "the loss (Eq. 1) is taken on this token"}.items():
        parts.append(f'<text x="{x}" y="{y + 1}">{text}</text>')
    return SVG.format(height=y + 20, parts="\n".join(parts))


# ----------------------------------------------------------------------------- samples and curves

NAMES = [pair.split("|") for pair in (
    "red apple|红苹果,blue heart|蓝心,yellow circle|黄色圆,purple square|紫色方块,cat face|猫脸,tiger face|老虎头,panda|熊猫,"
    "penguin|企鹅,octopus|章鱼,butterfly|蝴蝶,sunflower|向日葵,cactus|仙人掌,mushroom|蘑菇,strawberry|草莓,pizza|披萨,"
    "birthday cake|生日蛋糕,house|房子,sun|太阳,rocket|火箭,sailboat|帆船,bicycle|自行车,umbrella|伞,guitar|吉他,key|钥匙,"
    "woman astronaut|女宇航员,robot|机器人,skull|头骨,fire|火焰,soccer ball|足球,grinning face|嘿嘿,blue book|蓝色书本,"
    "thumbs up|拇指向上").split(",")]
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "PingFang.ttc", "msyh.ttc", "wqy-zenhei.ttc")


def find_font(size: int):
    """A font with Chinese characters, from where the system keeps its fonts. Raises ValueError where there is none."""
    from PIL import ImageFont
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    raise ValueError(f"found none of the fonts {', '.join(FONTS)}; on Debian: apt-get install fonts-noto-cjk")


def samples(weights: Path):
    """NAMES as these weights draw them, an image: the first sample of each, seed 0. Names in English and in Chinese
    take turns as the prompt; the prompt is the black one of the two below."""
    from PIL import Image, ImageDraw
    from generate import Pipeline
    from images import grid
    prompts, font, tiles = [pair[i % 2] for i, pair in enumerate(NAMES)], find_font(17), []
    images = Pipeline.from_pretrained(weights).text_to_image(prompts, seeds=[0] * len(prompts))
    for prompt, image, names in zip(prompts, images, NAMES):
        tile = Image.new("RGB", (146, 184), "white")
        tile.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (9, 8))
        for y, name in zip((148, 170), names):
            ImageDraw.Draw(tile).text((73, y), name, "black" if name == prompt else "#999999", font, anchor="mm")
        tiles.append(tile)
    return grid(tiles, gap=0)


STAGE2 = {(64, 128): ("dog to the left of a red heart", "红苹果在猫的左边", "ox to the right of a pear"),
          (64, 192): ("frog, lemon and panda from left to right", "从左到右是蓝心、龟和香蕉")}
STAGE3 = ("red apple", "penguin", "green book")
RECIPES = ("how to make a woman astronaut", "怎样做海盗旗")


def stages(weights: Path):
    """A row for Stage II, two for Stage III and one for joint output: first samples, seed 0, greedy in Stage III."""
    from PIL import Image, ImageDraw
    from generate import Pipeline
    font, small, sheet, y = find_font(17), find_font(13), Image.new("RGB", (1112, 604), "white"), 8
    drawer, upscaler, writer = (Pipeline.from_pretrained(weights / name) for name in ("stage2", "stage3", "joint"))
    pairs = [(image, text) for size, texts in STAGE2.items()
             for text, image in zip(texts, drawer.text_to_image(list(texts), seeds=[0] * len(texts), size=size))]
    low = drawer.text_to_image(list(STAGE3), seeds=[0] * len(STAGE3))
    large = upscaler.super_resolve(low, list(STAGE3))
    tiles = [tile for text, before, after in zip(STAGE3, low, large) for tile in (
        (before.resize(after.size, Image.Resampling.BICUBIC), f"{text}, bicubic"), (after, "Stage III"))]
    steps = [(image, step) for text, images in writer.interleaved(list(RECIPES), seeds=[0] * len(RECIPES))
             for step, image in zip(text.splitlines(), images)]
    for title, height, shown in (("Stage II: several objects, free aspect ratio", 80, pairs),
                                 ("Stage III: 64 to 128 pixels", 160, tiles),
                                 (f"Joint output: {', '.join(RECIPES)}", 128, steps)):
        ImageDraw.Draw(sheet).text((12, y + 12), title, "black", font, anchor="lm")
        x = 12
        for image, words in shown:
            width = image.width * height // image.height
            sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, y + 34))
            ImageDraw.Draw(sheet).text((x + width / 2, y + height + 46), words, "black", small, anchor="mm")
            x += width + 24
        y += height + 74
    return sheet


def collect(runs: Path) -> dict:
    """Settings, minutes and curves of the run of each stage that is there."""
    found = {}
    for stage in STAGES:
        folder = runs / stage
        if (folder / "metrics.jsonl").is_file():
            run, curves = read_json(folder / "run.json"), plot.curves(folder)
            rows = [json.loads(line) for line in read_text(folder / "metrics.jsonl").splitlines()]
            seconds = sum(row["seconds"] for row in rows)
            found[stage] = {"steps": curves["loss"][-1][0], "batch": run["batch"], "seed": run["seed"],
                            "minutes": round(seconds / 60)} | curves
    return found


def curves(training: dict) -> str:
    """An SVG of the curves of the shipped weights' runs."""
    file, figure = io.StringIO(), plot.draw(training)
    import matplotlib
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mars"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


# ----------------------------------------------------------------------------- numbers and links

NAMED_BY = ("stage", "visual_experts", "steps", "chinese", "task", "split", "language", "what")


@functools.cache
def content(name: str) -> dict:
    """A JSON file of the repository; {} where it is not there yet."""
    return read_json(ROOT / name) if (ROOT / name).is_file() else {}


def rows_of(report: str) -> dict[str, dict]:
    """"drawing, seen, en, top-1" -> that row of a report of evaluate.py, with "shown", its value as it is written."""
    found = {}
    for row in content(report).get("rows", []):
        value = row.get("accuracy", row.get("value"))
        percent = "accuracy" in row or row["what"] == "codebook usage"
        row["shown"] = f"{100 * value:.1f}%" if percent else f"{value:.4g}"
        found[", ".join(str(row[name]) for name in NAMED_BY if name in row)] = row
    return found


def number(key: str) -> str:
    """A value of the shipped weights' report, or of another one named before it; TODO(key) where it is missing."""
    report, _, name = key.rpartition(": ")
    return rows_of(f"results/{report}" if report else REPORT).get(name, {"shown": f"TODO({key})"})["shown"]


def table(head: str, rows) -> str:
    """A Markdown table; head: its cells, separated by |."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def report_table(report: str, only: tuple[str, ...] = ()) -> str:
    """The rows of a report; only: those of these measures."""
    rows = []
    for row in rows_of(report).values():
        if not only or row["what"] in only:
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}%" if "accuracy" in row else ""
            names = (row[name] for name in ("task", "split", "language", "what", "shown"))
            rows.append([*names, interval, row["n"]])
    return table("task | split | language | what | result | 95% interval | n", rows)


def sizes_table() -> str:
    """Parameters and files of what ships, from the headers of its files."""
    from safetensors import safe_open
    from mars import is_visual
    rows, million = [], lambda n: f"{n / 1e6:.2f} million"
    for place, what in {"": "Stage I", "stage2": "Stage II, 188 emoji", "stage3": "Stage III, 188 emoji",
                        "joint": "joint output", "vqgan": "image tokenizer"}.items():
        path, count = WEIGHTS / place / "model.safetensors", Counter()
        if path.is_file():
            with safe_open(path, "np") as file:
                for key in file.keys():
                    side = place == "vqgan" or is_visual(key)
                    count[side] += math.prod(file.get_slice(key).get_shape())
            rows.append([what, million(count[False]) if count[False] else "-", million(count[True]),
                         f"`{path.relative_to(ROOT).as_posix()}`, {path.stat().st_size / 1e6:.1f} MB"])
    return table("| language side | visual side | file", rows)


def training_table() -> str:
    """The runs of the shipped weights, from results/training.json."""
    rows = []
    for stage, run in content("results/training.json").items():
        words = {"psnr_train": "PSNR {:.1f} dB on training images", "psnr_held_out": "{:.1f} dB on held-out images"}
        words = words if "psnr_train" in run else {"loss": "loss {:.2f}", "held_out_loss": "{:.2f} on held-out images"}
        ends = ", ".join(words[name].format(run[name][-1][1]) for name in words if name in run)
        rows.append([f"`{stage}`", f"{run['steps']:,} × {run['batch']}", run["seed"], run["minutes"], ends])
    return table("stage | steps × batch | seed | minutes of one busy CPU core | ends at", rows)


def plan_table() -> str:
    """Forecasts of scale.py for published language models."""
    from scale import SIZES, count_parameters, training_memory
    rows = []
    for name, config in SIZES.items():
        language, visual = (f"{count / 1e9:.2f} billion" for count in count_parameters(config))
        ddp, shard, *_ = (f"{size / 1e9:.1f} GB" for size in training_memory(config).values())
        rows.append([f"`{name}`", language, visual, ddp, shard])
    return table("| language side | visual side | DDP, each GPU | `--shard` on 8 GPUs, each", rows)


def benchmark_table() -> str:
    """What experiments/benchmark.py measured, from results/benchmark.json."""
    from experiments.benchmark import show
    return show(content("results/benchmark.json")["rows"])


def paper_table(name: str, report: str) -> str:
    """What a table of experiments/tables.py shows."""
    from experiments.tables import SHOWN, wide
    head, *lines = wide(content(report).get("rows", []), *SHOWN[name])
    return table(" | ".join(head).replace("_", " "), lines)


TABLES = {"report": functools.partial(report_table, REPORT), "sizes": sizes_table, "training": training_table,
          "nano": functools.partial(report_table, "results/nano.json", ("top-1", "exact", "perplexity", "translation")),
          "recipes": functools.partial(report_table, "results/recipes.json"),
          "plan": plan_table, "benchmark": benchmark_table,
          "table 2": functools.partial(paper_table, "2", "results/table2.json"),
          "table 3": functools.partial(paper_table, "3", "results/table3.json"),
          "table 4": functools.partial(paper_table, "4", "results/table4.json"),
          "table 7": functools.partial(paper_table, "7", "results/table7.json"),
          "Eq. 2": functools.partial(paper_table, "Eq. 2", "results/table4.json")}


@functools.cache
def lines_of(path: Path) -> dict[str, int]:
    """Classes, functions and constants of a module -> the line that each begins at: {"MARS.loss": 172, ...}."""
    found, outer = {}, ""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if match := re.match(r"(?:class |def )?(\w+)(?=\(|:| = )", line):
            outer = match[1]
            found.setdefault(outer, number)
        elif match := re.match(r"    def (\w+)\(", line):
            found.setdefault(f"{outer}.{match[1]}", number)
    return found


def update(text: str, folder: Path) -> str:
    """A page of `folder` with today's numbers and lines. Raises ValueError for a name that its file does not have."""
    def link(match) -> str:
        name, path = match[1], folder / match[2]
        if name not in lines_of(path):
            raise ValueError(f"{match[0]}: {path.name} has no {name}")
        return f"[`{name}`]({match[2]}#L{lines_of(path)[name]})"

    def fill(match) -> str:
        key = match[1]
        written = f"\n{TABLES[key]()}\n" if key in TABLES else number(key)
        return f"<!--= {key} -->{written}<!--/-->"
    text = re.sub(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L\d+\)", link, text)
    return re.sub(r"<!--= (.+?) -->.*?<!--/-->", fill, text, flags=re.DOTALL)


def pages() -> list[Path]:
    """README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser("figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=("drawings", "samples", "collect", "curves", "update"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="what draws the samples")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="the runs to collect")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("figures.py"):
        c = make_parser().parse_args(arguments)
        if "drawings" in c.what:
            write_text(ROOT / "docs" / "layouts.svg", layouts())
        if "samples" in c.what:
            from images import save_image
            save_image(samples(c.weights), ROOT / "docs" / "samples.png")
            save_image(stages(c.weights), ROOT / "docs" / "stages.png")
        if "collect" in c.what:
            write_json(ROOT / "results" / "training.json", content("results/training.json") | collect(c.runs))
            content.cache_clear()
        if "curves" in c.what:
            write_text(ROOT / "docs" / "curves.svg", curves(read_json(ROOT / "results" / "training.json")))
        if "update" in c.what:
            for path in pages():
                write_text(path, update(read_text(path), path.parent))


if __name__ == "__main__":
    main()
