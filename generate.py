"""From a prompt to a picture, and from a picture to a caption (paper Sec. 3.1, Eq. 1, read as a sampler).

    python generate.py "a red circle above a blue square" --size 96x192        Stage II's sizes
    python generate.py --upscale out.png --prompt "a red circle"               Stage III
    python generate.py --caption out.png
    python generate.py --recipe "how to draw a red circle above a blue star" -o out.md

Shapes: B prompts, T tokens, V_t and V_v vocabularies, (h, w) latent grid.
"""
import argparse
import dataclasses
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from checkpoint import codec_folder, one_line_errors, write_beside
from data import (Sequence, captioning, collate, decode_each, encode_each, enlarge, fit, grid, interlaced, open_picture,
                  prompt, psnr, save_image, size_text, text_to_image, title_text, to_pixels)
from distributed import ready_device
from mars import MARS
from recipes import markdown, parse_steps
from tokenizer import QwenTokenizer, Tokenizer, Vocabulary, load_tokenizer
from vqgan import VQGAN

TINY = Path(__file__).parent / "weights" / "tiny"


@dataclass(frozen=True)
class Sampling:
    """Not in the paper, which gives no sampling settings: how tokens are drawn."""
    cfg: float = 1.3              # guidance scale; 1: no guidance
    temperature: float = 0.7      # 0: always the likeliest token
    top_k: int = 50               # draw among the k likeliest tokens; 0: among all
    top_p: float = 0.9            # draw among the likeliest tokens that hold this share of probability; 1: among all
    heads: int = 0                # of a model of K heads, how many draw in one pass; 0: all K


DETAIL = Sampling(cfg=1.0, temperature=0.0, heads=1)         # Stage III adds what is certain, not what is new
CAPTIONS = 8                                                 # written for --caption, of which the best is kept
ENLARGED = 4                                                 # made for --upscale, of which the best is kept


# ----------------------------------------------------------------------------- drawing one token

