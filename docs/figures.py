"""Draws the figures of README.md and docs/, and writes what they quote: numbers from JSON, and links to lines of code.

    python docs/figures.py drawings      docs/architecture.svg and docs/layouts.svg
    python docs/figures.py samples       docs/samples.png: what weights/emoji draws
    python docs/figures.py collect       results/training.json from runs/*/metrics.jsonl
    python docs/figures.py curves        docs/curves.svg from results/training.json
    python docs/figures.py update        numbers and line links of README.md and docs/*.md

A page marks what is written into it; tests/test_docs.py holds that it is up to date:

    <!--= drawing, seen, en, top-1 -->97.1%<!--/-->       a row of weights/emoji/report.json
    <!--= sizes --> ... <!--/-->                          a table: a key of TABLES
    [`MARS.loss`](mars.py#L172)                           the line of a class or a function
"""
import ast
import functools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Parser, ends_in_one_line
from files import read_json, read_text, write_json, write_text

TEXT, VISUAL, SHARED = ("#dbeaf7", "#0072b2"), ("#fde3cf", "#d55e00"), ("#f0f0f0", "#666666")     # fill, line


# ----------------------------------------------------------------------------- SVG

class Drawing:
    """An SVG of boxes, arrows and texts; lengths in pixels. `svg()` is the file."""

    def __init__(self, width: int, height: int):
        self.size, self.parts = (width, height), []

    def add(self, tag: str, content: str = "", **attributes) -> None:
        """One SVG element; an attribute `stroke_width` is written stroke-width."""
        written = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.parts.append(f"<{tag} {written}>{content}</{tag}>" if content else f"<{tag} {written}/>")

    def text(self, x, y, text: str, size=14, anchor="middle", color="#222222", **more) -> None:
        """Text whose baseline is at y."""
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        self.add("text", text, x=x, y=y, font_size=size, text_anchor=anchor, fill=color, **more)

    def box(self, x, y, width, height, colors, text="", size=15, mark="", **more) -> None:
        """A box with its text in the middle. mark: "frozen" or "trained"."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=6, fill=colors[0], stroke=colors[1], **more)
        self.text(x + width / 2, y + height / 2 + size * 0.35, text, size)
        if mark:
            (self.snowflake if mark == "frozen" else self.flame)(x + 14, y + height / 2)

    def snowflake(self, x, y) -> None:
        """Three crossed lines with tips."""
        arm = "M0,-8V8M-2.5,-6.5L0,-4L2.5,-6.5M-2.5,6.5L0,4L2.5,6.5"
        for angle in (0, 60, 120):
            self.add("path", d=arm, transform=f"translate({x},{y}) rotate({angle})", stroke="#0072b2", fill="none",
                     stroke_width=1.6)

    def flame(self, x, y) -> None:
        """A flame in a flame."""
        outer = "M0,9C-6,9 -7,3 -5,-1C-4,1 -3,1 -2.5,1C-3,-4 0,-7 2,-9C1.5,-5 6,-2 6,3C6,7 3,9 0,9Z"
        self.add("path", d=outer, transform=f"translate({x},{y})", fill="#d55e00")
        self.add("path", d=outer, transform=f"translate({x},{y + 3.6}) scale(0.5)", fill="#f5c710")

    def arrow(self, *points, color="#444444", head=True) -> None:
        """A line through the points (x, y), with a head at its end."""
        self.add("polyline", points=" ".join(f"{x},{y}" for x, y in points), fill="none", stroke=color,
                 stroke_width=1.6, **{"marker_end": "url(#head)"} if head else {})

    def svg(self) -> str:
        """The whole file."""
        width, height = self.size
        head = ('<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                'orient="auto"><path d="M0,0L8,4L0,8Z" fill="#444444"/></marker></defs>')
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                          f'height="{height}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">', head,
                          f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *self.parts, "</svg>\n"])


def tokens(d: Drawing, x, y, words: list[str], targets=None, size=13) -> float:
    """A row of tokens, and a bar below each target of the loss -> where it ends."""
    for i, word in enumerate(words):
        visual = word.isdigit() or (word.startswith("<") and word != "<eos>")
        width = max(22, 7.6 * len(word) + 10)
        d.box(x, y, width, 24, VISUAL if visual else TEXT, word, size)
        if targets and targets[i]:
            d.add("rect", x=x, y=y + 28, width=width, height=5, fill="#222222")
        x += width + 3
    return x


def architecture() -> str:
    """Fig. 3 with shapes, those of the shipped weights."""
    d = Drawing(1180, 700)
    d.text(20, 30, "MARS", 18, "start", font_weight="bold")
    d.text(20, 688, "B sequences, T tokens, N = B T less padding, D width, H heads of width d, L blocks, V_t text "
           "tokens, V_v visual tokens (4,096 image tokens and the special ones)", 13, "start", "#555555")
    whole(d)
    block(d)
    for y, mark, text in ((206, d.snowflake, "frozen"), (236, d.flame, "trained")):
        mark(560, y)
        d.text(576, y + 5, text, 13, "start")
    return d.svg()


def whole(d: Drawing) -> None:
    """Fig. 3, left: from a caption and an image to one softmax."""
    words = ["red", "apple", "<img>", "5", "7", "8", "9", "</img>"]
    d.box(30, 590, 190, 44, SHARED, "“red apple”", 16)
    d.arrow((125, 590), (125, 560))
    d.box(45, 524, 160, 34, SHARED, "text tokenizer")
    d.box(290, 556, 78, 78, ("#ffffff", "#666666"))
    d.add("circle", cx=329, cy=599, r=24, fill="#d22f27", stroke="#222222", stroke_width=2)
    d.add("path", d="M329,577C331,568 337,562 346,562C345,571 338,577 329,577Z", fill="#5c9e31", stroke="#222222")
    d.text(329, 650, "64 × 64 pixels", 13)
    d.arrow((368, 595), (400, 595))
    d.box(402, 574, 130, 44, SHARED, "    VQ-GAN", mark="frozen")
    d.arrow((532, 595), (560, 595))
    for i in range(16):
        d.add("rect", x=562 + i % 4 * 16, y=563 + i // 4 * 16, width=16, height=16, stroke="#666666",
              fill=("#fde3cf", "#ffffff", "#f7b98b", "#ffffff", "#fde3cf")[i * i % 5])
    d.text(594, 650, "8 × 8 image tokens", 13)
    end = tokens(d, 110, 458, words)
    d.text(end + 8, 475, "tokens z (B, T)", 13, "start", "#555555")
    d.arrow((125, 524), (150, 486))
    d.arrow((594, 563), (594, 530), (270, 530), (270, 486))
    d.text(460, 522, "in raster order, between <img> and </img>", 13)
    d.box(70, 396, 210, 36, TEXT, "    text embedding", mark="frozen")
    d.box(300, 396, 210, 36, VISUAL, "     visual embedding", mark="trained")
    d.arrow((180, 458), (180, 434))
    d.arrow((340, 458), (340, 434))
    d.text(530, 419, "(B, T, D)", 13, "start", "#555555")
    d.arrow((175, 396), (175, 366))
    d.arrow((405, 396), (405, 366))
    d.add("rect", x=46, y=266, width=600, height=96, rx=10, fill="#f7f7f7", stroke="#444444", stroke_width=2)
    d.text(64, 290, "× L", 17, "start", font_style="italic")
    d.text(346, 308, "SemVIE block", 20, font_weight="bold")
    d.text(346, 334, "Semantic Vision-language Integration Expert", 15)
    d.arrow((290, 266), (290, 244))
    d.box(200, 208, 180, 34, SHARED, "  RMSNorm", mark="frozen")
    d.text(392, 230, "h (B, T, D)", 13, "start", "#555555")
    d.arrow((250, 208), (200, 176))
    d.arrow((330, 208), (400, 176))
    d.box(70, 140, 210, 36, TEXT, "text head", mark="frozen")
    d.box(310, 140, 210, 36, VISUAL, "vision head", mark="trained")
    d.text(60, 130, "(B, T, V_t)", 13, "start", "#555555")
    d.text(532, 163, "(B, T, V_v)", 13, "start", "#555555")
    d.arrow((175, 140), (240, 112))
    d.arrow((415, 140), (350, 112))
    d.box(180, 78, 230, 34, SHARED, "concat, one softmax")
    d.text(422, 100, "(B, T, V_t + V_v)", 13, "start", "#555555")
    d.arrow((295, 78), (295, 58))
    end = tokens(d, 110, 30, words[1:])
    d.text(end + 8, 47, "… the next token at every position", 13, "start", "#555555")


def block(d: Drawing) -> None:
    """Fig. 3, right: the SemVIE block."""
    d.add("path", d="M646,266L712,22M646,362L712,648", stroke="#444444", stroke_dasharray="6 5", fill="none")
    for y, height, name in ((22, 268, "FFN experts, Eq. 4"), (300, 348, "attention experts, Eq. 3")):
        d.add("rect", x=712, y=y, width=456, height=height, rx=8, fill="#f7f7f7", stroke="#bbbbbb")
        d.text(722, y + height - 9, name, 13, "start", "#b22222", font_weight="bold")
    x = 920
    half(d, x, 270, ("FFN", "FFN"), "(N, D)", lower=False)
    d.add("circle", cx=x, cy=58, r=9, fill="#ffffff", stroke="#444444")
    d.text(x, 63, "+", 16)
    d.arrow((x, 49), (x, 12))
    d.arrow((x, 280), (1148, 280), (1148, 58), (x + 9, 58))
    half(d, x, 628, ("W_Q  W_K  W_V", "W_Q  W_K  W_V"), "3 × (B, H, T, d)", lower=True)
    d.box(x - 170, 382, 340, 34, SHARED, "one causal attention over all T tokens", 14)
    d.arrow((x, 382), (x, 366))
    d.box(x - 80, 332, 160, 32, SHARED, "W_O", mark="frozen")
    d.arrow((x, 332), (x, 319))
    d.add("circle", cx=x, cy=310, r=9, fill="#ffffff", stroke="#444444")
    d.text(x, 315, "+", 16)
    d.arrow((x, 301), (x, 272))
    d.arrow((x, 638), (1148, 638), (1148, 310), (x + 9, 310))
    d.arrow((x, 664), (x, 630))
    d.text(x + 10, 660, "x (N, D)", 13, "start", "#555555")


def half(d: Drawing, x, y, names, shape: str, lower: bool) -> None:
    """From RMSNorm at height y through the router and the two experts to where they meet."""
    d.box(x - 90, y - 42, 180, 32, SHARED, "  RMSNorm", mark="frozen")
    d.arrow((x, y - 42), (x, y - 62))
    d.box(x - 90, y - 96, 180, 32, SHARED, "router: text | visual", 14)
    for side, colors, mark, name in ((-1, TEXT, "frozen", names[0]), (1, VISUAL, "trained", names[1])):
        d.arrow((x + side * 40, y - 96), (x + side * 95, y - 122), color=colors[1])
        d.box(x + side * 95 - 84, y - 160, 168, 36, colors, f"   {name}", 14, mark)
        meet = (x + side * 30, y - 210) if lower else (x + side * 9, y - 204)
        d.arrow((x + side * 95, y - 160), meet, color=colors[1])
    d.text(x - 105, y - 100, "text expert", 13, "end", TEXT[1])
    d.text(x + 105, y - 100, "visual expert", 13, "start", VISUAL[1])
    d.text(x + 106, y - 178, shape, 13, "start", "#555555")


def layouts() -> str:
    """Sec. 3.4 and 4.6: the five sequence layouts, built by data.py itself, and the targets of each loss."""
    import torch
    from data import captioning, joint, text_to_image
    from tokenizer import SPECIAL_TOKENS, Vocabulary
    words = "<eos> red apple 64x128 128x128 how to make a polar bear 1. 2. 3. snowflake".split()
    v, ids = Vocabulary(len(words), 10), lambda text: [words.index(word) for word in text.split()]
    name = lambda id: [*words, *map(str, range(10)), *SPECIAL_TOKENS][id]
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
    d, y = Drawing(900, 470), 24
    for title, sequence in rows:
        d.text(12, y, title, 15, "start", font_weight="bold")
        row = [name(id) for id in sequence.tokens]
        most = 25 if len(row) <= 25 else 19
        for start in range(0, len(row), most):
            tokens(d, 12, y + 10, row[start:start + most], sequence.is_target[start:start + most])
            y += 44
        y += 30
    for x, colors, text in ((12, TEXT, "text token, text expert"), (240, VISUAL, "visual token, visual expert")):
        d.box(x, y - 16, 20, 20, colors)
        d.text(x + 28, y - 1, text, 13, "start")
    d.add("rect", x=490, y=y - 9, width=24, height=5, fill="#222222")
    d.text(522, y - 1, "the loss (Eq. 1) is taken on this token", 13, "start")
    d.size = (900, y + 16)
    return d.svg()


# ----------------------------------------------------------------------------- samples

NAMES = [pair.split("|") for pair in (
    "red apple|红苹果,blue heart|蓝心,yellow circle|黄色圆,purple square|紫色方块,cat face|猫脸,tiger face|老虎头,panda|熊猫,"
    "penguin|企鹅,octopus|章鱼,butterfly|蝴蝶,sunflower|向日葵,cactus|仙人掌,mushroom|蘑菇,strawberry|草莓,pizza|披萨,"
    "birthday cake|生日蛋糕,house|房子,sun|太阳,rocket|火箭,sailboat|帆船,bicycle|自行车,umbrella|伞,guitar|吉他,key|钥匙,"
    "woman astronaut|女宇航员,robot|机器人,skull|头骨,fire|火焰,soccer ball|足球,grinning face|嘿嘿,blue book|蓝色书本,"
    "thumbs up|拇指向上").split(",")]
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "PingFang.ttc", "msyh.ttc", "wqy-zenhei.ttc")
FOLDERS = ("/usr/share/fonts/opentype/noto", "/usr/share/fonts/truetype/wqy", "/System/Library/Fonts",
           "C:/Windows/Fonts")


def find_font(size: int):
    """A font with Chinese characters; None, and a line on stderr, where there is none of FONTS."""
    from PIL import ImageFont
    for name in (str(Path(folder, name)) for name in FONTS for folder in (*FOLDERS, "")):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            pass
    print(f"figures.py: found none of the fonts {', '.join(FONTS)}, so Chinese names are left out; on Debian: "
          "apt-get install fonts-noto-cjk", file=sys.stderr)


def samples(weights: Path):
    """NAMES as these weights draw them, an image: the first sample of each, seed 0. Names in English and in Chinese
    take turns as the prompt; the prompt is the black one of the two below."""
    from PIL import Image, ImageDraw, ImageFont
    from generate import Pipeline
    prompts = [pair[i % 2] for i, pair in enumerate(NAMES)]
    images = Pipeline.from_pretrained(weights).text_to_image(prompts, seeds=[0] * len(prompts))
    chinese, side, columns = find_font(17), 128, 8
    english = chinese or ImageFont.load_default(17)
    sheet = Image.new("RGB", (columns * 146 + 8, -(-len(images) // columns) * 184 + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, names) in enumerate(zip(images, NAMES)):
        x, y = i % columns * 146 + 8, i // columns * 184 + 8
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x + 9, y))
        for j, (name, font) in enumerate(zip(names, (english, chinese))):
            if font:
                pen.text((x + 73, y + 140 + 22 * j), name, "black" if j == i % 2 else "#999999", font, anchor="mm")
    return sheet


# ----------------------------------------------------------------------------- curves

CURVES = {"vqgan": ("image tokenizer: PSNR in dB", ("psnr_train", "psnr_held_out")),
          "text": ("language model: loss", ("loss",)),
          "stage1": ("Stage I: loss", ("loss", "held_out_loss"))}


def collect(runs: Path) -> dict:
    """metrics.jsonl and run.json of each run -> its settings, minutes, last values, and curves of at most 60 points."""
    found = {}
    for folder in sorted(path.parent for path in runs.glob("**/metrics.jsonl")):
        stage = folder.relative_to(runs).as_posix()
        lines = [json.loads(line) for line in read_text(folder / "metrics.jsonl").split("\n") if line.endswith("}")]
        run = read_json(folder / "run.json")
        if stage not in CURVES and lines[-1]["step"] + 1 < run["steps"]:           # a run that is not finished
            continue
        minutes = ((folder / "model.safetensors").stat().st_mtime - (folder / ".lock").stat().st_mtime) / 60
        entry = {"steps": lines[-1]["step"] + 1, "batch": run["batch"], "seed": run["seed"], "minutes": round(minutes)}
        for what in ("loss", "held_out_loss", "psnr_train", "psnr_held_out"):
            points = [(line["step"] + 1, line[what]) for line in lines if what in line]
            size = -(-len(points) // 60)                               # steps that make one point: their mean
            parts = [points[i:i + size] for i in range(0, len(points), size or 1)]
            curve = [(part[-1][0], round(sum(value for _, value in part) / len(part), 4)) for part in parts]
            entry |= {what: curve} if curve else {}
        found[stage] = entry
    return {stage: found[stage] for stage in sorted(found, key=[*CURVES, *found].index)}


def curves(training: dict) -> str:
    """The curves of the shipped weights' runs, a panel a stage."""
    d = Drawing(960, 260)
    for i, (stage, (title, names)) in enumerate(CURVES.items()):
        left, top, width, height, run = 60 + 320 * i, 40, 240, 170, training[stage]
        d.text(left - 30, 22, title, 15, "start", font_weight="bold")
        lines = {name: run[name] for name in names if name in run}
        most = max(value for line in lines.values() for _, value in line)
        least = 0 if "loss" in lines else min(value for line in lines.values() for _, value in line) // 1
        place = lambda step, value: (left + width * step / run["steps"],
                                     top + height * (1 - (value - least) / (most - least)))
        for value in (least, (least + most) / 2, most):
            y = place(0, value)[1]
            d.add("path", d=f"M{left},{y:.1f}h{width}", stroke="#dddddd")
            d.text(left - 6, y + 4, f"{value:.3g}", 12, "end")
        for step in (0, run["steps"] // 2, run["steps"]):
            d.text(place(step, least)[0], top + height + 18, f"{step:,}", 12)
        d.text(left + width / 2, top + height + 38, "step", 12)
        for j, (name, line) in enumerate(lines.items()):
            color = (TEXT[1], VISUAL[1])[j]
            points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
            d.add("polyline", points=points, fill="none", stroke=color, stroke_width=2,
                  stroke_dasharray=("none", "5 3")[j])
            label = {"loss": "training", "psnr_train": "training images"}.get(name, "held-out images")
            y = top + 16 + 18 * j + ("psnr_train" in lines) * (height - 50)
            d.text(left + width - 4, y, label, 13, "end", color)
    return d.svg()


# ----------------------------------------------------------------------------- numbers and links

@functools.cache
def content(name: str) -> dict:
    """A JSON file of the repository; {} where it is not there yet."""
    return read_json(ROOT / name) if (ROOT / name).is_file() else {}


def number(key: str) -> str:
    """"drawing, seen, en, top-1" -> that row of the report, as it is written; TODO(key) where it is missing."""
    *names, what = (part.strip() for part in key.split(","))
    for row in content("weights/emoji/report.json").get("rows", []):
        if [row["task"], row["split"], row["language"], row["what"]] == [*names, what]:
            if "accuracy" in row:
                return f"{100 * row['accuracy']:.1f}%"
            return f"{row['value']:.1%}" if what == "codebook usage" else f"{row['value']:.4g}"
    return f"TODO({key})"


def report_table() -> str:
    """Every row of weights/emoji/report.json."""
    lines = ["| task | split | language | what | result | 95% interval | n |", "|---|---|---|---|---|---|---|"]
    for row in content("weights/emoji/report.json").get("rows", []):
        names = [row["task"], row["split"], row["language"], row["what"]]
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}%" if "accuracy" in row else ""
        lines.append("| " + " | ".join([*names, number(", ".join(names)), interval, str(row["n"])]) + " |")
    return "\n".join(lines)


