"""Pictures with captions, and the one home of the sequence layout (paper Sec. 3.1, 3.3 and 3.4).

Sources, alike to all that follows: a folder of images with a `metadata.jsonl`, a folder of WebDataset tars, the
rendered world, and any of them encoded once:

    python data.py encode --data FOLDER --weights weights/tiny --out CODES     (also under torchrun)
    python data.py inspect CODES --weights weights/tiny

Shapes: B batch, T tokens, (h, w) latent grid, (H, W) pixels.
"""
import argparse
import bisect
import hashlib
import io
import json
import math
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import recipes
import world
from checkpoint import one_line_errors, read_json, write_beside, write_json
from distributed import Ranks, start, stop
from tokenizer import Tokenizer, Vocabulary
from vqgan import VQGAN


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


def size_text(height: int, width: int) -> str:
    """Sec. 3.4, Stage II: the resolution in the caption, `{caption} {H}x{W}` in pixels; the format is ours."""
    return f" {height}x{width}"


def prompt(caption: list[int] | None, vocabulary: Vocabulary, size: list[int] = (), low=None) -> list[int]:
    """What stands before a picture's first code. caption None: `<uncond>`, the dropped caption of guidance; size: ids
    of `size_text`, from Stage II on; low: codes (h, w) of the picture that Stage III makes larger, and goes on with."""
    start = [*([vocabulary.special("<uncond>")] if caption is None else caption), *size]
    return start + ([vocabulary.special("<img>")] if low is None else picture(low, vocabulary)[:-1])


