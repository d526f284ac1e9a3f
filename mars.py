"""MARS: a frozen language model that draws (paper Sec. 3.1 to 3.3).

The language model that MARS grows out of is this same class with `codes=0`: text alone.

Shapes: B batch, T tokens, D width, V_t text and V_v visual vocabulary, S tokens in the cache.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import load_folder, save_folder
from semvie import Context, KVCache, RMSNorm, Router, SemVIEBlock, SemVIEConfig, rope_angles
from tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True)
class MARSConfig(SemVIEConfig):
    """Sec. 3.2: the sizes of the whole model; those of a block are inherited."""
    layers: int                   # L
    context: int                  # longest sequence in tokens; 8,192 for Qwen-7B
    text_vocab: int               # V_t
    codes: int = 0                # size of the VQ-GAN's codebook; 0: the language model alone

    @property
    def vocabulary(self) -> Vocabulary:
        """Sec. 3.3: the joint vocabulary."""
        return Vocabulary(self.text_vocab, self.codes)


# ----------------------------------------------------------------------------- Sec. 3.1: the loss

def cross_entropy_in_chunks(hidden: Tensor, targets: Tensor, logits_of, chunk: int) -> Tensor:
    """Eq. 1, mean over the N rows of hidden (N, D) and targets (N,), `chunk` rows at a time.

    The (N, V_t + V_v) logits never exist whole: each chunk's are dropped and computed again in the backward pass.
    """
    def total(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(rows), targets, reduction="sum")
    if len(hidden) <= chunk:                                          # one chunk: nothing to drop
        return total(hidden, targets) / max(len(hidden), 1)
    parts = [checkpoint(total, rows, ids, use_reentrant=False)
             for rows, ids in zip(hidden.split(chunk), targets.split(chunk))]
    return torch.stack(parts).sum() / len(hidden)


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
        self.text_head = nn.Linear(D, V_t, bias=False)
        self.vision_head = nn.Linear(D, V_v, bias=False) if V_v else None

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

    def logits(self, hidden: Tensor) -> Tensor:
        """Sec. 3.3: l_t and l_v side by side, for one softmax over both. (..., D) -> (..., V_t + V_v), float32."""
        l_t = self.text_head(hidden)
        if self.vision_head is None:
            return l_t.float()
        return torch.cat((l_t, self.vision_head(hidden)), dim=-1).float()

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V_t + V_v), float32."""
        return self.logits(self.hidden(tokens, cache))

    def loss(self, tokens: Tensor, is_target: Tensor, chunk: int = 4096) -> Tensor:
        """Eq. 1: mean of -log p(z_{t+1} | z_{<=t}) over the tokens that `is_target` (B, T) bool marks."""
        hidden = self.hidden(tokens)[:, :-1][is_target[:, 1:]]                         # (targets, D)
        return cross_entropy_in_chunks(hidden, tokens[:, 1:][is_target[:, 1:]], self.logits, chunk)

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
                            route_output: bool = False, noise: float = 0.0,
                            generator: torch.Generator | None = None) -> "MARS":
        """Sec. 3.3: grows the visual side. Experts are copies of the text experts; rows of the visual embedding
        and of the vision head are the mean of the text's rows.

        noise: Not in the paper: standard deviations of the text embedding added to each visual embedding, since
        small models part equal rows slowly.
        """
        config = dataclasses.replace(language.config, codes=codes, visual_experts=visual_experts,
                                     route_output=route_output)
        model = cls(config)
        source = language.state_dict()
        with torch.no_grad():
            for name, target in model.state_dict().items():
                if not is_visual(name):
                    target.copy_(source[name])
                elif name == "visual_embedding.weight":
                    rows = source["text_embedding.weight"]
                    target.copy_(rows.mean(0) + noise * rows.std(0) * torch.randn(target.shape, generator=generator))
                elif name == "vision_head.weight":
                    target.copy_(source["text_head.weight"].mean(0).expand_as(target))
                else:
                    target.copy_(source[name.replace("visual_", "")])
        return model

    # ------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu") -> "MARS":
        """Reads `config.json` and `model.safetensors`. Raises ValueError, one line, for a bad folder."""
        return load_folder(directory, cls, MARSConfig, device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, beside and renamed."""
        save_folder(directory, self)


def is_visual(name: str) -> bool:
    """Sec. 3.3: whether the parameter `name` belongs to the visual side: embedding, experts or vision head."""
    return "visual_" in name or name.startswith("vision_head.")
