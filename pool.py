"""The images that a stage trains on: encoded once, drawn by weight, those of held-out splits kept apart.

Not in the paper beyond Sec. 3.5. c is the settings of a stage, see train.py.
"""
import hashlib
import itertools
import json
import random
from pathlib import Path

import torch
from PIL import Image

from data import EncodedImages, Sequence, decode_each, encode, open_dataset
from dataset import open_recipes
from distributed import Distributed
from files import read_text, write_json, write_text
from generate import Pipeline, Sampling, words_of
from images import Resize, grid, save_image
from vqgan import VQGAN


def in_training(facts: dict) -> bool:
    """Whether an image may be trained on: it is of no held-out split."""
    return facts.get("split", "train") == "train"


def digest_of(datasets: list, *more: str) -> str:
    """Changes when the names, captions, facts or, once encoded, tokens of a dataset change."""
    found = hashlib.sha256("\n".join(more).encode())
    for dataset in datasets:
        for i in range(len(dataset)):
            found.update(json.dumps([dataset.name(i), dataset.captions(i), dataset.facts(i)]).encode())
            if isinstance(dataset, EncodedImages):
                found.update(dataset[i].tobytes())
    return found.hexdigest()


def leave_out(c, bad: list[tuple[str, str]], left: list, what: str, ranks: Distributed) -> None:
    """Lists what cannot be trained on, each with its reason. Raises ValueError, one line, without --skip-bad, and where
    nothing is left."""
    if bad and not c.skip_bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0][0]}: {bad[0][1]}{more}; --skip-bad leaves out what cannot be trained on")
    if bad and ranks.is_main:
        write_json(c.out / "left-out.json", bad)
        print(f"{len(bad)} left out; {c.out / 'left-out.json'} says why")
    if not left:
        raise ValueError(f"{c.data[0]}: no {what} to train on is left")


def images_of(c, datasets: list, ranks: Distributed) -> dict[str, list[tuple]]:
    """(dataset, number) of each image to train on, "train", and of each other, "held_out", for the stage that sees
    pixels. With --skip-bad each is opened first."""
    found, bad = {"held_out": [], "train": []}, []
    for dataset, i in ((dataset, i) for dataset in datasets for i in range(len(dataset))):
        try:
            if c.skip_bad:
                dataset.image(i)
            found["train" if in_training(dataset.facts(i)) else "held_out"].append((dataset, i))
        except ValueError as error:
            bad.append((dataset.name(i), str(error)))
    leave_out(c, bad, found["train"], "image", ranks)
    return found


def recipes_of(c, encoded: list[EncodedImages], sequence, room: int, ranks: Distributed) -> list[tuple[str, Sequence]]:
    """Sec. 4.6: title and sequence of each recipe to train on. sequence(recipe, images): its layout, with image tokens
    (h, w). What lacks an image or is longer than `room` tokens: see `leave_out`."""
    found, bad = [], []
    for path, images in zip(c.data, encoded):
        at = {images.name(i): i for i in images.valid}
        for recipe in (recipe for recipe in open_recipes(path) if in_training(recipe.facts)):
            missing = [name for name in recipe.images if name not in at]
            content = None if missing else sequence(recipe, [images[at[name]] for name in recipe.images])
            if not recipe.title.strip():
                bad.append((recipe.text[:60], "a recipe without a title"))
            elif missing:
                bad.append((recipe.title, f"its image {missing[0]} is not among those of {path}"))
            elif len(content.tokens) > room:
                bad.append((recipe.title, f"a recipe of {len(content.tokens)} tokens, expected at most {room}"))
            else:
                found.append((recipe.title, content))
    leave_out(c, bad, found, "recipe", ranks)
    return found


