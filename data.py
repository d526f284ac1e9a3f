"""Pictures with captions, and the one home of the sequence layout (paper Sec. 3.1, 3.3 and 3.4).

Two sources, alike to all that follows: a folder of images with a `metadata.jsonl`, and the rendered world.

Shapes: B batch, T tokens, (h, w) latent grid, (H, W) pixels.
"""
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import world
from checkpoint import read_json, write_beside, write_json
from tokenizer import Tokenizer, Vocabulary


# ----------------------------------------------------------------------------- the layout of a sequence

@dataclass(frozen=True)
class Sequence:
    """Ids of one training sequence, and which of them the loss of Eq. 1 is taken on: ours, the paper sums over all."""
    tokens: list[int]
    is_target: list[bool]


def picture(codes: np.ndarray | Tensor, vocabulary: Vocabulary) -> list[int]:
    """Fig. 3: codes (h, w) -> `<img>`, the codes in raster order, `</img>`."""
    codes = [vocabulary.text + int(code) for code in codes.flatten()]
    return [vocabulary.special("<img>"), *codes, vocabulary.special("</img>")]


def prompt(caption: list[int] | None, vocabulary: Vocabulary) -> list[int]:
    """What stands before a picture's first code. caption None: `<uncond>`, the dropped caption of guidance."""
    return [*([vocabulary.special("<uncond>")] if caption is None else caption), vocabulary.special("<img>")]


def text_to_image(caption: list[int] | None, codes, vocabulary: Vocabulary) -> Sequence:
    """Sec. 3.4, Stage I: caption, picture. Targets: the picture, `<img>` and `</img>` included.

    A caption's own loss would move nothing but the vision head, as every other weight it meets is frozen.
    """
    tokens = prompt(caption, vocabulary)
    start = len(tokens) - 1
    tokens = tokens[:start] + picture(codes, vocabulary)
    return Sequence(tokens, [False] * start + [True] * (len(tokens) - start))


def captioning(caption: list[int], codes, vocabulary: Vocabulary, eos: int) -> Sequence:
    """Sec. 3.4, Stage I: picture, caption. Targets: the caption and the end of text."""
    shown = picture(codes, vocabulary)
    return Sequence([*shown, *caption, eos], [False] * len(shown) + [True] * (len(caption) + 1))


def collate(sequences: list[Sequence], padding: int) -> tuple[Tensor, Tensor]:
    """Sequences -> tokens (B, T) int64, padded at the right, and is_target (B, T) bool."""
    T = max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.full((len(sequences), T), padding)
    is_target = torch.zeros((len(sequences), T), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, :len(sequence.tokens)] = torch.tensor(sequence.tokens)
        is_target[row, :len(sequence.tokens)] = torch.tensor(sequence.is_target)
    return tokens, is_target


# ----------------------------------------------------------------------------- pictures