def interlaced(large: tuple[int, int], small: tuple[int, int]) -> np.ndarray:
    """Not in the paper: the order in which Stage III writes the (H, W) codes of a large picture, as raster indices:
    the first of those that fall on each of the (h, w) codes of the small one, in the small one's order; then the
    second of each, and so on.

    So what a code refines lies h * w places back, where the sides are whole multiples: the small picture's code, then
    the one before of the same cell. In raster order that distance would be another one for every code.
    """
    (H, W), (h, w) = large, small
    rows, cols = np.divmod(np.arange(H * W), W)
    above, left = rows * h // H, cols * w // W                                          # the small code
    return np.lexsort((left, above, cols - -(-left * W // w), rows - -(-above * H // h)))


def text_to_image(caption: list[int] | None, codes, vocabulary: Vocabulary, size: list[int] = (),
                  low=None) -> Sequence:
    """Sec. 3.4: caption, picture. Targets: the picture, `<img>` and `</img>` included. In Stage III the small picture
    stands before the large one, interlaced, in the same `<img>`; targets: the large one and `</img>`.

    A caption's own loss would move nothing but the vision head, as every other weight it meets is frozen.
    """
    tokens = prompt(caption, vocabulary, size, low)
    given = len(tokens) - (low is None)
    codes = codes if low is None else codes.flatten()[interlaced(codes.shape, low.shape)]
    tokens += picture(codes, vocabulary)[1:]
    return Sequence(tokens, [False] * given + [True] * (len(tokens) - given))


def captioning(caption: list[int], codes, vocabulary: Vocabulary, eos: int, size: list[int] = ()) -> Sequence:
    """Sec. 3.4, Stage I: picture, caption. Targets: the caption and the end of text. size: as above, first of all."""
    shown = [*size, *picture(codes, vocabulary)]
    return Sequence([*shown, *caption, eos], [False] * len(shown) + [True] * (len(caption) + 1))


def title_text(title: str) -> str:
    """Sec. 4.6: what stands before a recipe, in training and in drawing: its title, on a line of its own."""
    return " ".join(title.split()) + "\n"


def joint(title: list[int], steps: list[int], pictures, vocabulary: Vocabulary, eos: int) -> Sequence:
    """Sec. 4.6, Fig. 9: title, steps, then one block with a picture (codes (h, w)) for each step.

    title: ids of `title_text`; steps: ids of recipes.text_of. Targets: all after the title, the end of text included.
    """
    block = [vocabulary.special("<multi_images>"), *(id for codes in pictures for id in picture(codes, vocabulary)),
             vocabulary.special("</multi_images>")]
    written = [*steps, *block, eos]
    return Sequence([*title, *written], [False] * len(title) + [True] * len(written))


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

def open_picture(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Any image file -> RGB, upright by its EXIF tag, transparency on white. Raises ValueError, one line.

    content: the file's bytes, where they are at hand; `path` is then only its name.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
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


def size_of(image: Image.Image, side: int, factor: int, most: float = 2.0) -> tuple[int, int]:
    """Sec. 3.4, Stage II: (H, W) in pixels with the shorter side `side`, the longer one as the image has it, but at
    most `most` times as long; rounded to multiples of the down-sampling factor."""
    width, height = image.size
    long = round(side * min(most, max(width, height) / min(width, height)) / factor) * factor
    return (long, side) if height > width else (side, long)


def enlarge(size: tuple[int, int], long_side: int, factor: int) -> tuple[int, int]:
    """Sec. 3.4, Stage III: (H, W) of the large picture: as `size`, but with the longer side `long_side`."""
    return tuple(round(side * long_side / max(size) / factor) * factor for side in size)


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) float -> RGB image; values beyond [0, 1] are clipped."""
    pixels = (pixels.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def psnr(images: list[Image.Image], truths: list[Image.Image]) -> float:
    """Not in the paper: peak signal-to-noise ratio in dB, of each picture, then the mean, as is usual for upscaling.

    An error below that of rounding to whole numbers counts as that: at most 58.9 dB.
    """
    errors = [np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) for a, b in zip(images, truths)]
    return float(np.mean([10 * math.log10(255 ** 2 / max(error, 1 / 12)) for error in errors]))


def grid(images: list[Image.Image], columns: int = 8, gap: int = 2) -> Image.Image:
    """Images side by side, row after row, each at the top left of its place, on white."""
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
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


# ----------------------------------------------------------------------------- sources

class World:
    """The rendered world as a source: scene i is drawn from `seed` and i alone, so that none is ever stored.

    things: how many things each scene shows, None for one to three; frames: (rows, cols, pixels a cell) to choose from;
    details, languages: of captions, as often as each is named.
    """

    def __init__(self, pictures: int, seed: int, things: int | None = None, frames=((6, 6, 16),),
                 details=world.DETAILS, languages=world.LANGUAGES):
        self.pictures, self.seed, self.things, self.frames = pictures, seed, things, frames
        self.details, self.languages = details, languages
        self.name = f"world of {pictures} pictures, seed {seed}, things {things or '1 to 3'}, frames {frames}"
        self.scenes: dict[int, tuple[world.Scene, bool]] = {}

    def __len__(self) -> int:
        return self.pictures

    def frame(self, i: int) -> tuple[int, int, int]:
        """Rows, cols and pixels a cell of picture i."""
        return random.Random(f"{self.seed}/{i}/size").choice(self.frames)

    def scene(self, i: int) -> tuple[world.Scene, bool]:
        """Scene i, and whether it may carry a caption."""
        if i not in self.scenes:
            self.scenes[i] = world.training_scene(random.Random(f"{self.seed}/{i}"), self.things, *self.frame(i)[:2])
        return self.scenes[i]

    def simple(self) -> list[int]:
        """The pictures of one thing alone, for the first steps of a curriculum."""
        return [i for i in range(len(self)) if len(self.scene(i)[0].things) == 1]

    def title(self, i: int) -> str:
        """What picture i is called."""
        return f"scene {i}"

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB."""
        return world.render(self.scene(i)[0], self.frame(i)[2])

    def captions(self, i: int) -> list[str]:
        """Four of picture i's captions, to be stored: one of each language and detail."""
        scene, captioned = self.scene(i)
        rng = random.Random(f"{self.seed}/{i}/captions")
        return [world.caption(scene, rng, language, detail) for language in world.LANGUAGES
                for detail in world.DETAILS] if captioned else []

    def scores(self, i: int) -> dict[str, float]:
        """What filters may ask of picture i: nothing."""
        return {}

    def caption(self, i: int, rng: random.Random, to_write: bool = False) -> str | None:
        """One of picture i's captions, English or Chinese, coarse or fine; None where a pair is held out.

        to_write: one for the model to write, told in reading order. Which of two things a caption names first is else
        a toss of a coin that "above" or "below" has to agree with, and the frozen language side never learned that.
        """
        scene, captioned = self.scene(i)
        if captioned:
            return world.caption(scene, rng, rng.choice(self.languages), rng.choice(self.details), in_order=to_write)


class Listed:
    """What sources with a list of captions have in common: `records` of (title, texts), or (title, texts, scores)."""

    def __init__(self, name: str, records: list[tuple]):
        self.name, self.records = name, records

    def __len__(self) -> int:
        return len(self.records)

    def simple(self) -> list[int]:
        """All pictures: nothing tells which are simple."""
        return list(range(len(self)))

    def title(self, i: int) -> str:
        """What picture i is called."""
        return str(self.records[i][0])

    def captions(self, i: int) -> list[str]:
        """All captions of picture i."""
        return self.records[i][1]

    def scores(self, i: int) -> dict[str, float]:
        """The numbers that the manifest has on picture i, such as clip_score."""
        return self.records[i][2]

    def caption(self, i: int, rng: random.Random, to_write: bool = False) -> str | None:
        """One of picture i's captions, None where it has none; a picture of one's own has the same for both tasks."""
        texts = self.captions(i)
        return rng.choice(texts) if texts else None


class RecipePictures(Listed):
    """Sec. 4.6, in the rendered world: the pictures of all steps of `count` recipes as a source; recipe j is drawn
    from `seed` and j alone."""

    def __init__(self, count: int, seed: int):
        self.recipes = [recipes.sample(random.Random(f"{seed}/recipe/{j}")) for j in range(count)]
        self.places = [(j, k) for j, recipe in enumerate(self.recipes) for k in range(len(recipe.steps))]
        super().__init__(f"pictures of {count} recipes, seed {seed}",
                         [(f"recipe {j}, step {k}", [self.recipes[j].steps[k]], {}) for j, k in self.places])

    def of(self, j: int) -> list[int]:
        """The pictures of recipe j, in the order of its steps."""
        first = bisect.bisect_left(self.places, (j, 0))
        return list(range(first, first + len(self.recipes[j].steps)))

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB."""
        j, k = self.places[i]
        return world.render(self.recipes[j].scenes[k])


def scores_of(record: dict, where: str) -> dict[str, float]:
    """The numbers of a manifest's record that Filters know. Raises ValueError, one line, where one is no number."""
    scores = {name: record[name] for name in ("clip_score", "aesthetic") if name in record}
    for name, score in scores.items():
        if not isinstance(score, (int, float)):
            raise ValueError(f'{where}: "{name}" is {score!r}, expected a number')
    return scores


class Folder(Listed):
    """A folder of images with `metadata.jsonl` (the imagefolder convention) as a source.

    A line is {"file_name": "cat.jpg", "text": "a cat"}; text may also be a list to draw from, or "" for a picture
    without a caption; "clip_score" and "aesthetic" may be there for Filters. Raises ValueError, one line with file
    and line number, for anything else.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        manifest = self.directory / "metadata.jsonl"
        if not manifest.is_file():
            raise ValueError(f"{manifest}: no such file; expected one line a picture, "
                             '{"file_name": "cat.jpg", "text": "a cat"}')
        super().__init__(f"folder {self.directory.resolve()}",
                         [self._record(line, f"{manifest}, line {number}")
                          for number, line in enumerate(manifest.read_text().splitlines(), 1) if line.strip()])
        if not self.records:
            raise ValueError(f"{manifest}: no picture is listed")

    def _record(self, line: str, where: str) -> tuple[Path, list[str], dict[str, float]]:
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
        return path, [text for text in texts if text.strip()], scores_of(record, where)

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB. Raises ValueError, one line, where the file is broken."""
        return open_picture(self.records[i][0])


class Tars(Listed):
    """A folder of tars in the WebDataset convention as a source: `key.jpg` beside `key.txt`, or `key.json`.

    The caption is the .txt, or "caption" or "text" of the .json; a picture without either has none.
    """

    PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

    def __init__(self, directory: str | Path):
        self.places: list[tuple[Path, int, int]] = []                     # tar, offset and size of each picture
        records = []
        for path in sorted(Path(directory).glob("*.tar")):
            samples: dict[str, dict] = {}
            try:
                with tarfile.open(path) as tar:
                    for member in tar:
                        key, _, suffix = member.name.rpartition(".")
                        if suffix.lower() in self.PICTURES:
                            samples.setdefault(key, {})["place"] = (path, member.offset_data, member.size, member.name)
                        elif suffix in ("txt", "json"):
                            samples.setdefault(key, {})[suffix] = tar.extractfile(member).read().decode()
            except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
                raise ValueError(f"{path}: not a whole tar of pictures and captions ({error})") from None
            for key, sample in samples.items():
                if "place" in sample:
                    *place, name = sample["place"]
                    self.places.append(tuple(place))
                    records.append((f"{path}, {name}", *self._about(sample, f"{path}, {key}")))
        if not records:
            raise ValueError(f"{directory}: no tar in it holds a picture")
        super().__init__(f"tars {Path(directory).resolve()}", records)

    def _about(self, sample: dict, where: str) -> tuple[list[str], dict[str, float]]:
        try:
            content = json.loads(sample.get("json", "{}"))
            text = sample.get("txt") or content.get("caption") or content.get("text") or ""
        except (json.JSONDecodeError, AttributeError):
            raise ValueError(f"{where}.json: not a JSON object") from None
        if not isinstance(text, str):
            raise ValueError(f"{where}.json: its caption is {text!r}, expected a string")
        return [text.strip()] if text.strip() else [], scores_of(content, f"{where}.json")

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB. Raises ValueError, one line, where the file is broken."""
        path, offset, size = self.places[i]
        with path.open("rb") as file:
            file.seek(offset)
            return open_picture(self.title(i), file.read(size))


class Codes(Listed):
    """A source encoded once, by `encode`: codes memory-mapped from shards, captions beside them.

    Raises ValueError, one line, where the folder is not whole.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.label = read_json(self.directory / "codes.json")
        if "left_out" not in self.label:
            raise ValueError(f"{self.directory / 'codes.json'}: of another version; run `python data.py encode` again")
        records, self.shards, self.places = [], [], []                    # places: (shard, start, h, w)
        for first in range(0, self.label["pictures"], SHARD):
            stem, start = self.directory / f"{first:09d}", 0
            try:
                self.shards.append(np.load(stem.with_suffix(".npy"), mmap_mode="r"))
                for line in map(json.loads, stem.with_suffix(".jsonl").read_text().splitlines()):
                    records.append((line["file_name"], line["text"]))
                    self.places.append((len(self.shards) - 1, start, *line["codes"]))
                    start += line["codes"][0] * line["codes"][1]
                if start != len(self.shards[-1]):
                    raise ValueError
            except (OSError, ValueError, KeyError):
                raise ValueError(f"{stem}: this shard is not whole; run `python data.py encode` again") from None
        super().__init__(f"codes {self.directory.resolve()}", records)
        left_out = {i for i, _ in self.label["left_out"]}
        self.whole = [i for i in range(len(self)) if i not in left_out]
        if not self.whole:
            raise ValueError(f"{self.directory}: no picture is left of {len(self)}; codes.json lists why")

    def __getitem__(self, i: int) -> np.ndarray:
        """Codes (h, w) of picture i."""
        shard, start, h, w = self.places[i]
        return self.shards[shard][start:start + h * w].reshape(h, w)

    def buckets(self, indices: list[int]) -> dict[tuple[int, int], list[int]]:
        """The pictures among `indices` by their (h, w)."""
        found: dict[tuple[int, int], list[int]] = {}
        for i in indices:
            found.setdefault(self.places[i][2:], []).append(i)
        return found

    def image(self, i: int):
        """There is none any more. Raises ValueError."""
        raise ValueError(f"{self.directory}: holds codes, not pictures; expected --data with pictures for this")


def open_source(data: str, pictures: int, seed: int, **settings) -> World | Folder | Tars | Codes:
    """`--data`: "world" for the rendered world (settings: its own), else a folder: encoded, of tars, or of images."""
    if data == "world":
        return World(pictures, seed, **settings)
    if (Path(data) / "codes.json").is_file():
        return Codes(data)
    return Tars(data) if any(Path(data).glob("*.tar")) else Folder(data)


# ----------------------------------------------------------------------------- images are encoded once

SHARD = 4096                          # pictures in one file of codes
PIXELS = 64 * 256 ** 2                # that the codec works on at a time, whatever the size of the pictures


@dataclass(frozen=True)
class Filters:
    """Sec. 3.5: which pictures of a folder are good enough to train on. Sec. 3.4 gives a side of 256 pixels and a
    ratio of 2; thresholds of scores are not in the paper."""
    min_side: int = 0             # shorter side in pixels
    max_ratio: float = math.inf   # longer side to shorter side
    min_clip_score: float = -math.inf     # of the manifest's "clip_score"
    min_aesthetic: float = -math.inf      # of the manifest's "aesthetic"

    def reason(self, image: Image.Image, scores: dict[str, float]) -> str | None:
        """Why a picture is left out, None where it stays. A score that the manifest lacks is not held against it."""
        if min(image.size) < self.min_side:
            return "side"
        if max(image.size) > self.max_ratio * min(image.size):
            return "ratio"
        for name, least in (("clip_score", self.min_clip_score), ("aesthetic", self.min_aesthetic)):
            if scores.get(name, math.inf) < least:
                return name


@torch.no_grad()
def encode_each(vqgan, pictures: list[Tensor]) -> list[Tensor]:
    """Sec. 3.3: pixels (3, H, W) of any sizes -> codes (h, w) each, on the CPU; pictures of a size share a batch."""
    device, codes = next(vqgan.parameters()).device, [None] * len(pictures)
    for shape in dict.fromkeys(pixels.shape for pixels in pictures):
        rows = [i for i, pixels in enumerate(pictures) if pixels.shape == shape]
        at_once = max(1, PIXELS // (shape[1] * shape[2]))
        for some in (rows[start:start + at_once] for start in range(0, len(rows), at_once)):
            for i, found in zip(some, vqgan.encode(torch.stack([pictures[i] for i in some]).to(device)).cpu()):
                codes[i] = found
    return codes


@torch.no_grad()
def decode_each(vqgan, codes: Tensor) -> list[Image.Image]:
    """Sec. 3.3: codes (B, h, w) -> RGB images."""
    at_once = max(1, PIXELS // (codes[0].numel() * vqgan.factor ** 2))
    return [to_image(pixels) for some in codes.to(next(vqgan.parameters()).device).split(at_once)
            for pixels in vqgan.decode(some)]


@dataclass(frozen=True)
class Encoding:
    """How pictures become codes: at one square size, or from Stage II on each with its aspect ratio (Sec. 3.4)."""
    side: int                     # of the square, or the shorter side; in pixels
    keep_aspect: bool = False
    long_side: int = 0            # Stage III's large pictures: then made this long; 0: left at `side`
    filters: Filters = Filters()
    skip_bad: bool = False        # leave out files that cannot be read, instead of stopping at the first

    def prepare(self, image: Image.Image, factor: int) -> Image.Image:
        """The image at the size that is encoded."""
        size = size_of(image, self.side, factor) if self.keep_aspect else (self.side, self.side)
        return fit(image, *(enlarge(size, self.long_side, factor) if self.long_side else size))


def encode(source, vqgan, how: Encoding, out: Path, ranks: Ranks = Ranks(), batch: int = 64) -> Codes:
    """Sec. 3.3: every picture of the source as codes (h, w), in shards under `out`; ranks take turns at the shards.

    What is there already stays, unless it is of another source, encoding or codec. Pictures left out are listed in
    `codes.json`. Raises ValueError, one line, at the first that cannot be read, unless how.skip_bad.
    """
    codec = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in vqgan.state_dict().values())).hexdigest()
    described = {"codec": codec, "side": how.side, "keep_aspect": how.keep_aspect, "long_side": how.long_side}
    if isinstance(source, Codes):
        if any(source.label[name] != value for name, value in described.items()):
            raise ValueError(f"{source.directory}: encoded by another codec or at other sizes; encode it again")
        return source
    described |= {"source": source.name, "pictures": len(source), "filters": str(how.filters)}
    label = out / "codes.json"
    if not label.is_file() or {**read_json(label), "left_out": None} != {**described, "left_out": None}:
        starts = ranks.share(list(range(0, len(source), SHARD)))
        bar = tqdm(total=len(starts) * SHARD, desc="encoding pictures once", unit="picture", disable=not ranks.is_first)
        found = [_encode_shard(source, vqgan, how, out, first, described, batch, bar) for first in starts]
        bar.close()
        left_out = sum(ranks.together(found), [])
        if ranks.is_first:
            write_json(label, described | {"left_out": left_out})
            for why in sorted({why.partition(":")[0] for _, why in left_out}):
                count = sum(reason.startswith(why) for _, reason in left_out)
                print(f"{count} of {len(source)} pictures left out, {why}; {label} lists them")
    ranks.wait()
    return Codes(out)


def _encode_shard(source, vqgan, how, out, first, described, batch, bar) -> list[tuple[int, str]]:
    """One shard from picture `first` on -> (index, why) of the pictures left out. A shard already there is kept."""
    stem, note = out / f"{first:09d}", described | {"first": first}
    last = min(first + SHARD, len(source))
    if stem.with_suffix(".json").is_file() and (there := read_json(stem.with_suffix(".json")))["of"] == note:
        bar.update(SHARD)
        return [tuple(entry) for entry in there["left_out"]]
    left_out, codes = [], {}
    for start in range(first, last, batch):
        pixels = {}
        for i in range(start, min(start + batch, last)):
            try:
                image = source.image(i)
            except ValueError as error:
                if not how.skip_bad:
                    raise
                left_out.append((i, f"cannot be read: {error}"))
                continue
            if reason := how.filters.reason(image, source.scores(i)):
                left_out.append((i, f"filtered by {reason}"))
            else:
                pixels[i] = to_pixels(how.prepare(image, vqgan.factor))
        codes |= zip(pixels, encode_each(vqgan, list(pixels.values())))
        bar.update(batch)
    kind = np.uint16 if vqgan.config.num_embeddings <= 2 ** 16 else np.int32
    flat = np.concatenate([np.zeros(0, kind), *(found.flatten().numpy().astype(kind) for found in codes.values())])
    lines = [json.dumps({"file_name": source.title(i), "text": source.captions(i),
                         "codes": list(codes[i].shape) if i in codes else [0, 0]}, ensure_ascii=False)
             for i in range(first, last)]
    write_beside(stem.with_suffix(".npy"), lambda p: _save_array(p, flat))
    write_beside(stem.with_suffix(".jsonl"), lambda p: p.write_text("\n".join(lines) + "\n"))
    write_json(stem.with_suffix(".json"), {"of": note, "left_out": left_out})            # last: now it is whole
    return left_out


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:                    # given a path, numpy would append its own suffix
        np.save(file, array)


# ----------------------------------------------------------------------------- batches

@dataclass(frozen=True)
class Row:
    """One row of a batch: a picture, its caption or None, and whether the caption is to be written or drawn from."""
    index: int
    text: str | None
    is_captioning: bool = False
    low: np.ndarray | None = None  # Stage III: codes (h, w) of the same picture, smaller

    def sequence(self, codes: np.ndarray, tokenizer: Tokenizer, vocabulary: Vocabulary,
                 size: list[int] = ()) -> Sequence:
        """The row as tokens, given the picture's codes (h, w) and, from Stage II on, the ids of its size."""
        ids = None if self.text is None else tokenizer.encode(self.text)
        if self.is_captioning:
            return captioning(ids, codes, vocabulary, tokenizer.eos, size)
        return text_to_image(ids, codes, vocabulary, size, self.low)


def stage1_rows(source, indices, batch: int, rng: random.Random, caption_share: float, drop: float = 0.1) -> list[Row]:
    """Sec. 3.4, Stage I: one batch of text-to-image and captioning.

    indices: the pictures to draw from; caption_share: chance that a pair is used for captioning; drop: chance that a
    caption to draw from is `<uncond>`.
    """
    rows = []
    for _ in range(batch):
        i = rng.choice(indices)
        to_write = rng.random() < caption_share
        text = source.caption(i, rng, to_write)
        if text is None or (not to_write and rng.random() < drop):
            rows.append(Row(i, None))
        else:
            rows.append(Row(i, text, to_write))
    return rows


def stage3_rows(source, low: Codes, indices, batch: int, rng: random.Random, corruption: float, codes: int,
                drop: float = 0.1) -> list[Row]:
    """Sec. 3.4, Stage III: one batch of caption, small picture, large picture.

    corruption: chance that a code of the small picture is any of the `codes` (ours: when drawing, the small picture
    is the model's own and not free of errors); drop: as above.
    """
    rows = stage1_rows(source, indices, batch, rng, caption_share=0.0, drop=drop)
    noise = np.random.default_rng(rng.getrandbits(64))
    for k, row in enumerate(rows):
        small = np.array(low[row.index])                                                 # (h, w)
        wrong = noise.random(small.shape) < corruption
        small[wrong] = noise.integers(codes, size=wrong.sum())
        rows[k] = Row(row.index, row.text, low=small)
    return rows


def text_rows(document, tokenizer: Tokenizer, batch: int, length: int, rng: random.Random) -> list[list[int]]:
    """Not in the paper: `document(rng)` texts end to end, each closed by the end of text: rows of `length` ids."""
    rows = []
    for _ in range(batch):
        row = []
        while len(row) < length:
            row += [*tokenizer.encode(document(rng)), tokenizer.eos]
        rows.append(row[:length])
    return rows


# ----------------------------------------------------------------------------- the command line

def inspect(codes: Codes, vqgan, n: int, seed: int) -> tuple[Image.Image, list[str]]:
    """A grid of n random pictures, decoded from their codes, and their captions: training on wrong codes shows."""
    chosen = random.Random(seed).sample(codes.whole, min(n, len(codes.whole)))
    images = [decode_each(vqgan, torch.from_numpy(codes[i].astype(np.int64))[None])[0] for i in chosen]
    return grid(images), [f"{codes.title(i)}: {' | '.join(codes.captions(i)) or '(no caption)'}" for i in chosen]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Encodes pictures once, and shows what was encoded.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    encoder = commands.add_parser("encode", help="pictures and captions -> codes and captions")
    encoder.add_argument("--data", required=True, help='a folder with metadata.jsonl or *.tar, or "world"')
    encoder.add_argument("--out", type=Path, required=True, help="the folder to write; run again, it goes on")
    encoder.add_argument("--pictures", type=int, default=60_000, help="how many, of the rendered world")
    encoder.add_argument("--keep-aspect", action="store_true", help="Stage II: not squares; the shorter side is fixed")
    for name, what in (("min-side", "shortest side in pixels"), ("max-ratio", "longer to shorter side"),
                       ("min-clip-score", "of the manifest"), ("min-aesthetic", "of the manifest")):
        encoder.add_argument(f"--{name}", type=float, default=getattr(Filters, name.replace("-", "_")), help=what)
    encoder.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read, listed")
    viewer = commands.add_parser("inspect", help="a grid of decoded pictures, and their captions")
    viewer.add_argument("codes", type=Path, metavar="CODES")
    viewer.add_argument("--num", type=int, default=16, help="how many")
    viewer.add_argument("-o", "--out", type=Path, default=Path("inspect.png"))
    for command in (encoder, viewer):
        command.add_argument("--weights", default="weights/tiny/vqgan", help="the codec's folder")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("data.py"):
        ranks = start(args.device)
        vqgan = VQGAN.from_pretrained(args.weights, ranks.device)
        if args.command == "encode":
            source = open_source(args.data, args.pictures, args.seed)
            filters = Filters(args.min_side, args.max_ratio, args.min_clip_score, args.min_aesthetic)
            how = Encoding(vqgan.config.resolution, args.keep_aspect, filters=filters, skip_bad=args.skip_bad)
            codes = encode(source, vqgan, how, args.out, ranks)
            if ranks.is_first:
                sizes = ", ".join(f"{len(rows)} of {h} x {w}" for (h, w), rows in codes.buckets(codes.whole).items())
                print(f"wrote {args.out}: {len(codes.whole)} pictures; codes: {sizes}")
        else:
            image, lines = inspect(Codes(args.codes), vqgan, args.num, args.seed)
            save_image(image, args.out)
            print("\n".join(lines))
            print(f"wrote {args.out}")
        stop()


if __name__ == "__main__":
    main()
