"""From a prompt to an image, from an image to a caption, and both at once: pipeline and command (paper Sec. 3.4, 4.6).

    python generate.py "red apple" 红苹果 --num 4                    a grid of eight, out.png
    python generate.py "red apple" --film apple.gif                  the image as it appears, token by token
    python generate.py --caption out.png
    python generate.py --upscale out.png --prompt "red apple"        Stage III
    python generate.py --recipe "how to make a woman astronaut"      Sec. 4.6: text and images, out.md

How a token is sampled stands in sampling.py.
"""
import difflib
import math
import re
import sys
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from urllib.parse import quote

from config import ends_in_one_line, parse, setting    # first, for Ctrl-C

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import fingerprint
from data import captioning, decode_each, deinterlace, encode_each, prompt, size_text, text_to_image, title_text
from distributed import check_device
from files import atomic_write, read_text, write_text
from images import enlarge, grid, open_image, resize_and_crop, save_image, to_pixels, undo_enlarge, upscaled_size
from mars import MARS
from sampling import GREEDY, Sampling, generate_image_tokens, generate_text, log_likelihood
from step import for_sampling
from tokenizer import QwenTokenizer, TextTokenizer, load_tokenizer
from vqgan import VQGAN

WEIGHTS = Path(__file__).parent / "weights" / "emoji"
BATCH = 64                            # sequences sampled at a time
TEXT = 128                            # most tokens of a caption, and of the steps of a recipe
SMALL = 100_000_000                   # parameters of a model that one thread of the CPU samples from fastest
SPACING = 1_000_003                   # between the seeds of an image's candidates: more than any grid has images


# ----------------------------------------------------------------------------- the best of several

def keep_best(n: int, make, score) -> list:
    """Sec. 4, MARS*: of each item the candidate that scores highest. make(j): candidate j of each item; score(items): a
    float for each."""
    tries = [make(j) for j in range(n)]
    if n == 1:
        return tries[0]
    scores = [score(items) for items in tries]
    return [tries[max(range(n), key=lambda j: scores[j][i])][i] for i in range(len(tries[0]))]


def in_batches(make, *columns) -> list:
    """Not in the paper: make(*columns), a list, for 64 rows at a time, with a progress bar where there are more."""
    starts = range(0, len(columns[0]), BATCH)
    return [item for start in tqdm(starts, unit="batch", disable=len(starts) < 2)
            for item in make(*(column[start:start + BATCH] for column in columns))]


# ----------------------------------------------------------------------------- the whole path

def load_stage(directory: str | Path, device="cpu") -> tuple[MARS, VQGAN, TextTokenizer | QwenTokenizer]:
    """Not in the paper: model, image tokenizer and text tokenizer of a folder that train.py wrote; the image tokenizer
    is in `vqgan` inside it or next to it. A CPU computes in float32. Raises ValueError, one line, for a bad folder, a
    language model alone, or another image tokenizer than it had."""
    directory = Path(directory).resolve()
    model = MARS.from_pretrained(directory, device)
    if not model.vocabulary.image:
        raise ValueError(f"{directory}: a language model alone, expected weights of train.py from stage1 on")
    own, wanted = (directory / "vqgan").is_dir(), model.config.image_tokenizer
    folder = (directory if own else directory.parent) / "vqgan"
    vqgan = VQGAN.from_pretrained(folder, device)
    if fingerprint(vqgan) != wanted and (wanted or not own):
        raise ValueError(f"{folder}: another image tokenizer than the one that {directory} was trained with")
    return model.float() if torch.device(device).type == "cpu" else model, vqgan, load_tokenizer(directory)