def sizes_table() -> str:
    """Parameters and files of what ships, from the headers of its files."""
    from math import prod
    from safetensors import safe_open
    from mars import is_visual
    lines = ["| | parameters | file |", "|---|---|---|"]
    counts, files = {}, {"mars": ROOT / "weights/emoji/model.safetensors",
                         "vqgan": ROOT / "weights/emoji/vqgan/model.safetensors"}
    for name, path in files.items():
        with safe_open(path, "np") as file:
            for key in file.keys():
                side = ("visual" if is_visual(key) else "language") if name == "mars" else name
                counts[side] = counts.get(side, 0) + prod(file.get_slice(key).get_shape())
    sizes = {name: f"{path.stat().st_size / 1e6:.1f} MB" for name, path in files.items()}
    lines += [f"| language side, frozen | {counts['language'] / 1e6:.2f} million | `weights/emoji/model.safetensors`, "
              f"{sizes['mars']} |", f"| visual side, trained | {counts['visual'] / 1e6:.2f} million | the same file |",
              f"| image tokenizer | {counts['vqgan'] / 1e6:.2f} million | `weights/emoji/vqgan/model.safetensors`, "
              f"{sizes['vqgan']} |"]
    return "\n".join(lines)


def training_table() -> str:
    """The runs of the shipped weights, from results/training.json."""
    lines = ["| stage | steps × batch | seed | minutes of one busy CPU core | ends at |", "|---|---|---|---|---|"]
    for stage, run in content("results/training.json").items():
        words = {"psnr_train": "PSNR {:.1f} dB on training images", "psnr_held_out": "{:.1f} dB on held-out images"}
        words = words if "psnr_train" in run else {"loss": "loss {:.2f}", "held_out_loss": "{:.2f} on held-out images"}
        ends = ", ".join(words[name].format(run[name][-1][1]) for name in words if name in run)
        lines.append(f"| `{stage}` | {run['steps']:,} × {run['batch']} | {run['seed']} | {run['minutes']} | {ends} |")
    return "\n".join(lines)


