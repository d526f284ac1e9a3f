"""Pictures with captions, and the one home of the sequence layout (paper Sec. 3.1, 3.3 and 3.4).

Sources, alike to all that follows: a folder of images with a `metadata.jsonl`, a folder of WebDataset tars, the
rendered world, and any of them encoded once:

    python data.py encode --data FOLDER --weights weights/tiny --out CODES     (also under torchrun)
    python data.py inspect CODES --weights weights/tiny

Shapes: B batch, T tokens, (h, w) latent grid, (H, W) pixels.
"""
import argparse
import hashlib
import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

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


# ----------------------------------------------------------------------------- sources

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

    def title(self, i: int) -> str:
        """What picture i is called."""
        return f"scene {i}"

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB."""
        return world.render(self.scene(i)[0])

    def captions(self, i: int) -> list[str]:
        """Four of picture i's captions, to be stored: one of each language and detail."""
        scene, captioned = self.scene(i)
        rng = random.Random(f"{self.seed}/{i}/captions")
        return [world.caption(scene, rng, language, detail) for language in world.LANGUAGES
                for detail in world.DETAILS] if captioned else []

    def caption(self, i: int, rng: random.Random) -> str | None:
        """One of picture i's captions, English or Chinese, coarse or fine; None where a pair is held out."""
        scene, captioned = self.scene(i)
        if captioned:
            return world.caption(scene, rng, rng.choice(world.LANGUAGES), rng.choice(world.DETAILS))


class Listed:
    """What sources with a list of captions have in common: `records` of (title, texts)."""

    def __init__(self, name: str, records: list[tuple[str, list[str]]]):
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

    def caption(self, i: int, rng: random.Random) -> str | None:
        """One of picture i's captions, None where it has none."""
        texts = self.captions(i)
        return rng.choice(texts) if texts else None


