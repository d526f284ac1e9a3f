"""The layout of a sequence (paper Sec. 3.1 to 3.4), and images that are encoded once (Sec. 3.3 and 3.5).

    python data.py encode --data FOLDER --weights weights/emoji --out TOKENS     (also under torchrun)
    python data.py inspect TOKENS --weights weights/emoji

Shapes: B batch, T tokens, K tokens predicted at each position, (h, w) latent grid, (H, W) pixels.
"""
import contextlib
import hashlib
import json
import math
import random
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from config import Parser, add_flags, build, check, ends_in_one_line, setting    # first, for Ctrl-C

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from checkpoint import fingerprint
from dataset import Captioned, Dataset, make_record
from distributed import Distributed, bad_input_is_final, cleanup, init
from files import atomic_write, check_regular, first_line, lock, read_json, write_json
from images import Resize, enlarge, grid, resize_and_crop, save_image, to_image, to_pixels
from mars import IGNORE
from tokenizer import Vocabulary
from vqgan import VQGAN


# ----------------------------------------------------------------------------- the layout of a sequence

@dataclass(frozen=True)
class Sequence:
    """Sec. 3.1: one training sequence, its ids, and which of them Eq. 1 is taken on (ours: the paper sums over all).

    The examples below write 5 7 8 9 for the image tokens of a 2 x 2 grid, and ^ below each target.
    """
    tokens: list[int]
    is_target: list[bool]


def image_ids(tokens: np.ndarray | Tensor, vocabulary: Vocabulary) -> list[int]:
    """Fig. 3: image tokens (h, w) -> ids in raster order between `<img>` and `</img>`.

        [[5, 7], [8, 9]]  ->  <img> 5 7 8 9 </img>
    """
    body = [vocabulary.text + int(token) for token in tokens.flatten()]
    return [vocabulary.special("<img>"), *body, vocabulary.special("</img>")]


def size_text(height: int, width: int) -> str:
    """Sec. 3.4, Stage II: the resolution in the caption, in pixels; the format is ours. (64, 128) -> " 64x128"."""
    return f" {height}x{width}"


def title_text(title: str) -> str:
    """Sec. 4.6, Fig. 9: the title as a prompt, on a line of its own; the format is ours. "a cake" -> "a cake\\n"."""
    return title.strip() + "\n"


def prompt(caption: list[int] | None, vocabulary: Vocabulary, size: list[int] = (), low=None) -> list[int]:
    """Sec. 3.4: what stands before the first image token that is predicted.

        a red apple <img>                       Stage I
        <uncond> <img>                          caption None: the unconditional branch of guidance
        a red apple 64x128 <img>                size: ids of `size_text`, from Stage II on
        a red apple 128x128 <img> 5 7 8 9       low: image tokens (h, w) that Stage III enlarges
    """
    start = [*([vocabulary.special("<uncond>")] if caption is None else caption), *size]
    return start + ([vocabulary.special("<img>")] if low is None else image_ids(low, vocabulary)[:-1])


def interlace(tokens, low) -> Tensor:
    """Sec. 3.4, Stage III; the order is ours: image tokens (h, w) that enlarge an image (h / f, w / f) f times, as they
    are written: the first of each f x f block, then the second of each. In each of these f * f rounds what a token
    refines is always as far back; in raster order a small model learns too late where to look.

        [[1, 2, 1, 2], [3, 4, 3, 4]], enlarging (1, 2)  ->  1 1 2 2 3 3 4 4
    """
    tokens, f = torch.as_tensor(tokens).long(), enlarged(tokens.shape, low.shape)
    return F.pixel_unshuffle(tokens[None], f)                                          # (f * f, h / f, w / f)


