"""MARS: a frozen language model that draws (paper Sec. 3.1 to 3.3).

The language model that MARS grows out of is this same class with `codes=0`: text alone.

Shapes: B batch, T tokens, D width, V_t text and V_v visual vocabulary, S tokens in the cache.
"""
import argparse
import dataclasses
import math
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import qwen
from checkpoint import load_folder, one_line_errors, save_folder
from semvie import Context, KVCache, RMSNorm, Router, SemVIEBlock, SemVIEConfig, SwiGLU, rope_angles
from tokenizer import SPECIAL_TOKENS, Vocabulary


@dataclass(frozen=True, kw_only=True)
class MARSConfig(SemVIEConfig):
    """Sec. 3.2: the sizes of the whole model; those of a block are inherited."""
    layers: int                   # L
    context: int                  # longest sequence in tokens; 8,192 for Qwen-7B
    text_vocab: int               # V_t
    codes: int = 0                # size of the VQ-GAN's codebook; 0: the language model alone
    ahead: int = 1                # K of Eq. 2: how many codes one position predicts
    tie_embeddings: bool = False  # True: the text head is the text embedding, as in the small Qwen2 models
    sizes: tuple[tuple[int, int], ...] = ()   # Stage II: (H, W) in pixels seen in training; (): one, never named
    long_side: int = 0            # Stage III: makes pictures of `sizes` this long, in pixels; 0: another stage

    def __post_init__(self):
        super().__post_init__()
        sizes = tuple(tuple(size) if isinstance(size, (list, tuple)) else size for size in self.sizes)
        if not all(isinstance(size, tuple) and len(size) == 2 for size in sizes):
            raise ValueError(f"sizes is {self.sizes!r}, expected pairs of height and width")
        object.__setattr__(self, "sizes", sizes)                                  # JSON knows but lists

    @property
    def vocabulary(self) -> Vocabulary:
        """Sec. 3.3: the joint vocabulary."""
        return Vocabulary(self.text_vocab, self.codes)


# ----------------------------------------------------------------------------- Sec. 3.1: the loss

LOGITS = 2 ** 28                      # most logits at a time, 1 GB in float32: 1,676 rows of Qwen-7B's vocabulary


def cross_entropy_in_chunks(hidden: Tensor, targets: Tensor, logits_of, chunk: int, *more: Tensor) -> Tensor:
    """Eq. 1, mean over the N rows of hidden (N, D) and targets (N,), `chunk` rows at a time. more: further tensors
    (N, ...) that `logits_of` takes.

    The (N, V_t + V_v) logits never exist whole: each chunk's are dropped and computed again in the backward pass.
    """
    def total(targets: Tensor, *rows: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(*rows), targets, reduction="sum")
    if len(hidden) <= chunk:                                          # one chunk: nothing to drop
        return total(targets, hidden, *more) / max(len(hidden), 1)
    parts = [checkpoint(total, *rows, use_reentrant=False)
             for rows in zip(*(tensor.split(chunk) for tensor in (targets, hidden, *more)))]
    return torch.stack(parts).sum() / len(hidden)