class Pipeline:
    """Not in the paper: from prompts to RGB images and back. Each image has a seed, which alone decides what is sampled
    for it; by default its number in the list. Bad input raises ValueError, one line."""

    def __init__(self, model: MARS, vqgan: VQGAN, tokenizer: TextTokenizer | QwenTokenizer):
        self.model, self.vqgan, self.tokenizer, self.vocabulary = model, vqgan, tokenizer, model.vocabulary
        self.sizes = model.config.sizes or ((vqgan.config.resolution,) * 2,)     # (H, W) in pixels, as trained
        has, wants = (len(tokenizer), vqgan.config.num_embeddings), (self.vocabulary.text, self.vocabulary.image)
        if has[0] > wants[0] or has[1] != wants[1]:
            raise ValueError(f"the text and image tokenizers have {has} tokens, the model expects {wants}")

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu") -> "Pipeline":
        """From a folder that train.py wrote, from stage1 on, see `load_stage`."""
        model, vqgan, tokenizer = load_stage(directory, device)
        return cls(for_sampling(model), vqgan, tokenizer)

    def text_to_image(self, prompts: list[str], sampling: Sampling = Sampling(), seeds: list[int] | None = None, *,
                      size: tuple[int, int] | None = None, best_of: int = 1, on_tokens=None) -> list[Image.Image]:
        """Sec. 3.4, Stages I and II: an image for each prompt, of `size` (H, W) in pixels; default: the first of sizes.
        Of best_of candidates the one stays that makes its prompt likeliest as its caption. on_tokens: as in `decode`.
        """
        captions, size = [self._encode(text) for text in prompts], size or self.sizes[0]
        v, eos, (size_ids, _) = self.vocabulary, self.tokenizer.eos, self._layout(size)
        make = lambda j: self._sample(captions, size, sampling, self._seeds(seeds, prompts, j), on_tokens=on_tokens)
        score = lambda images: self._likelihood(captioning(ids, image, v, eos, size_ids)
                                                for ids, image in zip(captions, images))
        return self._decode(keep_best(best_of, make, score))

    def super_resolve(self, images: list[Image.Image], prompts: list[str], sampling: Sampling = GREEDY,
                      seeds: list[int] | None = None, on_tokens=None) -> list[Image.Image]:
        """Sec. 3.4, Stage III: images and what they show -> the same, larger, a square with `long_side` pixels a side.
        Greedy by default: detail is added, not invented. on_tokens: as in `decode`."""
        larger, sizes = {}, [self._nearest_size(image) for image in images]
        captions, seeds, low = map(self._encode, prompts), self._seeds(seeds, images), self._encode_images(images)
        rows = list(zip(captions, seeds, low))
        for size in set(sizes):
            chosen = [i for i in range(len(images)) if sizes[i] == size]
            captions, seeds, low = map(list, zip(*(rows[i] for i in chosen)))
            larger |= zip(chosen, self._decode(self._sample(captions, size, sampling, seeds, low, on_tokens)))
        return [larger[i] for i in range(len(images))]

    def caption_images(self, images: list[Image.Image], best_of: int = 1, seed: int = 0) -> list[str]:
        """Sec. 3.4, captioning: a caption for each image. Of best_of candidates, the first greedy, the others sampled,
        the one stays that makes its image likeliest."""
        tokens, v, eos = self._encode_images(images), self.vocabulary, self.tokenizer.eos
        sizes = [self._layout(self._nearest_size(image))[0] for image in images]
        shown = [captioning([], image, v, eos, size).tokens[:-1] for image, size in zip(tokens, sizes)]
        seeds = range(seed, seed + len(images))
        make = lambda j: [ids for ids, _ in self._write(shown, Sampling() if j else GREEDY,
                                                        self._seeds(seeds, images, j))]
        score = lambda captions: self._likelihood(text_to_image(ids, image, v, size)
                                                  for ids, image, size in zip(captions, tokens, sizes))
        return [self.tokenizer.decode(ids).strip() for ids in keep_best(best_of, make, score)]

    def interleaved(self, titles: list[str], sampling: Sampling = Sampling(),
                    seeds: list[int] | None = None) -> list[tuple[str, list[Image.Image]]]:
        """Sec. 4.6: titles -> (text, images) of each, by weights of train.py joint; at most as many images as fit."""
        prompts = [self._encode(title, title_text) for title in titles]
        pages = self._write(prompts, sampling, self._seeds(seeds, titles), images=True)
        return [(self.tokenizer.decode(ids).strip(), self._decode(tokens)) for ids, tokens in pages]

    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        """Sec. 3.3, Tokenization: images -> what is left of them after the image tokenizer."""
        tokens = encode_each(self.vqgan, [to_pixels(image) for image in images])
        return [image for grid in tokens for image in self._decode([grid])]

    def film(self, steps: list[Tensor], size: tuple[int, int] | None = None) -> list[Image.Image]:
        """Not in the paper: an image as it appears, of its tokens (1, t) after each forward pass, as `on_tokens` got
        them. What is undecided is grey, and decoded as if it were the first token."""
        (_, (h, w)), f = self._layout(size or self.sizes[0]), self.vqgan.factor
        frames = self._decode([torch.cat((step[0], step[0, :1].expand(h * w - step.shape[1]))).view(h, w)
                               for step in steps])
        for frame, step in zip(frames, steps):
            for y, x in (divmod(cell, w) for cell in range(step.shape[1], h * w)):
                frame.paste("lightgrey", (x * f, y * f, (x + 1) * f, (y + 1) * f))
        return frames

    # ------------------------------------------------------------------------- what these have in common

    def _seeds(self, seeds, items: list, j: int = 0) -> list[int]:
        """A seed for candidate j of each item; candidate 0 has the item's own."""
        return [seed + SPACING * j for seed in (range(len(items)) if seeds is None else seeds)]

    def _encode(self, text: str, layout=str) -> list[int]:
        """A prompt's ids. layout(text): as sequences spell it."""
        text = text.strip()
        if not text or text.encode("utf-8", "ignore").decode() != text:
            raise ValueError(f"the prompt is {text!r}, expected a description in UTF-8, such as \"red apple\"")
        return self.tokenizer.encode(layout(text))

    def _nearest_size(self, image: Image.Image) -> tuple[int, int]:
        """The trained size that crops an image least."""
        return min(self.sizes, key=lambda size: abs(math.log(size[1] / size[0] / (image.width / image.height))))

    def _encode_images(self, images: list[Image.Image]) -> list[Tensor]:
        """Image tokens (h, w) of each image, cropped to its nearest size."""
        return encode_each(self.vqgan, [to_pixels(resize_and_crop(image, *self._nearest_size(image)))
                                        for image in images])

    def _decode(self, tokens) -> list[Image.Image]:
        """Images of image tokens (h, w), all of one size."""
        return decode_each(self.vqgan, torch.stack(list(tokens))) if len(tokens) else []

    def _layout(self, size: tuple[int, int]) -> tuple[list[int], tuple[int, int]]:
        """(H, W) in pixels -> what a prompt says of it, as ids, and its latent grid (h, w); of the larger image in
        Stage III. Stage I names no size."""
        if size not in self.sizes:
            raise ValueError(f"size is {size[0]}x{size[1]}, expected one that these weights were trained on, height x "
                             "width: " + ", ".join(f"{h}x{w}" for h, w in self.sizes))
        factor, long_side = self.vqgan.factor, self.model.config.long_side
        height, width = upscaled_size(size, long_side, factor) if long_side else size
        ids = self.tokenizer.encode(size_text(height, width)) if self.model.config.sizes else []
        return ids, (height // factor, width // factor)

    def _sample(self, captions, size, sampling, seeds, low=None, on_tokens=None) -> list[Tensor]:
        """Image tokens (h, w) for each caption (ids); low: those of the images that Stage III enlarges."""
        if (low is None) != (not self.model.config.long_side):
            needed = "stage1 or stage2" if low is None else "stage3, which enlarge"
            raise ValueError(f"these weights are of another stage, expected those of train.py {needed}")
        ids, shape = self._layout(size)

        def make(captions, low, seeds):
            unconditional = [None] * len(captions) if sampling.guidance != 1 else []
            prompts = [prompt(caption, self.vocabulary, ids, image)
                       for caption, image in zip(captions + unconditional, low + low)]
            tokens = generate_image_tokens(self.model, prompts, shape, sampling, seeds, on_tokens)[0]
            return tokens if low[0] is None else torch.stack([deinterlace(each, low[0]) for each in tokens])
        return in_batches(make, captions, low or [None] * len(captions), seeds)

    def _write(self, prompts, sampling, seeds, images=False) -> list[tuple[list[int], Tensor]]:
        """Text ids, and image tokens (n, h, w), that go on from each prompt (ids); images: of the first of sizes."""
        if self.model.config.long_side:
            raise ValueError("these weights write no text, expected those of train.py stage1, stage2 or joint")
        room, (_, shape) = self.model.config.max_seq_len - max(map(len, prompts)) - 2, self._layout(self.sizes[0])
        each = math.prod(shape) + 2
        most = max(1, (room - TEXT) // each) if images else 0
        max_text = max(1, min(TEXT, room - most * each))
        return in_batches(lambda prompts, seeds: generate_text(
            self.model, prompts, self.tokenizer, max_text, sampling, seeds, shape, most), prompts, seeds)

    def _likelihood(self, sequences) -> list[float]:
        """`log_likelihood`, a batch at a time."""
        return in_batches(lambda batch: log_likelihood(self.model, batch), list(sequences))


# ----------------------------------------------------------------------------- the command

USED = {"prompts": "guidance temperature top_k top_p k unverified num size best_of seed out scale film upscale",
        "caption": "best_of seed",
        "upscale": "prompt k unverified seed out scale",
        "recipe": "temperature top_k top_p seed out"}                  # the flags of each mode; weights, device: of all


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """Makes images of prompts, a caption of an image, an image larger, or text and images of a title."""
    prompts: tuple[str, ...] = setting(help="what to show, in English or Chinese", metavar="PROMPT", nargs="*")
    caption: Path | None = setting(None, "write a caption of this image", metavar="IMAGE")
    upscale: tuple[Path, ...] | None = setting(None, "Stage III: enlarge this image, or those of the prompts",
                                               metavar="IMAGE", nargs="*")
    prompt: str | None = setting(None, "what the image given to --upscale shows", metavar="TEXT")
    recipe: str | None = setting(None, "Sec. 4.6: write its steps, with an image of each", metavar="TITLE")
    out: Path | None = setting(None, "the file to write (default: out.png, for a recipe out.md)", aliases=("-o",))
    film: Path | None = setting(None, "also write the image as it appears", metavar="FILE.gif")
    num: int = setting(1, "images of each prompt; image i has the seed S + i", least=1, most=1024)
    best_of: int = setting(1, "candidates of each, of which the best is kept", least=1, most=1024)
    size: str | None = setting(None, "height x width in pixels, of those that the weights know", metavar="HxW")
    scale: int = setting(0, "enlarge what is written so many times; 0: to at least 256 pixels", least=0, most=64)
    seed: int = setting(0, "S, of the first image", least=0, most=2**63 - 1)
    weights: Path | None = setting(None, "what train.py wrote (default: weights/emoji; in it, stage3 to upscale an "
                                   "image, joint for a recipe)", metavar="DIR")
    device: str = setting("cpu", "cpu, cuda, cuda:1 ...")

    def __post_init__(self):
        super().__post_init__()
        modes = [mode for mode in USED if getattr(self, mode) and not (mode == "upscale" and self.prompts)]
        if len(modes) != 1 or len(self.upscale or ()) > (0 if self.prompts else 1):
            raise ValueError("expected a prompt, --caption IMAGE, --upscale IMAGE or --recipe TITLE, one of them")
        for field in fields(self):
            default = () if field.default is MISSING else field.default
            used = {modes[0], "weights", "device", *USED[modes[0]].split()}
            if getattr(self, field.name) != default and field.name not in used:
                raise ValueError(f"{field.name} does nothing with {'a prompt' if self.prompts else '--' + modes[0]}")
        if self.upscale and not self.prompt:
            raise ValueError("prompt is missing, expected what the image given to --upscale shows")
        if self.size and not re.fullmatch("[0-9]{1,5}x[0-9]{1,5}", self.size):
            raise ValueError(f"size is {self.size!r}, expected HxW in pixels, such as 64x128")
        if self.film and len(self.prompts) * self.num * self.best_of > 1:
            raise ValueError("film shows one image, expected one prompt, --num 1 and --best-of 1")
        if self.recipe and self.out and self.out.suffix != ".md":
            raise ValueError(f"out is {str(self.out)!r}, expected a name that ends in .md: a recipe is Markdown")


KNOWN = {*"a an the of picture image photo drawing emoji draw me please 请 画 一 个 张 幅 的 图 片".split()}


def words_of(text: str) -> list[str]:
    """Not in the paper: "A cat, 红苹果" -> ["a", "cat", "红", "苹", "果"]."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.casefold())


def unknown_words(text: str, names: list[str]) -> tuple[list[str], list[str]]:
    """Not in the paper: the words (Chinese: characters) of a prompt that no name has, and the three nearest names.

        ("a red dgo", ["dog", "cat", "red apple", "sun"])  ->  ["dgo"], ["red apple", "dog", "sun"]
    """
    known, asked = KNOWN.union(*map(words_of, names)), words_of(text)
    unknown = [word for word in dict.fromkeys(asked) if word not in known]
    plain = (" " if text.isascii() else "").join(word for word in asked if word not in KNOWN)
    return unknown, difflib.get_close_matches(plain, names, 3, cutoff=0.0) if unknown else []


def write_page(path: str | Path, title: str, text: str, images: list[Image.Image]) -> None:
    """Fig. 9, as Markdown: each step, a line of the text, above its image, a PNG file in the same folder. Where there
    are more lines than images, or fewer, the images follow the text."""
    path, steps = Path(path), [line for line in text.splitlines() if line.strip()]
    names = [f"{path.stem}-{i}.png" for i in range(1, len(images) + 1)]
    for name, image in zip(names, images):
        save_image(enlarge(image), path.with_name(name))
    shown = [f"![image {i}]({quote(name)})" for i, name in enumerate(names, 1)]
    parts = [f"{step}\n\n   {image}" for step, image in zip(steps, shown)]
    parts = parts if len(steps) == len(shown) else [text, *shown]
    write_text(path, "\n\n".join([f"# {' '.join(title.split())}", *parts]) + "\n")


def warn(prompts: tuple[str, ...], weights: Path) -> None:
    """Not in the paper: tells on stderr which words of the prompts the weights do not know, by their names.txt."""
    names = read_text(weights / "names.txt").splitlines() if (weights / "names.txt").is_file() else []
    for text in prompts if names else ():
        unknown, nearest = unknown_words(text, names)
        if unknown:
            print(f"generate.py: {weights.resolve().name} does not know {', '.join(unknown)}; "
                  f"it knows {', '.join(nearest)}", file=sys.stderr)


def load_pipeline(directory: Path, c: GenerateConfig, *prompts: str) -> Pipeline:
    """Not in the paper: a pipeline for the command, which leaves a small model one thread: more wait for each other.
    prompts: see `warn`."""
    warn(prompts, directory)
    pipeline = Pipeline.from_pretrained(directory, check_device(c.device))
    if sum(p.numel() for p in pipeline.model.parameters()) < SMALL:
        torch.set_num_threads(1)
    return pipeline


def from_prompts(c: GenerateConfig, weights: Path) -> list[Image.Image]:
    """`generate.py PROMPT ...`: the images, enlarged with --upscale."""
    pipeline = load_pipeline(weights, c, *c.prompts)
    upscaler = None if c.upscale is None else load_pipeline(weights / "stage3", c, *c.prompts)
    prompts, seeds = [text for text in c.prompts for _ in range(c.num)], [*range(c.seed, c.seed + c.num)]
    size, steps = tuple(map(int, c.size.split("x"))) if c.size else None, []
    sampling = replace(c, k=0, unverified=False) if upscaler else c            # K is that of Stage III
    images = pipeline.text_to_image(prompts, sampling, seeds * len(c.prompts), size=size, best_of=c.best_of,
                                    on_tokens=steps.append)
    if c.film:
        first, *frames = [enlarge(frame, c.scale) for frame in pipeline.film(steps, size)]
        atomic_write(c.film, lambda path: first.save(path, format="GIF", save_all=True, append_images=frames,
                                                     duration=[80] * len(frames) + [2000]))
        print(f"wrote {c.film}")
    if upscaler:
        images = upscaler.super_resolve(images, prompts, replace(GREEDY, k=c.k, unverified=c.unverified),
                                        seeds * len(c.prompts))
    return images


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("generate.py"), torch.inference_mode():
        c = parse(GenerateConfig, arguments)
        weights, out = c.weights or WEIGHTS, c.out or Path("out.md" if c.recipe else "out.png")
        if c.caption:
            image = undo_enlarge(open_image(c.caption))
            return print(*load_pipeline(weights, c).caption_images([image], c.best_of, c.seed))
        if c.recipe:
            (text, images), = load_pipeline(c.weights or WEIGHTS / "joint", c).interleaved([c.recipe], c, [c.seed])
            write_page(out, c.recipe, text, images)
            print(text)
        elif c.upscale:
            image, sampling = undo_enlarge(open_image(*c.upscale)), replace(GREEDY, k=c.k, unverified=c.unverified)
            upscaler = load_pipeline(c.weights or WEIGHTS / "stage3", c, c.prompt)
            larger, = upscaler.super_resolve([image], [c.prompt], sampling, [c.seed])
            save_image(enlarge(larger, c.scale), out)
        else:
            images = [enlarge(image, c.scale) for image in from_prompts(c, weights)]
            save_image(grid(images, columns=c.num if c.num > 1 < len(c.prompts) else 8), out)
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
