"""What the notebooks draw with: one style, and the 24 emoji. Nothing of MARS is in here.

Every figure is a PNG of 140 dots an inch, at least 700 pixels wide, in colours that colour-blind readers can tell apart
(Okabe and Ito's). Labels are English: few computers have a font that lets matplotlib write Chinese.

Shapes: B batch, T tokens.
"""
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image as Png
from IPython.display import display
from PIL import Image

DPI, WIDTH = 140, 7.0                 # dots an inch, and the usual width of a figure in inches
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#999999"
COLOURS = {"text": "#56B4E9", "image": "#E69F00", "special": "#CC79A7", "padding": "#EEEEEE"}
FROZEN, TRAINS = "#CFE8F7", "#F7D79A"
SPECIAL = ("<img>", "</img>", "<multi_images>", "</multi_images>", "<uncond>", "<pad>")
SIDE, COLUMNS = 64, 6                 # of emoji24.png: pixels of an emoji, and emoji in a row

plt.rcParams.update({"figure.dpi": DPI, "figure.figsize": (WIDTH, 2.6), "font.size": 9, "axes.titlesize": 9,
                     "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "legend.fontsize": 8, "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE])})


def show(figure=None, colours: int = 256) -> None:
    """Displays the current figure, or the one given, as a small PNG, and closes it. Raises ValueError for one that is
    narrower than 700 pixels. colours: most colours of the PNG; 0: any number."""
    figure, file, small = figure or plt.gcf(), io.BytesIO(), io.BytesIO()
    figure.savefig(file, dpi=DPI, bbox_inches="tight", pad_inches=0.08, facecolor="white")
    plt.close(figure)
    image = Image.open(file).convert("RGB")
    if image.width < 700:
        raise ValueError(f"the figure is {image.width} pixels wide, expected at least 700")
    image = image.quantize(colours, dither=Image.Dither.NONE) if colours else image
    image.save(small, "PNG", dpi=(DPI, DPI), optimize=True)
    display(Png(small.getvalue(), width=image.width * 100 // DPI))


def load_emoji() -> tuple[list[Image.Image], list[dict]]:
    """The 24 emoji of these notebooks, 64 x 64 pixels, and what is known of each: "emoji", "en", "zh", and
    "zh_in_training": whether the shipped weights were trained on its Chinese name."""
    sheet = Image.open(Path(__file__).parent / "emoji24.png").convert("RGB")
    facts = json.loads((Path(__file__).parent / "emoji24.json").read_text(encoding="utf-8"))
    corners = [(i % COLUMNS * SIDE, i // COLUMNS * SIDE) for i in range(len(facts))]
    return [sheet.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners], facts


def show_images(rows: list[list], row_labels=None, column_labels=None, titles=None, side: float = 0,
                colours: int = 128) -> None:
    """PIL images, or None for an empty cell, in rows, each row with its label at the left, each column with one on top.

    titles: a text above each image. side: inches; 0: as large as the page allows. colours: as in `show`.
    """
    columns = max(map(len, rows))
    side = side or min(1.6, (WIDTH + 1) / columns)
    height = side * (1.0 + (0.22 * (1.2 / side) if titles else 0.04))
    figure, axes = plt.subplots(len(rows), columns, figsize=(max(WIDTH, columns * side), len(rows) * height + 0.3),
                                squeeze=False)
    for y, row in enumerate(rows):
        for x in range(columns):
            axis = axes[y, x]
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if x < len(row) and row[x] is not None:
                axis.imshow(row[x], interpolation="nearest")
                if titles:
                    axis.set_title(titles[y][x], fontsize=8, pad=3)
            if column_labels and y == 0:
                axis.set_title(column_labels[x], fontsize=9, pad=5)
            if row_labels and x == 0:
                axis.set_ylabel(row_labels[y], rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.tight_layout(pad=0.3, w_pad=0.3, h_pad=0.4)
    show(figure, colours)


# ----------------------------------------------------------------------------- sequences of tokens

def kind_of(token: int, vocabulary) -> str:
    """"text", "image" (a token of the codebook), "special" or "padding"."""
    if token < vocabulary.text:
        return "text"
    if token < vocabulary.text + vocabulary.image:
        return "image"
    return "padding" if token == vocabulary.special("<pad>") else "special"


def label_of(token: int, vocabulary, tokenizer) -> str:
    """What is written into a token's cell: a piece of text, the number of an image token, or a special token's name."""
    kind = kind_of(token, vocabulary)
    if kind == "text":
        return "<eos>" if token == tokenizer.eos else tokenizer.decode([token]) or "_"
    if kind == "image":
        return str(token - vocabulary.text)
    return "" if kind == "padding" else next(name for name in SPECIAL if vocabulary.special(name) == token)


def show_tokens(tokens, vocabulary, tokenizer, marked=None, row_labels=None, mark: str = "a target") -> None:
    """tokens (B, T) as cells, a colour for each kind; those of `marked` (B, T) get a thick frame, called `mark` in the
    legend. Chinese text is left blank."""
    tokens = torch.as_tensor(tokens)
    B, T = tokens.shape
    figure, axis = plt.subplots(figsize=(max(WIDTH, 0.62 * T), 0.5 * B + 0.5))
    kinds = [[kind_of(int(token), vocabulary) for token in row] for row in tokens]
    for y in range(B):
        for x in range(T):
            axis.add_patch(plt.Rectangle((x, y), 0.94, 0.86, color=COLOURS[kinds[y][x]], lw=0))
            label = label_of(int(tokens[y, x]), vocabulary, tokenizer)
            axis.text(x + 0.47, y + 0.43, label if label.isascii() else "", ha="center", va="center",
                      fontsize=8 if len(label) < 6 else 6.5)
            if marked is not None and marked[y][x]:
                axis.add_patch(plt.Rectangle((x + 0.04, y + 0.04), 0.86, 0.78, fill=False, ec="black", lw=2))
        if row_labels:
            axis.text(-0.15, y + 0.43, row_labels[y], ha="right", va="center", fontsize=9)
    used = [kind for kind in COLOURS if any(kind in row for row in kinds)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in used]
    if marked is not None:
        handles, used = handles + [plt.Rectangle((0, 0), 1, 1, fill=False, ec="black", lw=2)], [*used, mark]
    axis.legend(handles, used, loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    axis.set(xlim=(0, T), ylim=(B, 0))
    axis.axis("off")
    show(figure)


def heat(axis, values, title: str = "", low=None, high=None, numbers: bool = False):
    """A grid of values (h, w) as a heat map on an axis: dark is low, yellow is high."""
    image = axis.imshow(values, cmap="cividis", vmin=low, vmax=high)
    axis.set(xticks=[], yticks=[], title=title)
    for y, row in enumerate(torch.as_tensor(values).tolist() if numbers else ()):
        for x, value in enumerate(row):
            middle = (image.get_clim()[0] + image.get_clim()[1]) / 2
            text = f"{value:.1f}" if value % 1 and value < 9.95 else f"{value:.0f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color="black" if value > middle else "white")
    return image


# ----------------------------------------------------------------------------- Fig. 3 of the paper

def _box(axis, x, y, width, text, colour="white", state=""):
    axis.add_patch(plt.Rectangle((x - width / 2, y - 0.32), width, 0.64, fc=colour, ec="black", lw=1.2,
                                 hatch="//" if state == "trains" else None, alpha=1, zorder=2))
    axis.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3,
              bbox=dict(fc=colour, ec="none", pad=1.5))


def _arrow(axis, points, colour="black"):
    xs, ys = zip(*points)
    axis.plot(xs[:-1], ys[:-1], color=colour, lw=1.5, solid_capstyle="butt", zorder=1)
    arrow = dict(arrowstyle="-|>", color=colour, lw=1.5)
    axis.annotate("", xy=points[-1], xytext=points[-2], arrowprops=arrow, zorder=1)


def _sublayer(axis, y, norm, expert, after, title):
    """Half a block of Fig. 3, from the residual stream at height y to the one above it."""
    _box(axis, 0, y + 0.7, 2.6, norm, FROZEN)
    _box(axis, 0, y + 1.7, 1.6, "Router")
    for x, side, colour, state in ((-1.6, "text", FROZEN, ""), (1.6, "visual", TRAINS, "trains")):
        line = COLOURS["text"] if side == "text" else COLOURS["image"]
        _arrow(axis, [(0, y + 2.0), (0, y + 2.2), (x, y + 2.2), (x, y + 2.5)], line)
        _box(axis, x, y + 2.8, 1.9, f"{expert}, {side}", colour, state)
        _arrow(axis, [(x, y + 3.1), (x, y + 3.4), (0, y + 3.4), (0, y + 3.7)], line)
    _arrow(axis, [(0, y - 0.1), (0, y + 0.4)])
    _arrow(axis, [(0, y + 1.0), (0, y + 1.4)])
    top = y + 3.7
    if after:
        _box(axis, 0, y + 4.0, 3.6, after, FROZEN)
        top = y + 4.7
        _arrow(axis, [(0, y + 4.3), (0, top - 0.15)])
    axis.text(0, top, "+", ha="center", va="center", fontsize=12, zorder=3,
              bbox=dict(boxstyle="circle,pad=0.12", fc="white", ec="black"))
    _arrow(axis, [(0, y + 0.1), (3.3, y + 0.1), (3.3, top), (0.25, top)], GREY)
    axis.text(-3.1, y + 0.7, title, ha="left", va="center", fontsize=9, style="italic")
    return top


def show_semvie() -> None:
    """Fig. 3 of the paper: the model at the left, a block at the right. Blue is frozen, hatched orange trains."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 6.2), width_ratios=(1.25, 1))
    names = ["red", "apple", "<img>", "17", "5", "3", "8", "</img>"]
    kinds = ["text", "text", "special", *["image"] * 4, "special"]
    for i, (name, kind) in enumerate(zip(names, kinds)):
        left.add_patch(plt.Rectangle((i, 2.2), 0.9, 0.6, color=COLOURS[kind], lw=0))
        left.text(i + 0.45, 2.5, name, ha="center", va="center", fontsize=8)
        _arrow(left, [(i + 0.45, 2.85), (i + 0.45, 3.6)])
        if i:
            _arrow(left, [(i - 0.55, 7.5), (i - 0.55, 8.1)])
            left.add_patch(plt.Rectangle((i - 1, 8.15), 0.9, 0.6, color=COLOURS[kind], lw=0))
            left.text(i - 0.55, 8.45, name, ha="center", va="center", fontsize=8)
    for y, text, colour in ((3.95, "embeddings: text (frozen), visual (trains)", "white"),
                            (5.4, "L SemVIE blocks, causal:\na token reads those before it", "white"),
                            (6.55, "norm", FROZEN), (7.2, "text head (frozen) and vision head (trains)", "white")):
        height = 1.5 if "\n" in text else 0.55
        left.add_patch(plt.Rectangle((-0.2, y - height / 2), 8.3, height, fc=colour, ec="black", lw=1.2))
        left.text(3.95, y, text, ha="center", va="center", fontsize=9)
    left.text(3.95, 9.15, "next token: one softmax over both heads", ha="center", fontsize=9)
    left.text(0.9, 1.55, "text tokenizer", ha="center", fontsize=9)
    left.text(5.0, 1.55, "image tokenizer (VQ-GAN), raster order", ha="center", fontsize=9)
    left.text(0.9, 0.9, '"red apple"', ha="center", fontsize=9)
    left.imshow(load_emoji()[0][0], extent=(4.4, 5.6, 0.2, 1.4), zorder=3)
    _arrow(left, [(0.9, 1.85), (0.9, 2.15)])
    _arrow(left, [(5.0, 1.85), (5.0, 2.15)])
    left.set(xlim=(-0.4, 8.3), ylim=(0, 9.6), title="the model", aspect="auto")
    top = _sublayer(right, 0.2, "RMSNorm", "QKV", "causal attention, W_O", "Eq. 3")
    top = _sublayer(right, top + 0.4, "RMSNorm", "FFN", "", "Eq. 4")
    _arrow(right, [(0, top + 0.15), (0, top + 0.7)])
    right.set(xlim=(-3.2, 3.5), ylim=(0, top + 0.9), title="one SemVIE block")
    handles = [plt.Rectangle((0, 0), 1, 1, fc=FROZEN, ec="black"),
               plt.Rectangle((0, 0), 1, 1, fc=TRAINS, ec="black", hatch="//")]
    right.legend(handles, ["frozen", "trains"], loc="upper left", bbox_to_anchor=(-0.05, 1.0))
    for axis in (left, right):
        axis.axis("off")
    figure.tight_layout()
    show(figure)