def plan_table() -> str:
    """Forecasts of scale.py for published language models."""
    from scale import SIZES, count_parameters, training_memory
    lines = ["| | language side | visual side | DDP, each GPU | `--shard` on 8 GPUs, each |", "|---|---|---|---|---|"]
    for name, config in SIZES.items():
        language, visual = count_parameters(config)
        ddp, shard, *_ = training_memory(config).values()
        lines.append(f"| `{name}` | {language / 1e9:.2f} billion | {visual / 1e9:.2f} billion | {ddp / 1e9:.1f} GB | "
                     f"{shard / 1e9:.1f} GB |")
    return "\n".join(lines)


def benchmark_table() -> str:
    """What experiments/benchmark.py measured, from results/benchmark.json."""
    from experiments.benchmark import show
    return show(content("results/benchmark.json")["rows"])


TABLES = {"report": report_table, "sizes": sizes_table, "training": training_table, "plan": plan_table,
          "benchmark": benchmark_table}


@functools.cache
def lines_of(path: Path) -> dict[str, int]:
    """Classes, functions and constants of a module -> the line that each begins at: {"MARS.loss": 172, ...}."""
    found = {}

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.") if isinstance(child, ast.ClassDef) else None
            elif isinstance(child, (ast.Assign, ast.AnnAssign)):
                for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = child.lineno
    visit(ast.parse(read_text(path)), "")
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
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "emoji", help="what draws the samples")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="the runs to collect")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("figures.py"):
        c = make_parser().parse_args(arguments)
        if "drawings" in c.what:
            write_text(ROOT / "docs" / "architecture.svg", architecture())
            write_text(ROOT / "docs" / "layouts.svg", layouts())
        if "samples" in c.what:
            from images import save_image
            save_image(samples(c.weights), ROOT / "docs" / "samples.png")
        if "collect" in c.what:
            write_json(ROOT / "results" / "training.json", collect(c.runs))
        if "curves" in c.what:
            write_text(ROOT / "docs" / "curves.svg", curves(read_json(ROOT / "results" / "training.json")))
        if "update" in c.what:
            for path in pages():
                write_text(path, update(read_text(path), path.parent))


if __name__ == "__main__":
    main()
