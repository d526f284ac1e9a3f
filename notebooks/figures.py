"""The drawing that all notebooks share: nothing of MARS is in here.

Shapes: B batch, T tokens.
"""
import matplotlib.pyplot as plt
import torch

plt.rcParams.update({"figure.dpi": 70, "savefig.dpi": 70, "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False})

COLOURS = {"text": "#9ecae1", "visual": "#fdae6b", "special": "#e6550d", "padding": "#eeeeee"}


def pictures(images, titles=None, columns: int = 8, side: float = 1.3) -> None:
    """PIL images in a grid, each with its title."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = side * (1.25 if titles else 1.05)
    _, axes = plt.subplots(rows, columns, figsize=(columns * side, rows * height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, images)):
        axis.imshow(image, interpolation="nearest")
        if titles:
            axis.set_title(titles[i], fontsize=8)
    plt.tight_layout(pad=0.3)
    plt.show()


def kind_of(token: int, vocabulary) -> str:
    """'text', 'visual' (a code), 'special' or 'padding'."""
    if token < vocabulary.text:
        return "text"
    if token < vocabulary.text + vocabulary.codes:
        return "visual"
    return "padding" if token == vocabulary.special("<pad>") else "special"


def label_of(token: int, vocabulary, tokenizer) -> str:
    """What to write into a token's cell: a word, the number of a code, or a special token's name."""
    kind = kind_of(token, vocabulary)
    if kind == "text":
        return "end" if token == tokenizer.eos else tokenizer.decode([token])
    if kind == "visual":
        return str(token - vocabulary.text)
    names = ("<img>", "</img>", "<multi_images>", "</multi_images>", "<uncond>", "<pad>")
    return "" if kind == "padding" else next(name for name in names if vocabulary.special(name) == token)


def rows_of_tokens(tokens, vocabulary, tokenizer, marked=None, titles=None, legend: bool = True) -> None:
    """tokens (B, T) as coloured cells; `marked` (B, T) bool get a thick frame. Chinese text is left blank."""
    tokens = torch.as_tensor(tokens)
    B, T = tokens.shape
    _, axis = plt.subplots(figsize=(0.62 * T, 0.62 * B + 0.5))
    used = []
    for row in range(B):
        for place in range(T):
            token = int(tokens[row, place])
            kind = kind_of(token, vocabulary)
            used += [kind] * (kind not in used)
            axis.add_patch(plt.Rectangle((place, row), 0.94, 0.9, color=COLOURS[kind], lw=0))
            label = label_of(token, vocabulary, tokenizer)
            axis.text(place + 0.47, row + 0.45, label if label.isascii() else "", ha="center", va="center", fontsize=7)
            if marked is not None and marked[row][place]:
                axis.add_patch(plt.Rectangle((place + 0.03, row + 0.03), 0.88, 0.84, fill=False, ec="black", lw=1.6))
        if titles:
            axis.text(-0.15, row + 0.45, titles[row], ha="right", va="center", fontsize=8)
    if legend:
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in COLOURS if kind in used]
        axis.legend(handles, [kind for kind in COLOURS if kind in used], loc="lower left", bbox_to_anchor=(0, 1),
                    ncols=4, frameon=False, fontsize=8)
    axis.set(xlim=(0, T), ylim=(B, 0))
    axis.axis("off")
    plt.show()