class Folder(Listed):
    """A folder of images with `metadata.jsonl` (the imagefolder convention) as a source.

    A line is {"file_name": "cat.jpg", "text": "a cat"}; text may also be a list to draw from, or "" for a picture
    without a caption. Raises ValueError, one line with file and line number, for anything else.
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
                    records.append((f"{path}, {name}", self._texts(sample, f"{path}, {key}")))
        if not records:
            raise ValueError(f"{directory}: no tar in it holds a picture")
        super().__init__(f"tars {Path(directory).resolve()}", records)

    def _texts(self, sample: dict, where: str) -> list[str]:
        text = sample.get("txt", "")
        if not text and "json" in sample:
            try:
                content = json.loads(sample["json"])
                text = content.get("caption") or content.get("text") or ""
            except (json.JSONDecodeError, AttributeError):
                raise ValueError(f"{where}.json: not a JSON object") from None
        return [text.strip()] if text.strip() else []

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
        records, self.shards = [], []
        for first in range(0, self.label["pictures"], SHARD):
            stem = self.directory / f"{first:09d}"
            try:
                self.shards.append(np.load(stem.with_suffix(".npy"), mmap_mode="r"))
                lines = stem.with_suffix(".jsonl").read_text().splitlines()
                records += [(line["file_name"], line["text"]) for line in map(json.loads, lines)]
            except (OSError, ValueError, KeyError):
                raise ValueError(f"{stem}: this shard is not whole; run `python data.py encode` again") from None
        super().__init__(f"codes {self.directory.resolve()}", records)
        bad = {i for i, _ in self.label["skipped"]}
        self.whole = [i for i in range(len(self)) if i not in bad]       # pictures that could be read

    def __getitem__(self, i: int) -> np.ndarray:
        """Codes (h, w) of picture i."""
        return self.shards[i // SHARD][i % SHARD]

    def image(self, i: int):
        """There is none any more. Raises ValueError."""
        raise ValueError(f"{self.directory}: holds codes, not pictures; expected --data with pictures for this")


def open_source(data: str, pictures: int, seed: int, things: int | None = None) -> World | Folder | Tars | Codes:
    """`--data`: "world" for the rendered world, else a folder: encoded, of tars, or of images."""
    if data == "world":
        return World(pictures, seed, things)
    if (Path(data) / "codes.json").is_file():
        return Codes(data)
    return Tars(data) if any(Path(data).glob("*.tar")) else Folder(data)


# ----------------------------------------------------------------------------- images are encoded once

SHARD = 4096                          # pictures in one file of codes


@torch.no_grad()
def encode(source, vqgan, side: int, out: Path, ranks: Ranks = Ranks(), skip_bad: bool = False,
           batch: int = 64) -> Codes:
    """Sec. 3.3: every picture of the source as codes (h, w), in shards under `out`; ranks take turns at the shards.

    What is there already stays, unless it is of another source, size or codec. skip_bad: pictures that cannot be
    read are listed in `codes.json` and left out; otherwise the first one raises ValueError, one line.
    """
    codec = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in vqgan.state_dict().values())).hexdigest()
    if isinstance(source, Codes):
        if (source.label["codec"], source.label["side"]) != (codec, side):
            raise ValueError(f"{source.directory}: encoded by another codec or at another size; encode it again")
        return source
    described = {"source": source.name, "pictures": len(source), "side": side, "codec": codec}
    label = out / "codes.json"
    if not label.is_file() or {**read_json(label), "skipped": None} != {**described, "skipped": None}:
        starts = ranks.share(list(range(0, len(source), SHARD)))
        bar = tqdm(total=len(starts) * SHARD, desc="encoding pictures once", unit="picture", disable=not ranks.is_first)
        found = [_encode_shard(source, vqgan, side, out, first, described, skip_bad, batch, bar) for first in starts]
        bar.close()
        skipped = sum(ranks.together(found), [])
        if ranks.is_first:
            write_json(label, described | {"skipped": skipped})
            if skipped:
                print(f"{len(skipped)} of {len(source)} pictures cannot be read; {label} lists them")
    ranks.wait()
    return Codes(out)


def _encode_shard(source, vqgan, side, out, first, described, skip_bad, batch, bar) -> list[tuple[int, str]]:
    """One shard from picture `first` on -> (index, why) of the pictures left out. A shard already there is kept."""
    stem, note = out / f"{first:09d}", described | {"first": first}
    last = min(first + SHARD, len(source))
    if stem.with_suffix(".json").is_file() and (there := read_json(stem.with_suffix(".json")))["of"] == note:
        bar.update(SHARD)
        return [tuple(entry) for entry in there["skipped"]]
    cells, device, skipped = side // vqgan.factor, next(vqgan.parameters()).device, []
    codes = np.zeros((last - first, cells, cells), np.uint16 if vqgan.config.num_embeddings <= 2 ** 16 else np.int32)
    for start in range(first, last, batch):
        pixels, rows = [], []
        for i in range(start, min(start + batch, last)):
            try:
                pixels.append(to_pixels(fit(source.image(i), side, side)))
                rows.append(i - first)
            except ValueError as error:
                if not skip_bad:
                    raise
                skipped.append((i, str(error)))
        if rows:
            codes[rows] = vqgan.encode(torch.stack(pixels).to(device)).cpu().numpy()      # (B, h, w)
        bar.update(batch)
    lines = [json.dumps({"file_name": source.title(i), "text": source.captions(i)}, ensure_ascii=False)
             for i in range(first, last)]
    write_beside(stem.with_suffix(".npy"), lambda p: _save_array(p, codes))
    write_beside(stem.with_suffix(".jsonl"), lambda p: p.write_text("\n".join(lines) + "\n"))
    write_json(stem.with_suffix(".json"), {"of": note, "skipped": skipped})              # last: now it is whole
    return skipped


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:                    # given a path, numpy would append its own suffix
        np.save(file, array)


# ----------------------------------------------------------------------------- batches

@dataclass(frozen=True)
class Row:
    """One row of a batch: a picture, its caption or None, and whether the caption is to be written or drawn from."""
    index: int
    text: str | None
    is_captioning: bool

    def sequence(self, codes: np.ndarray, tokenizer: Tokenizer, vocabulary: Vocabulary) -> Sequence:
        """The row as tokens, given the picture's codes (h, w)."""
        ids = None if self.text is None else tokenizer.encode(self.text)
        if self.is_captioning:
            return captioning(ids, codes, vocabulary, tokenizer.eos)
        return text_to_image(ids, codes, vocabulary)


def stage1_rows(source, indices, batch: int, rng: random.Random, caption_share: float, drop: float = 0.1) -> list[Row]:
    """Sec. 3.4, Stage I: one batch of text-to-image and captioning.

    indices: the pictures to draw from; caption_share: chance that a pair is used for captioning; drop: chance that a
    caption to draw from is `<uncond>`.
    """
    rows = []
    for _ in range(batch):
        i = rng.choice(indices)
        text = source.caption(i, rng)
        is_captioning = text is not None and rng.random() < caption_share
        if not is_captioning and (text is None or rng.random() < drop):
            text = None
        rows.append(Row(i, text, is_captioning))
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
    rows = torch.stack([torch.from_numpy(codes[i].astype(np.int64)) for i in chosen])
    with torch.no_grad():
        images = [to_image(pixels) for pixels in vqgan.decode(rows.to(next(vqgan.parameters()).device))]
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
            codes = encode(source, vqgan, vqgan.config.resolution, args.out, ranks, args.skip_bad)
            if ranks.is_first:
                print(f"wrote {args.out}: {len(codes.whole)} pictures of {vqgan.config.resolution // vqgan.factor} x "
                      f"{vqgan.config.resolution // vqgan.factor} codes")
        else:
            image, lines = inspect(Codes(args.codes), vqgan, args.num, args.seed)
            save_image(image, args.out)
            print("\n".join(lines))
            print(f"wrote {args.out}")
        stop()


if __name__ == "__main__":
    main()