class Ahead(nn.Module):
    """Eq. 2: what head k > 1 puts before the vision head: a residual block, so that z_{t+k} is read off the hidden
    state of z_t. It starts at zero: at first all heads say what head 1 says. The paper does not say how K tokens are
    predicted; K heads on the one causal trunk are our reading, each as narrow as the trunk, as there are K - 1."""

    def __init__(self, config: MARSConfig):
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = SwiGLU(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.ffn(self.norm(hidden))                                    # (..., D)


VISUAL_TABLES = "visual_embedding", "vision_head"            # what has a row for each visual token, (V_v, D)


class SharedRows(nn.Module):
    """Not in the paper: a visual table in training, `table + places @ shared`: codes that look alike learn together.

    A row is a target some dozen times in a small run; what moves `shared` is learned once for all red codes, for all
    circles, and also for the red circle that no caption names. It starts at zero, so the rows start as they are, and
    `MARS.folded` adds the two up when weights are written: what draws knows nothing of it.

    own: whether a row may also move by itself. In the vision head it may not where some codes have no caption, or each
    of these would learn just that, however well what it looks like is known.
    """

    def __init__(self, table: Tensor, places: Tensor, own: bool):
        super().__init__()
        self.own = own
        self.register_buffer("places", places.to(table), persistent=False)             # (codes, d)
        self.shared = nn.Parameter(table.new_zeros(places.shape[1], table.shape[1]))   # (d, D)

    def forward(self, table: Tensor) -> Tensor:
        """table (V_v, D) -> rows (V_v, D); those of special tokens and padding as they are."""
        shared = self.places.to(self.shared) @ self.shared
        if not self.own:
            table = torch.cat((table[:len(shared)].detach(), table[len(shared):]))
        return table + F.pad(shared, (0, 0, 0, len(table) - len(shared)))


# ----------------------------------------------------------------------------- Sec. 3.2, 3.3: the model

class MARS(nn.Module):
    """Sec. 3.2, Fig. 3: embeddings, L SemVIE blocks, final norm, a text head and a vision head."""

    def __init__(self, config: MARSConfig):
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        D, V_t, V_v = config.width, self.vocabulary.text, self.vocabulary.visual
        block = config if V_v else dataclasses.replace(config, visual_experts=False)
        self.text_embedding = nn.Embedding(V_t, D)
        self.visual_embedding = nn.Embedding(V_v, D) if V_v else None
        self.blocks = nn.ModuleList(SemVIEBlock(block, layer) for layer in range(config.layers))
        self.norm = RMSNorm(D, config.norm_eps)
        self.text_head = None if config.tie_embeddings else nn.Linear(D, V_t, bias=False)
        self.vision_head = nn.Linear(D, V_v, bias=False) if V_v else None
        self.visual_ahead = nn.ModuleList(Ahead(config) for _ in range(config.ahead - 1))       # heads 2 to K
        self.checkpoint_activations = False                           # True: blocks are computed again going back
        self.phase: int | None = None                                 # where heads 2 to K are asked, see `loss`
        self.uncaptioned: Tensor | None = None                        # (codes,) bool: that no captioned picture shows
        self.margin = -math.inf                                       # see `_candidates`

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> last hidden states (B, T, D); with a cache, `tokens` go on where it ends.

        `<pad>` costs nothing: at the right anywhere, at the left only in the first call on a cache.
        Raises ValueError where the sequence gets longer than the context.
        """
        past = cache.length if cache else 0
        if past + tokens.shape[1] > self.config.context:
            raise ValueError(f"a sequence of {past + tokens.shape[1]} tokens, but the model's context "
                             f"is {self.config.context}")
        V_t = self.vocabulary.text
        is_padding = tokens == self.vocabulary.special("<pad>")       # of a language model alone: an id without a row
        if cache and not past and is_padding.any():
            cache.padding = is_padding.sum(1)                                          # (B,)
        router = Router(tokens >= V_t, is_padding)
        embed_visual = (lambda ids: self.visual_embedding(ids - V_t)) if self.visual_embedding else None
        x = router(router.pack(tokens), self.text_embedding, embed_visual)             # (N, D)
        context = self._context(tokens, router, cache, past)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        if cache:
            cache.advance(tokens.shape[1])
        return router.unpack(self.norm(x))                                             # (B, T, D)

    def _context(self, tokens: Tensor, router: Router, cache: KVCache | None, past: int) -> Context:
        """Positions, rotary angles and, where plain causality is not enough, the mask."""
        T = tokens.shape[1]
        places = past + torch.arange(T, device=tokens.device)                          # (T,) places in the cache
        padding = cache.padding if cache else None
        positions = places[None] if padding is None else (places - padding[:, None]).clamp(min=0)
        mask = None
        if padding is not None or (past and T > 1):
            keys = torch.arange(past + T, device=tokens.device)                        # (S,)
            mask = (keys <= places[:, None])[None, None]                               # (1, 1, T, S)
            if padding is not None:
                mask = mask & (keys >= padding[:, None, None, None])                   # (B, 1, T, S)
                mask = mask | (keys == places[:, None])       # a padding row reads itself: no softmax over nothing
        cos, sin = rope_angles(positions, self.config.head_width, self.config.rope_base)
        return Context(router, cos, sin, mask, cache)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Sec. 3.3: l_t of hidden states (..., D) -> (..., V_t)."""
        return F.linear(hidden, self.text_embedding.weight) if self.text_head is None else self.text_head(hidden)

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Sec. 3.3: l_t and l_v side by side, for one softmax over both. (..., D) -> (..., V_t + V_v), float32.

        rows: (V_v, D) of the vision head, where shared ones have been added up already.
        """
        l_t = self.text_logits(hidden)
        if self.vision_head is None:
            return l_t.float()
        return torch.cat((l_t, F.linear(hidden, self.vision_head.weight if rows is None else rows)), dim=-1).float()

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V_t + V_v), float32."""
        return self.logits(self.hidden(tokens, cache))

    def ahead(self, hidden: Tensor, k: int) -> Tensor:
        """Eq. 2: hidden states (..., D) as head k reads them; k = 1 leaves them as they are."""
        return hidden if k == 1 else self.visual_ahead[k - 2](hidden)

    def loss(self, tokens: Tensor, is_target: Tensor, chunk: int | None = None) -> Tensor:
        """Eq. 1: mean of -log p(z_{t+1} | z_{<=t}) over the tokens that `is_target` (B, T) bool marks.

        With K > 1, Eq. 2: the mean over K heads; head k > 1 is asked for z_{t+k} only inside pictures, and counts 0
        elsewhere. Memory does not grow with K: each head's work is dropped and done again in the backward pass.
        With `phase` (ours) heads 2 to K are asked at every K-th token from there on, as when they draw, and count as
        much as head 1 does: K heads then cost two. chunk: rows whose logits exist at a time; None: LOGITS of them.
        """
        hidden, K = self.hidden(tokens), self.config.ahead                             # (B, T, D)
        chunk = chunk or max(1, LOGITS // self.vocabulary.size)
        rows = None if self.vision_head is None else self.vision_head.weight           # shared ones are added up once
        uncond, in_picture = self.vocabulary.special("<uncond>"), tokens >= self.vocabulary.text
        has_caption = (tokens != uncond).all(1, keepdim=True).expand_as(tokens)        # (B, T)
        logits_of = lambda states, ids, captioned: self._candidates(self.logits(states, rows), ids, captioned)

        def question(k: int, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Head k's states, right answers and whether a caption stands before them, where `asked` (B, T - k)."""
            return self.ahead(hidden[:, :-k][asked], k), tokens[:, k:][asked], has_caption[:, k:][asked]

        def mean_loss(states: Tensor, ids: Tensor, captioned: Tensor) -> Tensor:
            return cross_entropy_in_chunks(states, ids, logits_of, chunk, ids, captioned)
        targets = is_target[:, 1:]
        loss = mean_loss(*question(1, targets))
        if K == 1:
            return loss
        asked = {k: in_picture[:, :-k] & in_picture[:, k:] & is_target[:, k:] for k in range(2, K + 1)}
        if self.phase is not None:
            turn = torch.arange(tokens.shape[1], device=tokens.device) % K == self.phase
            later = mean_loss(*map(torch.cat, zip(*(question(k, asked[k] & turn[:-k]) for k in asked))))
            return (loss + later) / 2
        for k in asked:
            of_head = checkpoint(lambda k=k: mean_loss(*question(k, asked[k])), use_reentrant=False)
            loss = loss + of_head * (asked[k].sum() / targets.sum().clamp(min=1))
        return loss / K

    def _candidates(self, logits: Tensor, ids: Tensor, captioned: Tensor) -> Tensor:
        """Not in the paper: where there is a caption, `captioned` (N,), a code that no captioned picture shows competes
        in training only while its logit (N, V) is more than that of the right token, `ids` (N,), less `margin`.

        -inf: never. If it always did, the model would learn that captions never mean it, whatever they say; if it never
        does, it is drawn where its like is meant.
        """
        if self.uncaptioned is None:
            return logits
        missing = F.pad(self.uncaptioned.to(logits.device), (self.vocabulary.text, 0))
        missing = F.pad(missing, (0, logits.shape[-1] - len(missing)))                 # (V,)
        known = logits.detach()
        beaten = known < known.gather(1, ids[:, None]) - self.margin
        return logits.masked_fill(captioned[:, None] & missing & beaten, -torch.inf)

    def new_cache(self, batch: int, max_tokens: int) -> KVCache:
        """Not in the paper: an empty cache for `batch` sequences of up to `max_tokens`."""
        c, weight = self.config, self.text_embedding.weight
        return KVCache(c.layers, batch, c.kv_heads, max_tokens, c.head_width, weight.device, weight.dtype)

    # ------------------------------------------------------------------------- what trains

    def freeze_language(self) -> None:
        """Sec. 3.2: the linguistic component remains static; the visual side trains. The one place that decides.

        Without visual experts (Table 3's ablation) the two modalities share every weight, so every weight trains.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_visual(name) or not self.config.visual_experts)

    def share_rows(self, codebook: Tensor) -> None:
        """Not in the paper: while training, rows of codes that lie close in the codebook (codes, d) learn together, see
        `SharedRows`; in the vision head, where there are `uncaptioned` codes, only so. The outputs stay as they are."""
        places = places_of(codebook)
        for table, own in ((self.visual_embedding, True), (self.vision_head, self.uncaptioned is None)):
            rows = SharedRows(table.weight.detach(), places, own)
            parametrize.register_parametrization(table, "weight", rows)

    def folded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Not in the paper: the tensors `state` of this model, with shared rows added to the tables; names and shapes
        are those of a model that shares none."""
        state = dict(state)
        for name in VISUAL_TABLES:
            owner = getattr(self, name)                           # None: a language model
            if parametrize.is_parametrized(owner):
                shared, = owner.parametrizations.weight
                table = state.pop(f"{name}.parametrizations.weight.original")
                rows = shared.places.to(table) @ state.pop(f"{name}.parametrizations.weight.0.shared")
                state[f"{name}.weight"] = table + F.pad(rows, (0, 0, 0, len(table) - len(rows)))
        return state

    # ------------------------------------------------------------------------- initialisation

    def initialise(self, generator: torch.Generator | None = None) -> "MARS":
        """Not in the paper, which loads Qwen: random weights of variance 1 / fan-in, embeddings of variance 1, and
        the two matrices that write to the residual stream scaled by 1 / sqrt(2 L); returns self.

        With Qwen's own 0.02, or with embeddings as small as the rest, the heads that look words up hardly form.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
            elif isinstance(module, nn.Linear):
                writes = name.endswith((".out", ".down"))
                std = (module.weight.shape[1] * (2 * self.config.layers if writes else 1)) ** -0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return self

    @classmethod
    def from_language_model(cls, language: "MARS", codes: int, *, visual_experts: bool = True,
                            route_output: bool = False, ahead: int = 1, codebook: Tensor | None = None,
                            generator: torch.Generator | None = None) -> "MARS":
        """Sec. 3.3: grows the visual side. Experts are copies of the text experts; rows of the visual embedding
        and of the vision head are the mean of the text's rows.

        codebook: the VQ-GAN's (codes, d): rows start apart instead, see `look_alike`.
        """
        config = dataclasses.replace(language.config, codes=codes, visual_experts=visual_experts,
                                     route_output=route_output, ahead=ahead, sizes=(), long_side=0)
        with torch.device("meta"):
            model = cls(config)
        for name, tensor in language.state_dict().items():
            if not is_visual(name):
                model._put(name, tensor.clone())
        model._grow(codebook, generator)
        return model

    @classmethod
    def from_earlier_stage(cls, earlier: "MARS", *, ahead: int, codebook: Tensor | None = None,
                           generator: torch.Generator | None = None) -> "MARS":
        """Sec. 3.4, Stage III: weights of its own that start as those of Stage II, or of an earlier Stage III, with K =
        `ahead` heads, of which those that `earlier` has go on. Takes its tensors over; it is not to be used any more.

        codebook: (codes, d) of another codec, as for the small sizes: the rows of its codes start anew.
        """
        codes = earlier.config.codes if codebook is None else len(codebook)
        rows = [f"{name}.weight" for name in VISUAL_TABLES]
        with torch.device("meta"):
            model = cls(dataclasses.replace(earlier.config, codes=codes, ahead=ahead))
        known = model.state_dict()
        for name, tensor in earlier.state_dict().items():
            if name in known and (codebook is None or name not in rows):
                model._put(name, tensor)
        model._grow(codebook, generator)
        if codebook is not None:
            n, old = len(SPECIAL_TOKENS), earlier.config.codes                    # they keep their meaning
            for name in rows:
                model.get_parameter(name).data[codes:codes + n] = earlier.get_parameter(name).data[old:old + n]
        return model

    def _put(self, name: str, tensor: Tensor) -> None:
        """Makes `tensor` the parameter `name`."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    @torch.no_grad()
    def _grow(self, codebook: Tensor | None, generator: torch.Generator | None) -> None:
        """Fills what is still on the meta device of the visual side, from the language side."""
        text_head = self.text_embedding if self.text_head is None else self.text_head
        spread = {"visual_embedding.weight": (self.text_embedding.weight, 1.0),
                  "vision_head.weight": (text_head.weight, 0.5)}       # half: the first loss stays near equal rows'
        places = None if codebook is None else places_of(codebook)
        for name, parameter in list(self.named_parameters()):
            if not parameter.is_meta:
                continue
            if name in spread:
                rows, scale = spread[name]
                mean = sum(part.float().sum(0) for part in rows.split(4096)) / len(rows)          # never a float32 copy
                tensor = mean.expand(parameter.shape)
                if places is not None:
                    squares = sum((part - mean).square().sum(0) for part in rows.split(4096))
                    apart = look_alike(places, *parameter.shape, generator).to(rows.device)
                    tensor = tensor + scale * (squares / len(rows)).sqrt() * apart
                self._put(name, tensor.to(rows.dtype, copy=True).contiguous())
            elif name.startswith("visual_ahead."):
                start = (torch.ones if name.endswith("norm.weight") else torch.zeros)(parameter.shape)
                if not name.endswith(("norm.weight", "down.weight")):
                    start = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                self._put(name, start.to(self.text_embedding.weight))
            elif is_visual(name):
                self._put(name, self.get_parameter(name.replace("visual_", "")).detach().clone())

    @classmethod
    def from_qwen(cls, directory: str | Path, codes: int = 8192, *, dtype: torch.dtype = torch.bfloat16,
                  device="cpu", visual_experts: bool = True, route_output: bool = False, ahead: int = 1,
                  codebook: Tensor | None = None, generator: torch.Generator | None = None) -> "MARS":
        """Sec. 3.3: grows a MARS out of a folder of Qwen's or Qwen2's published weights; codes=0: Qwen alone.

        Built on the meta device; shards are memory-mapped, one at a time, and copied tensor by tensor. The other
        arguments are those of `from_language_model`. Raises ValueError, one line, for a bad folder.
        """
        layout, fields = qwen.read_layout(Path(directory))
        config = MARSConfig(**fields, codes=codes, visual_experts=visual_experts, route_output=route_output,
                            ahead=ahead)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, rows, tensor in qwen.stream(Path(directory), layout, shapes, config):
            if model.get_parameter(name).is_meta:
                model._put(name, torch.empty(shapes[name], dtype=dtype, device=device))
            model.get_parameter(name).data[rows].copy_(tensor)
        model._grow(codebook, generator)
        return model.eval()

    # ------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu") -> "MARS":
        """Reads `config.json` and `model.safetensors`. Raises ValueError, one line, for a bad folder."""
        return load_folder(directory, cls, MARSConfig, device)

    def save_pretrained(self, directory: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes `config.json` and `model.safetensors`, beside and renamed. state: gathered, where ranks share it."""
        save_folder(directory, self, self.folded(self.state_dict()) if state is None else state)


def places_of(codebook: Tensor, d: int = 384, width: float = 0.7) -> Tensor:
    """Not in the paper: where each code of a codebook (codes, n) lies among the others -> (codes, up to d), rows of
    length 1. Codes that look alike lie close; a linear map of the places can still tell them apart.

    Principal components, the large ones held down to the square root of their spread, or colour drowns texture; of
    these, the first d components of a Gaussian kernel of this width.
    """
    centred = codebook.detach().float().cpu() - codebook.detach().float().cpu().mean(0)
    components, spread, _ = torch.linalg.svd(centred, full_matrices=False)
    near = F.normalize(components * spread.sqrt(), dim=1)
    kernel = torch.exp((near @ near.T - 1) / width ** 2)     # exp(-|a - b|^2 / 2 width^2), as rows have length 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components, spread, _ = torch.svd_lowrank(kernel, min(d, len(kernel)), niter=3)
    return F.normalize(components * spread.sqrt(), dim=1)


def look_alike(places: Tensor, rows: int, width: int, generator: torch.Generator | None) -> Tensor:
    """Not in the paper: (rows, width) of variance 1, in which codes that look alike lie close together.

    Rows that start equal have to be told apart one by one; so started, what is learned of one red code holds for all
    red ones, and a small model binds colours in hundreds of steps, not thousands. Rows are the codes' `places_of`,
    (codes, d), turned to `width` numbers at random. Special tokens and padding lie anywhere.
    """
    apart = torch.randn(rows, width, generator=generator)
    apart[:len(places)] = places @ torch.randn(places.shape[1], width, generator=generator)
    return apart


def is_visual(name: str) -> bool:
    """Sec. 3.3: whether the parameter `name` belongs to the visual side: embedding, experts or vision head."""
    return "visual_" in name or name.startswith("vision_head.")


# ----------------------------------------------------------------------------- what it will cost

PRESETS = {
    "qwen-7b": MARSConfig(width=4096, heads=32, kv_heads=32, ffn_width=11008, layers=32, context=8192,
                          text_vocab=151_936, codes=8192),
    "qwen2.5-0.5b": MARSConfig(width=896, heads=14, kv_heads=2, ffn_width=4864, layers=24, context=32_768,
                               text_vocab=151_936, rope_base=1e6, tie_embeddings=True, codes=8192),
}


def count_parameters(config: MARSConfig) -> tuple[int, int]:
    """Parameters of the language side and of the visual side, counted on the meta device."""
    with torch.device("meta"):
        model = MARS(config)
    sizes = [(is_visual(name), parameter.numel()) for name, parameter in model.named_parameters()]
    return sum(n for visual, n in sizes if not visual), sum(n for visual, n in sizes if visual)


def training_memory(frozen: int, trained: int, gpus: int) -> tuple[float, float]:
    """Not in the paper: bytes on each GPU, before activations, for so many parameters, as `train.py` trains them: by
    DDP, where what is frozen stays bfloat16, and with --shard, where all is float32. AdamW keeps two moments."""
    return 2 * frozen + 16 * trained, (4 * frozen + 16 * trained) / gpus


def forecast(config: MARSConfig, gpus: int = 8, rows: int = 64 * 330) -> dict[str, float]:
    """Not in the paper: bytes a GPU needs in training, before activations, for each way to train; and the logits'.

    Under ZeRO weights and gradients are bfloat16, and AdamW keeps 12 bytes a trainable parameter (float32 master copy
    and two moments). rows: tokens in a batch of 64 pairs of 256 x 256 pixels.
    """
    frozen, trained = count_parameters(config)
    if not config.visual_experts:
        frozen, trained = 0, frozen + trained
    weights, gradients, optimiser = 2 * (frozen + trained), 2 * trained, 12 * trained
    chunk = max(1, LOGITS // config.vocabulary.size)
    ddp, sharded = training_memory(frozen, trained, gpus)
    return {"DDP, float32 AdamW": ddp,
            f"train.py --shard, all float32, {gpus} GPUs": sharded,
            f"sharded optimiser (ZeRO-1), {gpus} GPUs": weights + gradients + optimiser / gpus,
            f"all sharded (ZeRO-3, the paper's), {gpus} GPUs": (weights + gradients + optimiser) / gpus,
            "logits whole, float32": 4 * rows * config.vocabulary.size,
            f"logits in chunks of {chunk}": 4 * min(rows, chunk) * config.vocabulary.size}


def describe_cost(config: MARSConfig) -> str:
    """The forecast as lines to print, before anything is allocated."""
    frozen, trained = count_parameters(config)
    lines = [f"{'language side':44}{frozen:>16,} parameters, {2 * frozen / 1e9:.1f} GB in bfloat16",
             f"{'visual side':44}{trained:>16,} parameters, {2 * trained / 1e9:.1f} GB in bfloat16",
             f"{'memory of a GPU in training:':44}"]
    return "\n".join(lines + [f"  {name:42}{size / 1e9:>16.1f} GB" for name, size in forecast(config).items()])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Forecasts what a MARS needs, or grows one out of Qwen's weights.")
    parser.add_argument("--plan", choices=PRESETS, help="forecast this size; reads no weights")
    parser.add_argument("--from-qwen", type=Path, metavar="DIR", help="Qwen's or Qwen2's weights to grow a MARS from")
    parser.add_argument("--codes", type=int, default=8192, help="size of the VQ-GAN's codebook (default: 8192)")
    parser.add_argument("--route-output", action="store_true", help="a W_O of its own for the visual side")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the grown model; without it, nowhere")
    args = parser.parse_args(arguments)
    if bool(args.plan) == bool(args.from_qwen):
        parser.error("expected --plan SIZE or --from-qwen DIR, one of the two")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("mars.py"):
        if args.plan:
            print(describe_cost(dataclasses.replace(PRESETS[args.plan], route_output=args.route_output)))
            return
        _, fields = qwen.read_layout(args.from_qwen)
        print(describe_cost(MARSConfig(**fields, codes=args.codes, route_output=args.route_output)))
        started = time.perf_counter()
        model = MARS.from_qwen(args.from_qwen, args.codes, dtype=getattr(torch, args.dtype), device=args.device,
                               route_output=args.route_output)
        size = sum(parameter.nbytes for parameter in model.parameters())
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss               # Linux counts in KiB
        print(f"grown in {time.perf_counter() - started:.1f} s: {size / 1e9:.2f} GB of parameters, "
              f"{peak / 1e9:.2f} GB at the peak of this process")
        if args.out:
            model.save_pretrained(args.out)
            for name in ("qwen.tiktoken", "vocab.json", "merges.txt"):
                if (args.from_qwen / name).is_file():
                    shutil.copy(args.from_qwen / name, args.out)
            print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