def guide(logits: Tensor, scale: float) -> Tensor:
    """Not in the paper: classifier-free guidance. The first half of logits (2B, V) saw the caption, the second
    `<uncond>` -> (B, V), moved from the second towards and beyond the first."""
    with_caption, without = logits.chunk(2)
    return without + scale * (with_caption - without)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Not in the paper: logits (B, V) after temperature, top-k and top-p -> probabilities (B, V)."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0             # keeps the token that crosses top_p
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    return p / p.sum(-1, keepdim=True)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Not in the paper: one token a row from logits (B, V) -> (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[:, 0]


# ----------------------------------------------------------------------------- drawing a sequence

def prefill(model: MARS, prompts: list[list[int]], more: int):
    """Runs the prompts, padded at the left so that all end together -> last hidden states (B, D), and a cache with
    room for `more` tokens."""
    T = max(len(ids) for ids in prompts)
    tokens = torch.full((len(prompts), T), model.vocabulary.special("<pad>"))
    for row, ids in enumerate(prompts):
        tokens[row, T - len(ids):] = torch.tensor(ids)
    cache = model.new_cache(len(prompts), T + more)
    return model.hidden(tokens.to(cache.keys.device), cache)[:, -1], cache


def prompts_of(model: MARS, captions: list[list[int]], sampling: Sampling, size: list[int] = (),
               low: list[Tensor] | None = None) -> list[list[int]]:
    """What stands before the pictures; with guidance, then the same number of `<uncond>` twins. size: its ids, from
    Stage II on; low: codes (h, w) of each small picture, Stage III."""
    low = low or [None] * len(captions)
    twins = [None] * (len(captions) if sampling.cfg != 1 else 0)
    return [prompt(caption, model.vocabulary, size, small) for caption, small in zip([*captions, *twins], low + low)]


def code_logits(model: MARS, hidden: Tensor, k: int, sampling: Sampling) -> Tensor:
    """Head k's logits of codes, guided: hidden (B or 2B, D) -> (B, codes) float32. Nothing but codes can be drawn."""
    logits = model.vision_head(model.ahead(hidden, k))[:, :model.vocabulary.codes].float()
    return guide(logits, sampling.cfg) if sampling.cfg != 1 else logits


def in_raster_order(codes: Tensor, size: tuple[int, int], low: Tensor | None) -> Tensor:
    """Sec. 3.4, Stage III: codes (B, h * w) as they are written -> row by row. low: codes of the small picture."""
    return codes if low is None else codes[:, interlaced(size, low.shape).argsort()]


@torch.no_grad()
def draw_codes(model: MARS, captions: list[list[int]], height: int, width: int, sampling: Sampling,
               generator: torch.Generator | None = None, size: list[int] = (),
               low: list[Tensor] | None = None) -> Tensor:
    """Captions (ids) -> codes (B, h, w). With guidance each caption and its `<uncond>` twin share one batch.

    The picture's size sets how many codes are drawn; size and low: see `prompts_of`. A model of K heads draws K a
    forward pass (Eq. 2), each from its own head. Raises ValueError where a caption is too long.
    """
    prompts, length = prompts_of(model, captions, sampling, size, low), height * width
    heads = min(sampling.heads or model.config.ahead, model.config.ahead)
    hidden, cache = prefill(model, prompts, length)
    drawn = []                                                                   # of (B,)
    while True:
        new = min(heads, length - len(drawn))
        drawn += [draw(code_logits(model, hidden, k, sampling), sampling, generator) for k in range(1, new + 1)]
        if len(drawn) == length:
            break
        tokens = model.vocabulary.text + torch.stack(drawn[-new:], dim=1)        # (B, K)
        hidden = model.hidden(tokens.repeat(len(prompts) // len(captions), 1), cache)[:, -1]
    codes = torch.stack(drawn, dim=1)                                            # (B, h * w), as they were written
    return in_raster_order(codes, (height, width), low[0] if low else None).unflatten(1, (height, width))


@torch.no_grad()
def draw_codes_verified(model: MARS, caption: list[int], height: int, width: int, sampling: Sampling,
                        generator: torch.Generator | None = None, size: list[int] = (),
                        low: Tensor | None = None) -> tuple[Tensor, int]:
    """Not in the paper: heads 2 to K only draft; head 1 accepts each draft or puts another code in its place.

    The codes are distributed exactly as head 1 alone would draw them, one by one (speculative sampling, arXiv
    2302.01318, with the drafts of one's own heads), in fewer passes. One caption (ids) -> codes (1, h, w) and the
    number of passes after the prompt's. low: codes (h, w) of the small picture, Stage III.
    """
    prompts = prompts_of(model, [caption], sampling, size, None if low is None else [low])
    length, heads = height * width, min(sampling.heads or model.config.ahead, model.config.ahead)
    hidden, cache = prefill(model, prompts, length + heads)
    chances = lambda states, k: probabilities(code_logits(model, states, k, sampling), sampling)[0]     # (codes,)
    pick = lambda p: int(torch.multinomial(p, 1, generator=generator))
    drawn, passes = [pick(chances(hidden, 1))], 0
    while len(drawn) < length:
        q = [chances(hidden, k) for k in range(2, 1 + min(heads, length - len(drawn) + 1))]
        drafts = [pick(p) for p in q]
        fed = model.vocabulary.text + torch.tensor([[drawn[-1], *drafts]], device=hidden.device)
        states = model.hidden(fed.repeat(len(prompts), 1), cache)                # (1 or 2, 1 + drafts, D)
        passes, accepted = passes + 1, 0
        for draft, of_draft in zip(drafts, q):
            p = chances(states[:, accepted], 1)
            if torch.rand((), generator=generator, device=p.device) * of_draft[draft] > p[draft]:
                drawn.append(pick((p - of_draft).clamp(min=0)))                  # what the drafts drew too rarely
                break
            drawn.append(draft)
            accepted += 1
        else:
            if len(drawn) < length:
                drawn.append(pick(chances(states[:, -1], 1)))
        cache.length -= len(drafts) - accepted                                   # forget what was not accepted
        hidden = states[:, accepted]
    codes = torch.tensor([drawn], device=hidden.device)                          # (1, h * w), as they were written
    return in_raster_order(codes, (height, width), low).unflatten(1, (height, width)), passes


@torch.no_grad()
def write_text(model: MARS, prompts: list[list[int]], eos: int, max_tokens: int,
               sampling: Sampling = Sampling(cfg=1.0, temperature=0.0), generator=None) -> list[list[int]]:
    """Goes on from each prompt with text alone, up to the end of text or `max_tokens` -> ids, without the end."""
    hidden, cache = prefill(model, prompts, max_tokens)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=hidden.device)
    written = []
    while len(written) < max_tokens and not done.all():
        written.append(draw(model.text_logits(hidden).float(), sampling, generator))
        done |= written[-1] == eos
        if len(written) < max_tokens:
            hidden = model.hidden(written[-1][:, None], cache)[:, -1]
    rows = torch.stack(written, dim=1).tolist()
    return [row[:row.index(eos)] if eos in row else row for row in rows]


def may_follow(written: list[int], vocabulary: Vocabulary, eos: int, cells: int, most: int,
               max_text: int) -> list[range]:
    """Fig. 9, as a grammar: after what was written since the title, the ids that may come next.

    Text up to its end or to `<multi_images>`, which is all that is left after `max_text` of it; then pictures of
    `cells` codes, at least one and at most `most`; then `</multi_images>` and the end of text.
    """
    V_t, one = vocabulary.text, lambda token: range(vocabulary.special(token), vocabulary.special(token) + 1)
    end, opening, closing = range(eos, eos + 1), one("<multi_images>"), one("</multi_images>")
    if written and written[-1] in (end[0], closing[0]):
        return [end]
    if opening[0] not in written:
        return [range(V_t) if len(written) < max_text else end, opening]
    pictures, place = divmod(len(written) - written.index(opening[0]) - 1, cells + 2)
    if place == 0:
        return [one("<img>")] * (pictures < most) + [closing] * (pictures > 0)
    return [range(V_t, V_t + vocabulary.codes) if place <= cells else one("</img>")]


@torch.no_grad()
def write_mixed(model: MARS, prompts: list[list[int]], eos: int, height: int, width: int, sampling: Sampling,
                generator: torch.Generator | None = None, most: int = 3, max_text: int = 128):
    """Sec. 4.6: goes on from each prompt with text, then with as many pictures as the model chooses, by one softmax
    over both vocabularies of which only what `may_follow` is left -> text ids and codes (n, h, w) of each prompt.

    No guidance: no title was ever dropped. Rows may differ in length, one that has ended waits for the others.
    """
    vocabulary, cells = model.vocabulary, height * width
    opening, ends = vocabulary.special("<multi_images>"), (eos, vocabulary.special("</multi_images>"))
    hidden, cache = prefill(model, prompts, max_text + 1 + most * (cells + 2))
    rows: list[list[int]] = [[] for _ in prompts]
    while True:
        logits = model.logits(hidden)                                            # (B, V_t + V_v)
        left = torch.full_like(logits, -torch.inf)
        for i, row in enumerate(rows):
            for ids in may_follow(row, vocabulary, eos, cells, most, max_text):
                left[i, ids.start:ids.stop] = logits[i, ids.start:ids.stop]
        tokens = draw(left, sampling, generator)                                 # (B,)
        for row, token in zip(rows, tokens.tolist()):
            row.append(token)
        if all(row[-1] in ends for row in rows):
            break
        hidden = model.hidden(tokens[:, None], cache)[:, -1]
    pages = []
    for row in rows:
        text = row[:min(row.index(id) for id in (eos, opening) if id in row)]
        n = (row.index(ends[1]) - len(text) - 1) // (cells + 2) if ends[1] in row else 0
        block = torch.tensor(row[len(text) + 1:][:n * (cells + 2)], device=hidden.device).view(n, cells + 2)
        pages.append((text, (block[:, 1:-1] - vocabulary.text).view(n, height, width)))
    return pages


@torch.no_grad()
def log_likelihood(model: MARS, sequences: list[Sequence]) -> Tensor:
    """log p of each sequence's targets given what stands before them: of a caption given its picture, or of a picture
    given its caption -> (B,), natural logarithms. Not in the paper, whose MARS* ranks pictures by CLIP."""
    device = model.norm.weight.device
    tokens, is_target = (rows.to(device) for rows in collate(sequences, model.vocabulary.special("<pad>")))
    asked = is_target[:, 1:]                                                     # (B, T - 1)
    log_p = model.logits(model.hidden(tokens)[:, :-1][asked]).log_softmax(-1)    # (targets, V)
    of_target = torch.zeros(asked.shape, device=device)
    of_target[asked] = log_p.gather(-1, tokens[:, 1:][asked][:, None])[:, 0]
    return of_target.sum(1)


# ----------------------------------------------------------------------------- the whole path

def load_stage(directory: str | Path, device="cpu") -> tuple[MARS, VQGAN, Tokenizer | QwenTokenizer]:
    """What a stage of train.py from stage1 on wrote; a folder inside another's may share its codec. Raises ValueError,
    one line, for a folder that is none."""
    directory = Path(directory)
    model = MARS.from_pretrained(directory, device)
    if not model.vocabulary.codes:
        raise ValueError(f"{directory}: a language model alone; expected one that draws, as of train.py stage1")
    return model, VQGAN.from_pretrained(codec_folder(directory), device), load_tokenizer(directory)


class Painter:
    """Not in the paper: model, codec and tokenizer of one weights folder, ready to draw and to describe."""

    def __init__(self, model: MARS, vqgan: VQGAN, tokenizer: Tokenizer | QwenTokenizer, side: int):
        self.model, self.vqgan, self.tokenizer, self.side = model.eval(), vqgan.eval(), tokenizer, side
        if model.vocabulary.codes != vqgan.config.num_embeddings or len(tokenizer) > model.vocabulary.text:
            raise ValueError(f"the model has {model.vocabulary.text} text tokens and {model.vocabulary.codes} codes, "
                             f"its tokenizer {len(tokenizer)} and its codec {vqgan.config.num_embeddings}")

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu") -> "Painter":
        """Reads what a stage of train.py from stage1 on wrote; a CPU computes in float32, as bfloat16 is slow there.
        Raises ValueError, one line, for a bad folder."""
        model, vqgan, tokenizer = load_stage(directory, device)
        model = model.float() if torch.device(device).type == "cpu" else model
        return cls(model, vqgan, tokenizer, vqgan.config.resolution)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) in pixels of all that the model was trained to draw, or to enlarge, the usual one first."""
        return self.model.config.sizes or ((self.side, self.side),)

    def size_ids(self, height: int, width: int) -> list[int]:
        """What the prompt says of the size: nothing in Stage I, that of the large picture in Stage III. Raises
        ValueError, one line, for an untrained size."""
        if (height, width) not in self.sizes:
            raise ValueError(f"size {height}x{width}: expected one that these weights were trained on, height x width: "
                             + ", ".join(f"{h}x{w}" for h, w in self.sizes))
        if self.model.config.long_side:
            height, width = enlarge((height, width), self.model.config.long_side, self.vqgan.factor)
        return self.tokenizer.encode(size_text(height, width)) if self.model.config.sizes else []

    def encode_prompt(self, text: str, pixels: int | None = None) -> list[int]:
        """A prompt's ids. Raises ValueError, one line, where it is empty or longer than the context leaves room for
        beside a picture of so many pixels (default: the square one)."""
        if not text.strip():
            raise ValueError("the prompt is empty; expected a description such as \"a red circle\"")
        ids = self.tokenizer.encode(text.strip())
        room = self.model.config.context - (pixels or self.side ** 2) // self.vqgan.factor ** 2 - 2
        room -= 12 if self.model.config.sizes else 0                             # the size's own ids, at most
        if len(ids) > room:
            raise ValueError(f"the prompt has {len(ids)} tokens; at most {room} fit beside the picture")
        return ids

    @torch.no_grad()
    def paint(self, prompts: list[str], sampling: Sampling = Sampling(), seed: int = 0, batch: int = 64,
              verify: bool = False, best_of: int = 1, size: tuple[int, int] | None = None):
        """Prompts -> RGB images; the same prompts, settings and seed give the same pictures.

        size: (H, W) in pixels, one of `sizes`; default: the first. verify: head 1 checks what the other heads of a
        model with K > 1 draft. best_of: how many to draw for each prompt, of which the one stays that makes its
        prompt likeliest as a caption (Sec. 4, MARS*).
        """
        device = self.model.norm.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        if self.model.config.long_side:
            raise ValueError("these weights only upscale; expected those of train.py stage1 or stage2 to draw with")
        height, width = size or self.sizes[0]
        asked = self.size_ids(height, width)
        h, w, images = height // self.vqgan.factor, width // self.vqgan.factor, []
        captions = [ids for text in prompts for ids in [self.encode_prompt(text, height * width)] * best_of]
        batch = max(1, batch // best_of) * best_of
        for start in range(0, len(captions), batch):
            some = captions[start:start + batch]
            if verify:
                codes = torch.cat([draw_codes_verified(self.model, caption, h, w, sampling, generator, asked)[0]
                                   for caption in some])
            else:
                codes = draw_codes(self.model, some, h, w, sampling, generator, asked)
            if best_of > 1:
                likely = log_likelihood(self.model, [
                    captioning(caption, picture, self.model.vocabulary, self.tokenizer.eos, asked)
                    for caption, picture in zip(some, codes)]).view(-1, best_of)
                codes = codes.unflatten(0, (-1, best_of))[torch.arange(len(likely)), likely.argmax(1)]
            images += decode_each(self.vqgan, codes)
        return images

    @torch.no_grad()
    def draw_recipes(self, titles: list[str], sampling: Sampling = Sampling(cfg=1.0), seed: int = 0, batch: int = 64,
                     most: int = 3, max_text: int = 128):
        """Sec. 4.6: titles -> (text, RGB images) each, by weights of train.py joint; square pictures, at most `most`.

        The text is as the model wrote it, at most max_text tokens. Raises ValueError, one line, for an empty title or
        one longer than the context leaves room for.
        """
        generator, device = torch.Generator(self.model.norm.weight.device), self.model.norm.weight.device
        generator.manual_seed(seed)
        h = w = self.side // self.vqgan.factor
        room, prompts, pages = self.model.config.context - max_text - 1 - most * (h * w + 2), [], []
        for title in titles:
            if not title.strip():
                raise ValueError('the title is empty; expected one such as "how to draw a red circle"')
            prompts.append(self.tokenizer.encode(title_text(title)))
            if len(prompts[-1]) > room:
                raise ValueError(f"the title has {len(prompts[-1])} tokens; at most {room} fit beside the rest")
        for start in range(0, len(prompts), batch):
            for ids, codes in write_mixed(self.model, prompts[start:start + batch], self.tokenizer.eos, h, w, sampling,
                                          generator, most, max_text):
                pages.append((self.tokenizer.decode(ids).strip(), decode_each(self.vqgan, codes) if len(codes) else []))
        return pages

    @torch.no_grad()
    def upscale(self, images, prompts: list[str], sampling: Sampling = DETAIL, seed: int = 0, batch: int = 64,
                verify: bool = False, best_of: int = 1):
        """Sec. 3.4, Stage III: RGB images and what they show -> the same, larger. Raises ValueError, one line, for
        weights of another stage.

        verify: head 1 checks what the other heads draft, one picture at a time. best_of: how many to make of each, all
        but the first drawn at random; the one stays that, made small again, is nearest to the image (ours).
        """
        long_side, factor = self.model.config.long_side, self.vqgan.factor
        if not long_side:
            raise ValueError("these weights draw from prompts alone; expected those of train.py stage3 to upscale with")
        if best_of > 1:
            varied = dataclasses.replace(sampling, temperature=sampling.temperature or 0.6)
            tries = [self.upscale(images, prompts, varied if k else sampling, seed + k, batch, verify)
                     for k in range(best_of)]
            small = [fit(image, *self.nearest_size(image)) for image in images]
            return [max(made, key=lambda larger: psnr([fit(larger, image.height, image.width)], [image]))
                    for image, *made in zip(small, *tries)]
        generator, larger = torch.Generator(self.model.norm.weight.device).manual_seed(seed), [None] * len(images)
        for size in self.sizes:
            asked, (height, width) = self.size_ids(*size), enlarge(size, long_side, factor)
            mine = [i for i, image in enumerate(images) if self.nearest_size(image) == size]
            for some in (mine[start:start + batch] for start in range(0, len(mine), batch)):
                small = [to_pixels(fit(images[i], *size)) for i in some]
                pixels = height * width + size[0] * size[1]
                captions = [self.encode_prompt(prompts[i], pixels) for i in some]
                shape, low = (height // factor, width // factor), encode_each(self.vqgan, small)
                if verify:
                    codes = torch.cat([draw_codes_verified(self.model, caption, *shape, sampling, generator, asked,
                                                           picture)[0] for caption, picture in zip(captions, low)])
                else:
                    codes = draw_codes(self.model, captions, *shape, sampling, generator, asked, low)
                for i, image in zip(some, decode_each(self.vqgan, codes)):
                    larger[i] = image
        return larger

    def nearest_size(self, image) -> tuple[int, int]:
        """The trained size that crops an image least."""
        return min(self.sizes, key=lambda size: abs(math.log(size[1] / size[0] / (image.width / image.height))))

    def restore(self, images):
        """Sec. 3.3, Tokenization: RGB images -> what is left of them after the codec."""
        codes = encode_each(self.vqgan, [to_pixels(image) for image in images])
        return [decode_each(self.vqgan, picture[None])[0] for picture in codes]

    def describe(self, images, max_tokens: int = 96, batch: int = 64, best_of: int = 1, seed: int = 0) -> list[str]:
        """Sec. 3.4, captioning: RGB images -> captions, the likeliest word at each step.

        best_of: how many to write for each image, all but the first drawn at random; the one stays that makes its
        image likeliest as a picture of it. Not in the paper: its MARS* the other way round.
        """
        if self.model.config.long_side:
            raise ValueError("these weights only upscale; expected those of train.py stage1 or stage2 to describe with")
        model, eos, texts = self.model, self.tokenizer.eos, []
        generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
        for start in range(0, len(images), max(1, batch // best_of)):
            some = images[start:start + max(1, batch // best_of)]
            sizes = [self.nearest_size(image) for image in some]
            codes = encode_each(self.vqgan, [to_pixels(fit(image, *size)) for image, size in zip(some, sizes)])
            sizes = [self.size_ids(*size) for size in sizes]
            shown = [captioning([], picture, model.vocabulary, eos, size).tokens[:-1]
                     for picture, size in zip(codes, sizes)]
            written = [[ids] for ids in write_text(model, shown, eos, max_tokens)]
            if best_of > 1:
                again = [ids for ids in shown for _ in range(best_of - 1)]
                drawn = write_text(model, again, eos, max_tokens, Sampling(cfg=1.0, temperature=1.0), generator)
                for i, (found, picture, size) in enumerate(zip(written, codes, sizes)):
                    found += drawn[i * (best_of - 1):(i + 1) * (best_of - 1)]
                    pairs = [text_to_image(ids, picture, model.vocabulary, size) for ids in found]
                    written[i] = [found[log_likelihood(model, pairs).argmax()]]
            texts += [self.tokenizer.decode(ids) for ids, in written]
        return texts


def save_recipe(path: str | Path, title: str, text: str, images) -> str | None:
    """Fig. 9, as a page: Markdown at `path`, its pictures as PNGs beside it -> what is wrong with the text, or None.

    A text without numbered steps, or with another number of them than of pictures, stands as it is, then the pictures.
    Raises ValueError, one line, where the path cannot be written.
    """
    path, note = Path(path), None
    names = [f"{path.stem}-{k}.png" for k in range(1, len(images) + 1)]
    try:
        page = markdown(title, parse_steps(text), names)
    except ValueError as error:
        note, shown = str(error), [f"![picture {k}]({quote(name)})" for k, name in enumerate(names, 1)]
        page = "\n\n".join([f'# {" ".join(title.split())}', text, *shown]) + "\n"
    for name, image in zip(names, images):
        save_image(image, path.with_name(name))
    try:
        write_beside(path, lambda p: p.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot write the page ({error.strerror or error})") from None
    return note


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draws a picture from a prompt, or describes a picture.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt", nargs="*", help="what to draw; several prompts are drawn in one batch")
    parser.add_argument("--upscale", nargs="?", const=True, metavar="IMAGE",
                        help="Stage III: make the drawn picture larger; or this one, which shows --prompt TEXT")
    parser.add_argument("--prompt", dest="shows", metavar="TEXT", help="what the picture given to --upscale shows")
    parser.add_argument("--cascade", metavar="DIR", help="weights of train.py stage3; default: stage3 in --weights")
    parser.add_argument("--heads", type=int, metavar="K",
                        help="Eq. 2: codes a pass, 0: of all heads; default: 0, to upscale 1")
    parser.add_argument("--recipe", metavar="TITLE", help="Sec. 4.6: write the steps and draw a picture for each")
    parser.add_argument("-o", "--out", help="PNG to write, several pictures as one grid; with --recipe Markdown")
    parser.add_argument("--size", metavar="HxW", help="height x width in pixels, of those that the weights know")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="pictures of each prompt")
    parser.add_argument("--cfg", type=float, default=Sampling.cfg, metavar="S", help="guidance scale; 1: none")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, metavar="T",
                        help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, metavar="K", help="0: all tokens")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p, metavar="P", help="1: all tokens")
    parser.add_argument("--best-of", type=int, metavar="N", help="draw N for each, keep the one that the prompt "
                        "describes best; of captions the one that the picture shows best, of large pictures the one "
                        f"nearest to the small one; default: 1, captions {CAPTIONS}, --upscale IMAGE {ENLARGED}")
    parser.add_argument("--verify", action="store_true", help="a model of K heads: let head 1 check the others' drafts")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--weights", metavar="DIR",
                        help=f"what train.py wrote, from stage1 on ({TINY}); with --recipe that of joint")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--caption", metavar="IMAGE", help="describe this picture instead")
    args = parser.parse_args(arguments)
    given, is_recipe = isinstance(args.upscale, str), args.recipe is not None
    if bool(args.prompt) + bool(args.caption) + given + is_recipe != 1:
        parser.error("expected a prompt, --caption IMAGE, --upscale IMAGE --prompt TEXT or --recipe TITLE, one of them")
    if args.best_of is None:
        args.best_of = CAPTIONS if args.caption else ENLARGED if given else 1
    args.detail = dataclasses.replace(DETAIL, heads=(0 if args.verify else 1) if args.heads is None else args.heads)
    args.heads = args.heads or 0
    args.weights = args.weights or (TINY / "joint" if is_recipe else TINY)
    args.out = args.out or ("out.md" if is_recipe else "out.png")
    if is_recipe and Path(args.out).suffix != ".md":
        parser.error(f"--out is {args.out!r}, but --recipe writes Markdown; expected a name that ends in .md")
    if given != bool(args.shows):
        parser.error("--upscale IMAGE and --prompt TEXT belong together")
    if args.size:
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", args.size)
        if not found:
            parser.error(f"--size is {args.size!r}, expected HxW in pixels, such as 96x128")
        args.size = int(found[1]), int(found[2])
    for name, low, high in (("num", 1, 1024), ("best_of", 1, 1024), ("cfg", 0, 100), ("temperature", 0, 100),
                            ("top_k", 0, 10**9), ("top_p", 1e-6, 1), ("heads", 0, 10**9)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {low} to {high}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("generate.py"):
        device = ready_device(args.device)
        if args.caption:
            image = open_picture(args.caption)
            painter = Painter.from_pretrained(args.weights, device)
            print(painter.describe([image], best_of=args.best_of, seed=args.seed)[0])
            return
        if args.upscale is not None:
            upscaler = Painter.from_pretrained(args.cascade or Path(args.weights) / "stage3", device)
        if args.shows:
            image = open_picture(args.upscale)
            height, width = upscaler.nearest_size(image)
            if width * image.height != height * image.width:
                print(f"generate.py: {args.upscale} is cropped to {width} x {height}, of the sizes that these weights "
                      "enlarge the nearest", file=sys.stderr)
            save_image(upscaler.upscale([image], [args.shows], args.detail, args.seed, verify=args.verify,
                                        best_of=args.best_of)[0], args.out)
            print(f"wrote {args.out}")
            return
        painter = Painter.from_pretrained(args.weights, device)
        if args.recipe is not None:
            sampling = Sampling(1.0, args.temperature, args.top_k, args.top_p)
            (text, images), = painter.draw_recipes([args.recipe], sampling, args.seed)
            if note := save_recipe(args.out, args.recipe, text, images):
                print(f"generate.py: the model did not write a step for each picture: {note}", file=sys.stderr)
            print(f"{text}\nwrote {args.out} and {len(images)} pictures beside it")
            return
        prompts = [text for text in args.prompt for _ in range(args.num)]
        sampling = Sampling(args.cfg, args.temperature, args.top_k, args.top_p, args.heads)
        size = args.size or painter.sizes[0]
        if args.upscale and size not in upscaler.sizes:
            raise ValueError(f"size {size[0]}x{size[1]}: expected one that the cascade enlarges, height x width: "
                             + ", ".join(f"{h}x{w}" for h, w in upscaler.sizes))
        images = painter.paint(prompts, sampling, args.seed, verify=args.verify, best_of=args.best_of, size=size)
        if args.upscale:
            images = upscaler.upscale(images, prompts, args.detail, args.seed, verify=args.verify, best_of=ENLARGED)
        save_image(grid(images, columns=args.num if args.num > 1 < len(args.prompt) else 8), args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