def deinterlace(tokens: Tensor, low) -> Tensor:
    """Image tokens (h, w), in the order of `interlace` -> in raster order."""
    (h, w), f = tokens.shape, enlarged(tokens.shape, low.shape)
    return F.pixel_shuffle(tokens.reshape(f * f, h // f, w // f), f)[0]


def enlarged(shape: tuple[int, int], low: tuple[int, int]) -> int:
    """f: how many times `shape` is as large as `low`; 1, and so raster order, where that is no whole number."""
    f = shape[0] // low[0]
    return f if tuple(shape) == (f * low[0], f * low[1]) else 1


def text_to_image(caption: list[int] | None, tokens, vocabulary: Vocabulary, size: list[int] = (),
                  low=None) -> Sequence:
    """Sec. 3.4: the caption, then the image. The loss of the caption is left out: it would move nothing but the vision
    head, as every other weight that a caption meets is frozen.

        a red apple <img> 5 7 8 9 </img>             Stages I and II
                    ^     ^ ^ ^ ^ ^
        a red apple <img> 5 7 8 9 1 2 3 4 ... </img>   Stage III: the small image, then the large one, see `interlace`
                                  ^ ^ ^ ^     ^
    """
    start = prompt(caption, vocabulary, size, low)
    given = len(start) - (low is None)
    ids = start + image_ids(tokens if low is None else interlace(tokens, low), vocabulary)[1:]
    return Sequence(ids, [False] * given + [True] * (len(ids) - given))


def captioning(caption: list[int], tokens, vocabulary: Vocabulary, eos: int, size: list[int] = ()) -> Sequence:
    """Sec. 3.4, Stage I: the image, then the caption and the end of text. size: ids of `size_text`, first of all.

        <img> 5 7 8 9 </img> a red apple <eos>
                             ^ ^   ^     ^
    """
    shown = [*size, *image_ids(tokens, vocabulary)]
    return Sequence([*shown, *caption, eos], [False] * len(shown) + [True] * (len(caption) + 1))


def joint(title: list[int], steps: list[int], images, vocabulary: Vocabulary, eos: int) -> Sequence:
    """Sec. 4.6, Fig. 9: a title, the steps as text, then one block with an image (h, w) for each step.

        how to make a cake \\n 1. ... 2. ... <multi_images> <img> 5 7 8 9 </img> <img> ... </img> </multi_images> <eos>
                              ^             ^              ^     ^       ^      ^         ^      ^               ^
    """
    block = [vocabulary.special("<multi_images>"), *(id for image in images for id in image_ids(image, vocabulary)),
             vocabulary.special("</multi_images>")]
    written = [*steps, *block, eos]
    return Sequence([*title, *written], [False] * len(title) + [True] * len(written))


def collate(sequences: list[Sequence], padding: int) -> tuple[Tensor, Tensor]:
    """Not in the paper: sequences -> tokens (B, T) int64, padded at the right, and is_target (B, T) bool."""
    tokens, is_target = ([torch.tensor(getattr(sequence, name)) for sequence in sequences]
                         for name in ("tokens", "is_target"))
    return pad_sequence(tokens, True, padding), pad_sequence(is_target, True, False)


def targets_of(tokens: Tensor, is_target: Tensor, vocabulary: Vocabulary, k: int = 1,
               offset: int | None = None) -> Tensor:
    """Eq. 1 and 2: tokens z (B, T), and which of them count -> targets (B, T, K): z_{t+k} at [:, t, k - 1], or IGNORE.

    Heads 2 to K are asked inside images only. offset (ours): and only at every K-th position, from there on, as in
    sampling; K heads then cost as much as two. Example, K = 2:

        z           a     red   <img>  5     7       </img>
        head 1      .     <img> 5      7     </img>  .
        head 2      .     .     7      </img> .      .
    """
    B, T = tokens.shape
    visual, position = tokens >= vocabulary.text, torch.arange(T, device=tokens.device)
    targets = torch.full((B, T, k), IGNORE, device=tokens.device)
    for j in range(1, min(k, T - 1) + 1):
        asked = is_target[:, j:]                                                       # (B, T - j)
        if j > 1:
            asked = asked & visual[:, :-j] & visual[:, j:]
            asked = asked if offset is None else asked & (position[:-j] % k == offset % k)
        targets[:, :-j, j - 1] = tokens[:, j:].masked_fill(~asked, IGNORE)
    return targets


# ----------------------------------------------------------------------------- images are encoded once

SHARD = 4096                          # images in one file of image tokens
SHARD_NAME = "{:09d}.safetensors"     # with the number of its first image
AT_ONCE = 64                          # images that a process encodes between two exchanges with the others
PIXELS = 64 * 256 ** 2                # that the image tokenizer works on at a time, whatever the size of the images
FILTERS = ("side", "ratio", "clip_score", "aesthetic")
NO_TOKENS = np.zeros((0, 0), int)     # the image tokens of an image that is left out


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Sec. 3.5: which images of a folder are good enough to train on. The paper gives no thresholds of scores."""
    min_side: int = setting(0, "shortest side in pixels", least=0)
    max_ratio: float = setting(1e9, "most that the longer side may be of the shorter", least=1)
    min_clip_score: float = setting(-1e9, 'least "clip_score" of metadata.jsonl')
    min_aesthetic: float = setting(-1e9, 'least "aesthetic" of metadata.jsonl')

    def __post_init__(self):
        check(self)

    def why_skipped(self, image: Image.Image, facts: dict) -> str:
        """Why an image is left out, one of FILTERS; "": it stays. An unknown score is not held against it."""
        passed = (min(image.size) >= self.min_side, max(image.size) <= self.max_ratio * min(image.size),
                  facts.get("clip_score", math.inf) >= self.min_clip_score,
                  facts.get("aesthetic", math.inf) >= self.min_aesthetic)
        return "" if all(passed) else FILTERS[passed.index(False)]


@torch.no_grad()
def encode_each(vqgan: VQGAN, images: list[Tensor]) -> list[Tensor]:
    """Sec. 3.3: pixels (3, H, W) of any sizes -> image tokens (h, w) each, on the CPU. A batch has one size."""
    device, found = next(vqgan.parameters()).device, {}
    for shape in {pixels.shape for pixels in images}:
        rows = [i for i, pixels in enumerate(images) if pixels.shape == shape]
        parts = torch.stack([images[i] for i in rows]).split(max(1, PIXELS // (shape[1] * shape[2])))
        found |= zip(rows, torch.cat([vqgan.encode(part.to(device)).cpu() for part in parts]))
    return [found[i] for i in range(len(images))]


@torch.no_grad()
def decode_each(vqgan: VQGAN, tokens: Tensor) -> list[Image.Image]:
    """Sec. 3.3: image tokens (B, h, w) -> RGB images."""
    at_once = max(1, PIXELS // (tokens[0].numel() * vqgan.factor ** 2))
    return [to_image(pixels) for part in tokens.to(next(vqgan.parameters()).device).split(at_once)
            for pixels in vqgan.decode(part)]


class EncodedImages(Captioned):
    """Sec. 3.3: a dataset encoded once, by `encode`: image tokens from one safetensors file a shard, captions in its
    header. Raises ValueError, one line, for a shard that is damaged, missing or of another run."""

    def __init__(self, directory: str | Path):
        self.directory, self.records, self.shapes, self.starts = Path(directory), [], [], []
        label = read_json(self.directory / "encoded.json")
        self.made_by, stamps = label.get("made_by"), label.get("stamps")
        if not isinstance(stamps, list) or not isinstance(self.made_by, dict) or type(self.made_by.get("V")) is not int:
            raise ValueError(f"{self.directory / 'encoded.json'}: not what `data.py encode` writes; encode again")
        for stamp in stamps:
            shard, header, shapes = open_shard(self.directory / SHARD_NAME.format(len(self.records)), stamp)
            self.records += header["records"]
            self.shapes += shapes.tolist()
            ends = shapes.prod(axis=1).cumsum().tolist()
            self.starts += [(shard, start) for start in (0, *ends[:-1])]
        self.valid = [i for i, shape in enumerate(self.shapes) if shape[0]]            # those that were not left out

    def image(self, i: int):
        """There is none any more. Raises ValueError."""
        raise ValueError(f"{self.directory}: holds image tokens, not images; expected a folder of images here")
    stamp = image

    def __getitem__(self, i: int) -> np.ndarray:
        """Image tokens (h, w) of image i; none if it was left out. Raises ValueError for tokens beyond the codebook."""
        (shard, start), (h, w) = self.starts[i], self.shapes[i]
        if not h * w:                                    # left out; safetensors has no empty slices
            return NO_TOKENS
        tokens = shard.get_slice("tokens")[start:start + h * w].reshape(h, w)
        if not 0 <= tokens.min() <= tokens.max() < self.made_by["V"]:
            raise ValueError(f"{self.directory}: {self.name(i)} has tokens from {tokens.min()} to {tokens.max()}, "
                             f"expected 0 to {self.made_by['V'] - 1}; encode again")
        return tokens


def open_dataset(directory: str | Path) -> Dataset | EncodedImages:
    """Sec. 3.5: `--data`, a folder of images, of tars, or of encoded images."""
    return EncodedImages(directory) if (Path(directory) / "encoded.json").is_file() else Dataset(directory)


def open_shard(path: Path, stamp: str) -> tuple:
    """Not in the paper: a shard, its header {"stamp", "skipped", "records"}, and the shapes (n, 2) of its image tokens.
    Raises ValueError, one line, for a shard that is not whole, or of another stamp."""
    try:
        shard = safe_open(check_regular(path), "np")
        header, shapes = json.loads(shard.metadata()["header"]), shard.get_tensor("shapes").astype(np.int64)
        header["records"] = [make_record(**record, where=path) for record in header["records"]]
        tokens = shard.get_slice("tokens")
        fits = shapes.shape == (len(header["records"]), 2) and shapes.min() >= 0 and tokens.get_dtype()[0] in "IU"
        if not fits or tokens.get_shape() != [shapes.prod(axis=1).sum()]:
            raise ValueError("its shapes do not fit its tokens")
        if header["stamp"] != stamp:
            raise ValueError("a shard of another run than encoded.json tells of")
        return shard, header, shapes
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole shard of these images ({first_line(error)}); encode again") from None


def encode(dataset: Dataset | EncodedImages, vqgan: VQGAN, resize: Resize, out: Path,
           ranks: Distributed = Distributed(), filters: Filters = Filters(), skip_bad: bool = False) -> EncodedImages:
    """Sec. 3.3: every image as image tokens (h, w), in shards in `out`; each process encodes its part of each shard.

    A shard that is there already stays if it was made of the same images, captions, sizes and image tokenizer. An image
    that cannot be read raises ValueError, one line; skip_bad: it is left out, counted, and listed in encoded.json.
    """
    made_by = {"image_tokenizer": fingerprint(vqgan), "V": vqgan.config.num_embeddings, **asdict(resize)}
    if isinstance(dataset, EncodedImages):
        if not made_by.items() <= dataset.made_by.items():
            raise ValueError(f"{dataset.directory}: encoded by another image tokenizer or at other sizes; encode again")
        return dataset
    if out.resolve() == dataset.directory.resolve():
        raise ValueError(f"{out} holds the images themselves, expected another folder for their tokens")
    made_by |= {field.name: getattr(filters, field.name) for field in fields(Filters)}
    kind = np.uint16 if made_by["V"] <= 2 ** 16 else np.int32
    stamps, skipped, each = [], [], AT_ONCE * ranks.world_size
    with tqdm(total=len(dataset), desc="encoding images", unit="image", disable=not ranks.is_main) as bar:
        for first in range(0, len(dataset), SHARD):
            rows, path = range(len(dataset))[first:first + SHARD], out / SHARD_NAME.format(first)
            stamps.append(hashlib.sha256(json.dumps([made_by, *map(dataset.stamp, rows)]).encode()).hexdigest())
            left_out = skipped_before(path, stamps[-1], skip_bad)
            if ranks.all_reduce_sum(left_out is None):                         # for any process: all encode it again
                found = []
                for start in range(0, len(rows), each):
                    mine = ranks.shard(rows[start:start + each])
                    found += ranks.all_gather(encode_rows(dataset, mine, vqgan, resize, filters, skip_bad))
                    bar.update(min(each, len(rows) - start))
                left_out = [[dataset.name(i), why] for i, (_, why) in zip(rows, found) if why]
                header = {"stamp": stamps[-1], "skipped": left_out, "records": dataset.records[first:first + SHARD]}
                arrays = {"tokens": np.concatenate([tokens.flatten() for tokens, _ in found]).astype(kind),
                          "shapes": np.array([tokens.shape for tokens, _ in found], np.int32)}
                if ranks.is_main:
                    metadata = {"header": json.dumps(header, ensure_ascii=False)}
                    atomic_write(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))
            skipped += left_out
    if ranks.is_main:
        bare = [dataset.name(i) for i in range(len(dataset)) if not dataset.captions(i)]
        write_json(out / "encoded.json", {"made_by": made_by, "stamps": stamps, "skipped": skipped, "no_caption": bare})
        for names, what in ((skipped, "left out"), (bare, "without a caption")):
            if names:
                print(f"{len(names)} of {len(dataset)} images {what}; {out / 'encoded.json'} lists them")
    ranks.barrier()
    return EncodedImages(out)


def skipped_before(path: Path, stamp: str, skip_bad: bool) -> list | None:
    """Not in the paper: (name, why) of each image that a shard left out; None where it must be made, or made again."""
    try:
        _, header, _ = open_shard(path, stamp)
    except ValueError:
        return None
    unreadable = any(why not in FILTERS for _, why in header["skipped"])
    return None if unreadable and not skip_bad else header["skipped"]


def encode_rows(dataset: Dataset, rows: list[int], vqgan: VQGAN, resize: Resize, filters: Filters,
                skip_bad: bool) -> list[tuple[np.ndarray, str]]:
    """Sec. 3.3: images of a dataset -> image tokens (h, w) of each, and why it is left out, or ""."""
    pixels, why = {}, {}
    for i in rows:
        try:
            image = dataset.image(i)
            why[i] = filters.why_skipped(image, dataset.facts(i))
            if not why[i]:
                pixels[i] = to_pixels(resize_and_crop(image, *resize.size(image, vqgan.factor)))
        except ValueError as error:
            if not skip_bad:
                raise
            why[i] = str(error)
    tokens = dict(zip(pixels, encode_each(vqgan, list(pixels.values()))))
    return [(tokens[i].numpy() if i in tokens else NO_TOKENS, why[i]) for i in rows]


# ----------------------------------------------------------------------------- the command line

@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Filters):
    """Encodes images once: a folder of images and captions -> image tokens and captions."""
    data: Path = setting(Path("data/emoji"), "a folder of images with captions")
    out: Path = setting(Path("tokens"), "the folder to write; run again, it goes on")
    weights: Path = setting(Path("weights/emoji"), "the image tokenizer, or a model with one")
    max_aspect: float = setting(1.0, "Stage II: most that the longer side may be of the shorter; 1: squares", least=1,
                                most=16)
    skip_bad: bool = setting(False, "leave out images that cannot be read, and list them")
    device: str = setting("cpu", "cpu, cuda, cuda:1 ...")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Shows what was encoded: 16 images at random, decoded, and their captions."""
    tokens: Path = setting(help="the folder that `encode` wrote")
    out: Path = setting(Path("inspect.png"), "the image to write", aliases=("-o",))
    weights: Path = setting(Path("weights/emoji"), "the image tokenizer, or a model with one")


def inspect(c: InspectConfig) -> None:
    """Not in the paper: writes images decoded from their tokens, and prints their captions: errors show."""
    encoded, vqgan = EncodedImages(c.tokens), VQGAN.from_pretrained(c.weights)
    if fingerprint(vqgan) != encoded.made_by.get("image_tokenizer"):
        raise ValueError(f"{c.tokens}: encoded by another image tokenizer than that of {c.weights}")
    if not encoded.valid:
        raise ValueError(f"{c.tokens}: no image in it was encoded, encoded.json says why")
    chosen = random.Random(0).sample(encoded.valid, min(16, len(encoded.valid)))
    images = [decode_each(vqgan, torch.from_numpy(encoded[i].astype(np.int64))[None])[0] for i in chosen]
    save_image(enlarge(grid(images)), c.out)
    for i in chosen:
        print(f"{encoded.name(i)}: {' | '.join(encoded.captions(i)) or '(no caption)'}")
    print(f"wrote {c.out}")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with bad_input_is_final(), ends_in_one_line("data.py"):
        parser = Parser("data.py", description="Encodes images once, and shows what was encoded.")
        commands = parser.add_subparsers(dest="command", required=True)
        for name, kind in (("encode", EncodeConfig), ("inspect", InspectConfig)):
            add_flags(commands.add_parser(name, help=kind.__doc__), kind)
        values = parser.parse_args(arguments)
        if values.command == "inspect":
            return inspect(build(InspectConfig, values, parser))
        c, ranks = build(EncodeConfig, values, parser), init(values.device)
        vqgan = VQGAN.from_pretrained(c.weights, ranks.device)
        dataset, resize = Dataset(c.data), Resize(vqgan.config.resolution, c.max_aspect)
        with lock(c.out) if ranks.is_main else contextlib.nullcontext():
            encoded = encode(dataset, vqgan, resize, c.out, ranks, filters=c, skip_bad=c.skip_bad)
        if ranks.is_main:
            sizes = Counter(f"{h} x {w}" for h, w in map(encoded.shapes.__getitem__, encoded.valid))
            print(f"wrote {c.out}: {len(encoded.valid)} images; tokens: "
                  + ", ".join(f"{n} of {size}" for size, n in sizes.items()))
        cleanup()


if __name__ == "__main__":
    main()