def open_picture(path: str | Path) -> Image.Image:
    """Any image file -> RGB, upright by its EXIF tag, transparency on white. Raises ValueError, one line."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode.startswith("I;16"):                    # 16-bit grey: Pillow would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a whole image file ({error})") from None


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Sec. 3.4, Stage I: scales and crops the middle to (height, width) pixels."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) float -> RGB image; values beyond [0, 1] are clipped."""
    pixels = (pixels.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(images: list[Image.Image], columns: int = 8, gap: int = 2) -> Image.Image:
    """Images of one size side by side, row after row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def save_image(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG, beside and renamed. Raises ValueError, one line, where the path cannot be written."""
    try:
        write_beside(Path(path), lambda p: image.save(p, format="PNG"))
    except OSError as error:
        raise ValueError(f"{path}: cannot write the picture ({error.strerror or error})") from None


# ----------------------------------------------------------------------------- the two sources

class World:
    """The rendered world as a source: scene i is drawn from `seed` and i alone, so that none is ever stored.

    things: how many things each scene shows, None for one to three.
    """

    def __init__(self, pictures: int, seed: int, things: int | None = None):
        self.pictures, self.seed, self.things = pictures, seed, things
        self.name = f"world of {pictures} pictures, seed {seed}, things {things or '1 to 3'}"
        self.scenes: dict[int, tuple[world.Scene, bool]] = {}

    def __len__(self) -> int:
        return self.pictures

    def scene(self, i: int) -> tuple[world.Scene, bool]:
        """Scene i, and whether it may carry a caption."""
        if i not in self.scenes:
            self.scenes[i] = world.training_scene(random.Random(f"{self.seed}/{i}"), self.things)
        return self.scenes[i]

    def simple(self) -> list[int]:
        """The pictures of one thing alone, for the first steps of a curriculum."""
        return [i for i in range(len(self)) if len(self.scene(i)[0].things) == 1]

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB."""
        return world.render(self.scene(i)[0])

    def caption(self, i: int, rng: random.Random) -> str | None:
        """One of picture i's captions, English or Chinese, coarse or fine; None where a pair is held out."""
        scene, captioned = self.scene(i)
        if captioned:
            return world.caption(scene, rng, rng.choice(world.LANGUAGES), rng.choice(world.DETAILS))


class Folder:
    """A folder of images with `metadata.jsonl` (the imagefolder convention) as a source.

    A line is {"file_name": "cat.jpg", "text": "a cat"}; text may also be a list to draw from, or "" for a picture
    without a caption. Raises ValueError, one line with file and line number, for anything else.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.name = f"folder {self.directory.resolve()}"
        manifest = self.directory / "metadata.jsonl"
        if not manifest.is_file():
            raise ValueError(f"{manifest}: no such file; expected one line a picture, "
                             '{"file_name": "cat.jpg", "text": "a cat"}')
        self.records: list[tuple[Path, list[str]]] = []
        for number, line in enumerate(manifest.read_text().splitlines(), 1):
            if line.strip():
                self.records.append(self._record(line, f"{manifest}, line {number}"))
        if not self.records:
            raise ValueError(f"{manifest}: no picture is listed")

    def _record(self, line: str, where: str) -> tuple[Path, list[str]]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise ValueError(f'{where}: expected an object with "file_name" and "text"')
        texts = record.get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{where}: "text" must be a string or a list of strings')
        path = self.directory / record["file_name"]
        if not path.is_file():
            raise ValueError(f"{where}: {path}: no such image")
        return path, [text for text in texts if text.strip()]

    def __len__(self) -> int:
        return len(self.records)

    def simple(self) -> list[int]:
        """All pictures: nothing tells which of a folder's are simple."""
        return list(range(len(self)))

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB. Raises ValueError, one line, where the file is broken."""
        return open_picture(self.records[i][0])

    def caption(self, i: int, rng: random.Random) -> str | None:
        """One of picture i's captions, None where it has none."""
        texts = self.records[i][1]
        return rng.choice(texts) if texts else None


def open_source(data: str, pictures: int, seed: int, things: int | None = None) -> World | Folder:
    """`--data`: "world" for the rendered world, else a folder."""
    return World(pictures, seed, things) if data == "world" else Folder(data)


# ----------------------------------------------------------------------------- images are encoded once

@torch.no_grad()
def encode_once(source: World | Folder, vqgan, side: int, cache: Path, batch: int = 64) -> np.ndarray:
    """Sec. 3.3: every picture of the source as codes (n, h, w), memory-mapped from the file `cache`.

    A cache of another source, size or codec is made anew.
    """
    digest = hashlib.sha256(f"{source.name} {len(source)} {side}".encode())
    for tensor in vqgan.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    described = {"source": source.name, "side": side, "fingerprint": digest.hexdigest()}
    label = cache.with_suffix(".json")
    if not (cache.is_file() and label.is_file() and read_json(label) == described):
        device = next(vqgan.parameters()).device
        codes = np.empty((len(source), side // vqgan.factor, side // vqgan.factor), np.int32)
        for start in tqdm(range(0, len(source), batch), desc="encoding pictures once", unit="batch"):
            images = [fit(source.image(i), side, side) for i in range(start, min(start + batch, len(source)))]
            pixels = torch.stack([to_pixels(image) for image in images]).to(device)       # (B, 3, H, W)
            codes[start:start + batch] = vqgan.encode(pixels).cpu().numpy()               # (B, h, w)
        write_beside(cache, lambda p: _save_array(p, codes))
        write_json(label, described)
    return np.load(cache, mmap_mode="r")


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:                    # given a path, numpy would append its own suffix
        np.save(file, array)


def stage1_batch(source: World | Folder, codes: np.ndarray, indices, tokenizer: Tokenizer, vocabulary: Vocabulary,
                 batch: int, rng: random.Random, caption_share: float, drop: float = 0.1) -> tuple[Tensor, Tensor]:
    """Sec. 3.4, Stage I: one batch of text-to-image and captioning -> tokens (B, T), is_target (B, T).

    indices: the pictures to draw from; caption_share: chance that a pair is used for captioning; drop: chance that a caption to draw from is `<uncond>`.
    """
    sequences = []
    for _ in range(batch):
        i = rng.choice(indices)
        text = source.caption(i, rng)
        if text is not None and rng.random() < caption_share:
            sequences.append(captioning(tokenizer.encode(text), codes[i], vocabulary, tokenizer.eos))
        else:
            caption = None if text is None or rng.random() < drop else tokenizer.encode(text)
            sequences.append(text_to_image(caption, codes[i], vocabulary))
    return collate(sequences, vocabulary.special("<pad>"))


def text_batch(document, tokenizer: Tokenizer, batch: int, length: int, rng: random.Random) -> Tensor:
    """Not in the paper: `document(rng)` texts end to end, each closed by the end of text -> tokens (B, length)."""
    rows = []
    for _ in range(batch):
        row = []
        while len(row) < length:
            row += [*tokenizer.encode(document(rng)), tokenizer.eos]
        rows.append(row[:length])
    return torch.tensor(rows)
