"""Which image of a folder a drawn image shows, what an evaluation asks, and the rows of its report (paper Sec. 4).

    judge = Judge(Dataset("data/emoji"))
    indices = judge.nearest(images)                                       (B, 5), the nearest first
    judge.correct(indices, [judge.images_of("red apple")] * len(images))  (B, 5) bool

Not in the paper, whose tables need CLIP, Inception and human eyes. Shapes: B images judged, N in the data set.
"""
import math
import random
import re
from collections import defaultdict

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import fit
from dataset import Dataset
from images import resize_and_crop, to_pixels
from tokenizer import normalize

# Up to this mean squared error, 1% of the range, two images of the data set count as one. Fewer than 1% of the emoji
# have such a neighbour (full moon and yellow circle, people asleep in a bed); a frown alone makes 1.6e-4.
TOLERANCE = 1e-4


def plain(text: str) -> str:
    """A text in NFC and lower case, with single spaces."""
    return " ".join(normalize(text).casefold().split())


def shrink(image: Image.Image) -> Tensor:
    """An image as it is judged, at 32 x 32 pixels -> (3072,)."""
    return to_pixels(resize_and_crop(image, 32, 32)).flatten()


class Judge:
    """The nearest image of a data set by mean squared error; what is all but alike counts as one. Raises ValueError,
    one line, for facts "names" and "held_out_text" that are not like {"en": ["apple"]}."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.named, rows = dataset, defaultdict(list), range(len(dataset))
        self.small = torch.stack([shrink(dataset.image(i)) for i in tqdm(rows, desc="judge")])       # (N, 3072)
        for i in rows:
            texts = set(dataset.captions(i))
            for fact in ("names", "held_out_text"):
                content = dataset.facts(i).get(fact, {})
                try:
                    texts.update(*(fit(own, tuple[str, ...]) for own in content.values()))
                except (AttributeError, TypeError):
                    raise ValueError(f'{dataset.directory}, {dataset.name(i)}: "{fact}" is {content!r}, expected an '
                                     'object that holds lists of texts, such as {"en": ["apple"]}') from None
            for text in set(map(plain, texts)):
                self.named[text].append(i)

    def images_of(self, text: str) -> list[int]:
        """The images with this caption, name or held-out text, in any case."""
        return self.named.get(plain(text), [])

    def nearest(self, images: list[Image.Image]) -> Tensor:
        """Images -> indices (B, 5) of the nearest images of the data set, the nearest first; of all, if fewer."""
        parts = torch.stack(list(map(shrink, images))).split(256)
        return torch.cat([torch.cdist(part, self.small).topk(min(5, len(self.small)), largest=False).indices
                          for part in parts])

    def correct(self, indices: Tensor, asked: list[list[int]]) -> Tensor:
        """indices (B, n), and for each row the images that are correct -> (B, n) bool: whether it is one of them."""
        alike = lambda i, wanted: ((self.small[wanted] - self.small[i]).square().mean(1) <= TOLERANCE).any()
        return torch.tensor([[bool(alike(i, wanted)) for i in row]
                             for row, wanted in zip(indices, asked, strict=True)])

    def shows(self, images: list[Image.Image], asked: list[list[int]]) -> list[bool]:
        """Top-1: whether each image shows one of those that were asked for."""
        return self.correct(self.nearest(images)[:, :1], asked)[:, 0].tolist()


# ----------------------------------------------------------------------------- what is asked

def split_of(facts: dict) -> str:
    """"seen" for an image that is trained on, else the name of its held-out split."""
    return "seen" if facts.get("split", "train") == "train" else facts["split"]


def language_of(text: str) -> str:
    """"zh" for a text with a Chinese character, else "en"."""
    return "zh" if re.search("[\u3400-\u9fff]", text) else "en"


def choose(pools: dict, n: int, seed: int) -> list[tuple]:
    """Up to n items of each pool, at random -> (name, item). Names are tuples; those that begin with "seen" first."""
    return [(name, item) for name in sorted(pools, key=lambda name: (name[0] != "seen", name))
            for item in random.Random(f"{seed}/{name}").sample(pools[name], min(n, len(pools[name])))]


def questions(dataset: Dataset, n: int, seed: int) -> list[tuple[str, str, str, int]]:
    """Up to n prompts of each split and language, one an image -> (split, language, text, image).

    Splits: captions of images that were trained on ("seen"), captions of held-out images, and the held-out texts of
    images that were trained on. Where there is but one language it is called "all".
    """
    pools, rng = defaultdict(list), random.Random(seed)
    for i in range(len(dataset)):
        split = split_of(dataset.facts(i))
        held_out = dataset.facts(i).get("held_out_text", {}) if split == "seen" else {}
        for name, texts in {split: dataset.captions(i), **held_out}.items():
            for language in sorted(set(map(language_of, texts))):
                pools[name, language].append((i, [text for text in texts if language_of(text) == language]))
    if not pools:
        raise ValueError(f"{dataset.directory}: no image has a caption, expected captions to draw")
    many = len({language for _, language in pools}) > 1
    return [(name, language if many else "all", rng.choice(texts), i)
            for (name, language), (i, texts) in choose(pools, n, seed)]


# ----------------------------------------------------------------------------- the report

def interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction, within 0 and 1."""
    z, p = 1.96, correct / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def rows_of(found: dict[tuple, list]) -> list[dict]:
    """Rows of the report: "task", "split", "language", "what" and "n"; of marks "correct" and, from 0 to 1, "accuracy",
    "low" and "high"; of measured values their mean, "value"."""
    rows = []
    for name, marks in found.items():
        row, total, n = dict(zip(("task", "split", "language", "what"), name)), sum(marks), len(marks)
        if n and isinstance(marks[0], bool):
            low, high = interval(total, n)
            rows.append(row | {"correct": total, "n": n, "accuracy": total / n, "low": low, "high": high})
        elif n:
            rows.append(row | {"value": total / n, "n": n})
    return rows


def table(rows: list[dict]) -> str:
    """The rows to read: accuracy in per cent, with its 95% interval."""
    lines = [f"{'task':22}{'split':20}{'language':10}{'what':16}{'':>8}    95% interval, n"]
    for row in rows:
        lines.append(f"{row['task']:22}{row['split']:20}{row['language']:10}{row['what']:16}" + (
            f"{100 * row['accuracy']:7.1f}%    {100 * row['low']:.1f} to {100 * row['high']:.1f} of {row['n']}"
            if "accuracy" in row else f"{row['value']:8.4g}"))
    return "\n".join(lines)