class Pool:
    """The captioned images of several encoded folders, those to train on and those held out.

    A folder is drawn as often as another one, an image as often as its weight says.
    """

    def __init__(self, c, ranks: Distributed, encoded: list[EncodedImages], tokenizer, max_seq_len: int, longest: int):
        """longest: most tokens of an image. Raises ValueError, one line, for a caption that does not fit into the
        model's max_seq_len with them, see `leave_out`."""
        self.room, bad = max_seq_len - longest - 16, []                                # 16: size and special tokens
        if self.room < 1:
            raise ValueError(f"{c.data[0]}: images of {longest} tokens do not fit into the max_seq_len of the model, "
                             f"{max_seq_len}; expected smaller ones, or a text stage of longer sequences")
        for images in encoded:
            for i in images.valid:
                lengths = [len(tokenizer.encode(text)) for text in images.captions(i)]
                bad += [(images.name(i), f"a caption of {n} tokens, expected at most {self.room}: {text[:60]!r}")
                        for text, n in zip(images.captions(i), lengths) if n > self.room]
                images.records[i]["captions"] = [text for text, n in zip(images.captions(i), lengths)
                                                 if n <= self.room]
        train = [[i for i in images.valid if in_training(images.facts(i))] for images in encoded]
        self.folders = [(images, rows, list(itertools.accumulate(images.facts(i).get("weight", 1.0) for i in rows)))
                        for images, rows in zip(encoded, train) if rows]
        leave_out(c, bad, self.folders, "image", ranks)
        self.held_out = [(images, i) for images in encoded for i in images.valid if not in_training(images.facts(i))]

    def draw(self, rng: random.Random) -> tuple[EncodedImages, int]:
        """One image to train on."""
        images, rows, weights = rng.choice(self.folders)
        return images, rng.choices(rows, cum_weights=weights)[0]

    def some(self, n: int, seed: int) -> list[tuple[EncodedImages, int, str]]:
        """Up to n images to train on that have a caption, each with one of its captions."""
        rng = random.Random(seed)
        drawn = [(*item, self.caption(*item, rng)) for item in (self.draw(rng) for _ in range(4 * n))]
        return [item for item in drawn if item[2]][:n]

    def read_prompts(self, path: Path, tokenizer) -> list[str]:
        """The lines of a text file. Raises ValueError, one line, where there is none, or one that is too long."""
        prompts = [line for line in read_text(path).split("\n") if line.strip()]
        longest = max((len(tokenizer.encode(text)) for text in prompts), default=0)
        if not 0 < longest <= self.room:
            raise ValueError(f"{path}: the longest prompt has {longest} tokens, expected 1 to {self.room}")
        return prompts

    def names(self) -> list[str]:
        """What captions call their images: of each image those captions that hold no other one, in lower case; of an
        image made of others, such as Stage II's, only captions with a word that is new."""
        found, known, made = set(), set(), lambda item: "cells" in item[0].facts(item[1])
        for images, i in sorted(((images, i) for images, rows, _ in self.folders for i in rows), key=made):
            texts = {text.casefold() for text in images.captions(i)}
            own = {text for text in texts if not any(other != text and other in text for other in texts)}
            found |= {text for text in own if not made((images, i)) or not known.issuperset(words_of(text))}
            known.update(*map(words_of, own))
        return sorted(found)

    @staticmethod
    def caption(images: EncodedImages, i: int, rng: random.Random) -> str | None:
        """One of an image's captions; None where it has none."""
        return rng.choice(images.captions(i)) if images.captions(i) else None


def encode_all(c, vqgan: VQGAN, resize: Resize, name: str, ranks: Distributed) -> list[EncodedImages]:
    """Every folder of --data as image tokens, once; they are kept in --out."""
    return [encode(open_dataset(path), vqgan, resize, c.out / name / str(j), ranks, skip_bad=c.skip_bad)
            for j, path in enumerate(c.data)]


def sizes_of(encoded: list[EncodedImages], vqgan: VQGAN) -> tuple[tuple[int, int], ...]:
    """(H, W) in pixels of all images, squares first."""
    found = {tuple(n * vqgan.factor for n in images.shapes[i]) for images in encoded for i in images.valid}
    return tuple(sorted(found, key=lambda size: (size[0] != size[1], size)))


def image_of(vqgan: VQGAN, images: EncodedImages, i: int) -> Image.Image:
    """Image i as the image tokenizer gives it back."""
    return decode_each(vqgan, torch.from_numpy(images[i].astype("int64"))[None])[0]


def write_samples(pipeline: Pipeline, pool: Pool, path: Path, seed: int, prompts: list[str]) -> None:
    """Draws the prompts, or where there are none sixteen captions, each with its original above it: a grid, and the
    prompts as a text file."""
    chosen = [] if prompts else pool.some(16, seed)
    prompts = prompts or [text for *_, text in chosen]
    if not prompts:
        return
    originals = [image_of(pipeline.vqgan, images, i) for images, i, _ in chosen]
    sizes = [image.size[::-1] for image in originals] or [pipeline.sizes[0]] * len(prompts)
    drawn = {}
    for size in set(sizes):
        rows = [j for j in range(len(prompts)) if sizes[j] == size]
        drawn |= zip(rows, pipeline.text_to_image([prompts[j] for j in rows], Sampling(), rows, size=size))
    drawn = [drawn[j] for j in range(len(prompts))]
    rows = [part[j:j + 8] for j in range(0, len(prompts), 8) for part in (originals, drawn)]
    save_image(grid([image for row in rows for image in row], min(8, len(prompts))), path.with_suffix(".png"))
    write_text(path.with_suffix(".txt"), "\n".join(prompts) + "\n")
