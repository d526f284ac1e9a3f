"""Sampling from MARS (paper Sec. 3.1: Eq. 1 and 2 as a sampler; Sec. 3.4 and 4.6 for what is sampled).

One loop, `decode`, samples images, captions, and text with images; generate.py is the way from prompts to files.

Shapes: B sequences, T tokens, D width, V vocabulary that is sampled from, n drafted tokens, (h, w) latent grid.
"""
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import check, setting
from data import Sequence, collate
from kv_cache import KVCache
from mars import MARS
from step import hidden_of_images
from tokenizer import Vocabulary

WINDOW = 16                           # tokens that a forward pass on a GPU reads where the one before it drafts


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Not in the paper, which gives no sampling settings: how tokens are sampled."""
    guidance: float = setting(1.0, "classifier-free guidance scale; 1: none", least=0, most=100, aliases=("--cfg",))
    temperature: float = setting(0.5, "0: always the likeliest token", least=0, most=100)
    top_k: int = setting(0, "sample among the k likeliest tokens; 0: among all", least=0)
    top_p: float = setting(1.0, "sample among the likeliest tokens, up to this probability", least=1e-6, most=1)
    k: int = setting(0, "tokens that a forward pass reads, all but the first drafted; 0: K of the model, or without "
                     f"heads 2 to K {WINDOW} on a GPU, 1 on a CPU; for several images 1", least=0, most=1024)
    unverified: bool = setting(False, "Eq. 2 as it stands: head 1 does not check heads 2 to K, a pass gives K tokens")

    def __post_init__(self):
        check(self)
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature is {self.temperature!r}, expected 0 or at least 0.01")


GREEDY = Sampling(temperature=0.0)


# ----------------------------------------------------------------------------- sampling one token

def guide(logits: Tensor, scale: float) -> Tensor:
    """Not in the paper: classifier-free guidance. The first half of logits (2B, T, V) saw the caption, the second
    `<uncond>` -> (B, T, V), moved from the second towards and beyond the first."""
    with_caption, without = logits.chunk(2)
    return without + scale * (with_caption - without)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Not in the paper: logits (..., V) after temperature, top-k and top-p -> probabilities (..., V)."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        best = logits.topk(sampling.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0             # keeps the token that crosses top_p
        p = torch.zeros_like(p).scatter(-1, order, ordered)
        p = p / p.sum(-1, keepdim=True)
    return p


def noise(seed: int, position: int, V: int) -> Tensor:
    """Not in the paper: exponential noise (V,) of rate 1, for one position of the sequence that has this seed. So a
    sampled token is a function of what stands before it, of the seed and of the position, and an image is the same in
    every batch, with every draft and on every machine, up to rounding."""
    return torch.from_numpy(np.random.default_rng((seed, position)).standard_exponential(V)).float()


def log_noise(seeds: list[int], positions: range, V: int) -> Tensor:
    """Not in the paper: the logarithms of `noise`, (positions, seeds, V)."""
    rows = [noise(seed, position, V) for position in positions for seed in seeds]
    return torch.stack(rows).log().unflatten(0, (-1, len(seeds)))


def race(p: Tensor, noise: Tensor) -> Tensor:
    """Not in the paper: one token from each row of p (..., V) -> (...), by exponential noise (..., V). Token v arrives
    at the time noise[v] / p[v]; the first to arrive is v with probability p[v]."""
    return (p / noise).argmax(-1)


# ----------------------------------------------------------------------------- many tokens: Eq. 1 and 2

def prefill(model: MARS, prompts: list[list[int]], more: int) -> tuple[Tensor, KVCache]:
    """Reads prompts, padded at the left so that all end at one position -> last hidden states (B, 1, D), and a cache
    with room for `more` tokens. Raises ValueError where they do not fit."""
    T, most = max(len(ids) for ids in prompts), model.config.max_seq_len
    if T + more > most:
        raise ValueError(f"a prompt has {T} tokens, expected at most {most - more}: {more} follow, and the model's "
                         f"max_seq_len is {most}")
    tokens = torch.full((len(prompts), T), model.vocabulary.special("<pad>"))
    for row, ids in enumerate(prompts):
        tokens[row, T - len(ids):] = torch.tensor(ids)
    cache = model.new_cache(len(prompts), T + more)
    return model.hidden(tokens.to(cache.keys.device), cache)[:, -1:], cache


def count_drafts(sampling: Sampling, K: int, batch: int, device: torch.device) -> int:
    """Not in the paper: how many tokens are drafted for a forward pass; none where that is slower, in a batch, whose
    rows wait for each other, and without heads on a CPU. Raises ValueError where it takes more than K heads."""
    if K > 1 and sampling.k > K or K == 1 and sampling.unverified:
        raise ValueError(f"k is {sampling.k}, unverified {sampling.unverified}, but these weights have K = {K} heads")
    if sampling.k:
        return sampling.k - 1
    if batch > 1 and not sampling.unverified:
        return 0
    return K - 1 if K > 1 or device.type == "cpu" else WINDOW - 1


@torch.no_grad()
def decode(model: MARS, prompts: list[list[int]], logits_of, length: int, sampling: Sampling, seeds: list[int], *,
           images: bool = False, stop=None, on_tokens=None) -> tuple[Tensor, int]:
    """Eq. 1 and 2 as a sampler: prompts (B, or 2B with guidance) -> tokens (B, length), and the forward passes used.

    A forward pass reads the last certain token and n drafted ones. Head 1 samples at all these positions, each with
    its own noise. A draft stays as long as it equals what head 1 sampled there; so the result is that of n = 0,
    next-token prediction, whatever the drafts. Example, n = 3:

        read                 5   7   8   8        5 is certain; 7 8 8 are drafted
        sampled by head 1    7   8   2   4        7 8 stay, 2 is certain too, 4 is a guess at what follows

    Drafts come from heads 2 to K, at the state that sampled the last certain token (Eq. 2), or from the guesses, the
    last of which is repeated (speculative Jacobi decoding, arXiv 2410.01699). Rows of a batch go on in step.

    logits_of(states, k, tokens): logits (B, T, V) of head k at states (B or 2B, T, D), where tokens (B, t) are certain.
    images: V is the image vocabulary. stop(tokens): whether to end early. on_tokens(tokens): called once a pass.
    """
    forward = hidden_of_images if images else MARS.hidden
    states, cache = prefill(model, prompts, length)                              # (B or 2B, 1, D)
    B, K, passes, first = len(seeds), model.config.k, 1, model.vocabulary.text if images else 0
    most = count_drafts(sampling, K, B, states.device) if images else 0
    verify = not (images and sampling.unverified)

    @functools.lru_cache(maxsize=2 + most // 16)
    def noise_of(part, V):             # 16 positions at a time: one at a time takes three times as long
        return log_noise(seeds, range(16 * part, min(16 * part + 16, length)), V).to(states.device)

    def sample(logits, t):
        if sampling.temperature == 0:
            return logits.argmax(-1)
        at = range(t, t + logits.shape[1])
        rows = torch.stack([noise_of(i // 16, logits.shape[2])[i % 16] for i in at], dim=1)     # (B, T, V)
        if sampling.top_k or sampling.top_p < 1:
            return race(probabilities(logits, sampling), rows.exp())             # (B, T)
        return torch.sub(logits, rows, alpha=sampling.temperature).argmax(-1)    # the same race without a softmax

    tokens = drafts = torch.empty((B, 0), dtype=torch.long, device=states.device)
    while True:
        sampled, n = sample(logits_of(states, 1, tokens), tokens.shape[1]), drafts.shape[1]      # (B, 1 + n)
        kept = int((sampled[:, :n] == drafts).all(dim=0).long().cumprod(0).sum()) if n else 0
        tokens = torch.cat((tokens, sampled[:, :kept + 1]), dim=1)
        cache.length -= n - kept                                                 # forget what was refused
        n, read, drafts = max(0, min(most, length - tokens.shape[1] - verify)), tokens[:, -1:], drafts[:, :0]
        if n and K > 1:
            state = states[:, kept:kept + 1]
            drafts = sample(torch.cat([logits_of(state, k, tokens) for k in range(2, n + 2)], 1), tokens.shape[1])
        elif n:
            drafts = torch.cat((sampled[:, kept + 1:], sampled[:, -1:].expand(B, n)), dim=1)[:, :n]
        if n:
            read = torch.cat((read, drafts), dim=1)                              # (B, 1 + n)
        if not verify:
            tokens = torch.cat((tokens, drafts), dim=1)
        if on_tokens:
            on_tokens(tokens)
        if tokens.shape[1] == length or (stop and stop(tokens)):
            return tokens, passes
        read = first + (read if len(prompts) == B else torch.cat((read, read)))
        states, passes = forward(model, read, cache), passes + 1                 # (B or 2B, 1 + n, D)
        if not verify:
            states, drafts = states[:, -1:], drafts[:, :0]


def generate_image_tokens(model: MARS, prompts: list[list[int]], shape: tuple[int, int], sampling: Sampling,
                          seeds: list[int], on_tokens=None) -> tuple[Tensor, int]:
    """Sec. 3.4: prompts, with guidance followed by as many unconditional ones -> image tokens (B, h, w), and the
    forward passes used. Nothing but image tokens can be sampled; the size sets how many."""
    W = model.vision_head.weight[:model.vocabulary.image]                        # (V, D)

    def logits_of(states, k, tokens):
        logits = F.linear(model.head(states, k), W).float()
        return guide(logits, sampling.guidance) if sampling.guidance != 1 else logits
    tokens, passes = decode(model, prompts, logits_of, shape[0] * shape[1], sampling, seeds, images=True,
                            on_tokens=on_tokens)
    return tokens.unflatten(1, shape), passes


def may_follow(written: list[int], vocabulary: Vocabulary, tokenizer, cells: int, most: int,
               max_text: int) -> list[range]:
    """Fig. 9, as a grammar: after what was written since the prompt, the ids that may come next. Text, at most
    `max_text` tokens, up to its end or to `<multi_images>`; then images of `cells` tokens, at least one and at most
    `most`; then `</multi_images>` and the end of text. most = 0: text alone, as in captioning."""
    one = lambda token: range(vocabulary.special(token), vocabulary.special(token) + 1)
    end, opening, closing = range(tokenizer.eos, tokenizer.eos + 1), one("<multi_images>"), one("</multi_images>")
    if written and written[-1] in (end[0], closing[0]):
        return [end]
    if opening[0] not in written:
        return [range(len(tokenizer)) if len(written) < max_text else end] + [opening] * (most > 0)
    images, place = divmod(len(written) - written.index(opening[0]) - 1, cells + 2)
    if place == 0:
        return [one("<img>")] * (images < most) + [closing] * (images > 0)
    return [range(vocabulary.text, vocabulary.text + vocabulary.image) if place <= cells else one("</img>")]


def generate_text(model: MARS, prompts: list[list[int]], tokenizer, max_text: int, sampling: Sampling,
                  seeds: list[int], shape=(1, 1), most: int = 0) -> list[tuple[list[int], Tensor]]:
    """Sec. 3.4 and 4.6: goes on from each prompt by text, then by up to `most` images -> text ids, and image tokens
    (n, h, w), of each. One softmax over both vocabularies, of which `may_follow` leaves a part. No guidance: no title
    was dropped in training."""
    v, cells = model.vocabulary, shape[0] * shape[1]
    opening, ends = v.special("<multi_images>"), (tokenizer.eos, v.special("</multi_images>"))

    def logits_of(states, k, tokens):
        logits = model.logits(states)                                            # (B, 1, V_t + V_v)
        allowed = torch.full_like(logits, -torch.inf)
        for i, row in enumerate(tokens.tolist()):
            for ids in may_follow(row, v, tokenizer, cells, most, max_text):
                allowed[i, :, ids.start:ids.stop] = logits[i, :, ids.start:ids.stop]
        return allowed
    stop = lambda tokens: all(not {*ends}.isdisjoint(row) for row in tokens.tolist())
    rows, _ = decode(model, prompts, logits_of, max_text + 2 + most * (cells + 2), sampling, seeds, stop=stop)
    pages = []
    for row in rows.tolist():
        text = row[:min(row.index(id) for id in (tokenizer.eos, opening) if id in row)]
        images = [row[i + 1:i + 1 + cells] for i, id in enumerate(row) if id == v.special("<img>")]
        pages.append((text, torch.tensor(images, dtype=torch.long).view(-1, *shape) - v.text))
    return pages


# ----------------------------------------------------------------------------- how likely a sequence is

@torch.no_grad()
def log_likelihood(model: MARS, sequences: list[Sequence]) -> list[float]:
    """Not in the paper, whose MARS* ranks images by CLIP: log p of the targets of each sequence given the rest: of a
    caption given its image, or of an image given its caption. Natural logarithms."""
    tokens, is_target = collate(sequences, model.vocabulary.special("<pad>"))
    tokens, asked = tokens.to(model.norm.weight.device), is_target[:, 1:].to(model.norm.weight.device)
    log_p = model.logits(model.hidden(tokens)[:, :-1][asked]).log_softmax(-1)    # (targets, V_t + V_v)
    of_target = torch.zeros(asked.shape, device=tokens.device)                   # (B, T - 1)
    of_target[asked] = log_p.gather(-1, tokens[:, 1:][asked][:, None])[:, 0]
    return of_target.sum(1).tolist()
