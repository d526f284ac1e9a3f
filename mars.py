"""MARS: a frozen language model that draws (paper Sec. 3.1 to 3.3). With `image_vocab = 0` it is a language model.

    python mars.py --plan qwen-7b           parameters and memory, before anything is allocated

Shapes: B batch, T tokens, D width, V_t text and V_v visual vocabulary, K tokens predicted at each position.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from config import setting    # first, for Ctrl-C

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qwen
from checkpoint import load_folder, save_folder
from files import read_json
from kv_cache import KVCache
from semvie import LayerInputs, RMSNorm, Router, SemVIEBlock, SemVIEConfig, SwiGLU, rope_angles
from tokenizer import Vocabulary

IGNORE = -100                         # a target that is not asked for: the default of F.cross_entropy
LOGITS = 2 ** 27                      # most logits at a time: half a GB in float32


@dataclass(frozen=True, kw_only=True)
class MARSConfig(SemVIEConfig):
    """Sec. 3.2: the sizes of the whole model; those of a block are inherited."""
    layers: int = setting(help="L", least=1, most=1000)
    max_seq_len: int = setting(help="longest sequence in tokens; 8,192 for Qwen-7B", least=1, most=2**24)
    text_vocab: int = setting(help="V_t", least=1, most=2**24)
    tie_embeddings: bool = setting(False, "the text head is the text embedding, as in the small Qwen models")
    image_vocab: int = setting(0, "entries of the VQ-GAN's codebook; 0: the language model alone", least=0, most=2**24)
    k: int = setting(1, "K of Eq. 2: tokens predicted at each position", least=1, most=1024)
    image_tokenizer: str = setting("", "fingerprint of the image tokenizer that the model was trained with")
    sizes: tuple[tuple[int, int], ...] = setting((), "Stage II: (H, W) in pixels, as trained; (): one, never named")
    long_side: int = setting(0, "Stage III: enlarges square images to this side, in pixels", least=0)

    @property
    def vocabulary(self) -> Vocabulary:
        """Sec. 3.3: the joint vocabulary."""
        return Vocabulary(self.text_vocab, self.image_vocab)


class NKTPHead(nn.Module):
    """Eq. 2: what head k > 1 puts before the vision head: a residual block that reads z_{t+k} off the state of z_t; it
    starts as the identity. K heads on one causal trunk are our reading: the paper does not say how it predicts K."""

    def __init__(self, config: MARSConfig):
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = SwiGLU(config.width, config.width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.ffn(self.norm(h))                                              # (..., D)


class MARS(nn.Module):
    """Sec. 3.2, Fig. 3: embeddings, L SemVIE blocks, final norm, a text head and a vision head."""

    def __init__(self, config: MARSConfig):
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        D, V_t, V_v = config.width, self.vocabulary.text, self.vocabulary.visual
        block = config if V_v else dataclasses.replace(config, visual_experts=False)
        # from_pretrained: filling an nn.Embedding with noise on the meta device would import torch._dynamo, 2 seconds
        embedding = lambda V: nn.Embedding.from_pretrained(torch.zeros(V, D), freeze=False)
        self.text_embedding = embedding(V_t)
        self.visual_embedding = embedding(V_v) if V_v else None
        self.blocks = nn.ModuleList(SemVIEBlock(block, layer) for layer in range(config.layers))
        self.norm = RMSNorm(D, config.norm_eps)
        self.text_head = None if config.tie_embeddings else nn.Linear(D, V_t, bias=False)
        self.vision_head = nn.Linear(D, V_v, bias=False) if V_v else None
        self.nktp_heads = nn.ModuleList(NKTPHead(config) for _ in range(config.k - 1))          # heads 2 to K

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, recompute: bool = False) -> Tensor:
        """tokens (B, T) -> last hidden states (B, T, D); with a cache, `tokens` go on where it ends.

        `<pad>` costs nothing: at the right anywhere, at the left only in the first call on a cache. recompute: the
        backward pass computes each block again instead of keeping its activations. Raises ValueError where the
        sequence gets longer than `max_seq_len`.
        """
        V_t, most, past = self.vocabulary.text, self.config.max_seq_len, cache.length if cache else 0
        if past + tokens.shape[1] > most:
            raise ValueError(f"a sequence of {past + tokens.shape[1]} tokens, but the model's max_seq_len is {most}")
        if cache:
            cache.extend(tokens.shape[1])
        is_padding = tokens == self.vocabulary.special("<pad>")        # in a language model alone: an id without a row
        if cache and not past and is_padding.any():
            cache.padding = is_padding.sum(1)                                          # (B,)
        frozen = torch.is_grad_enabled() and not any(
            p.requires_grad for name, p in self.named_parameters() if not is_visual(name))
        router = Router(tokens >= V_t, is_padding, frozen)
        embed_visual = (lambda ids: self.visual_embedding(ids - V_t)) if self.visual_embedding else None
        x = router(router.pack(tokens), self.text_embedding, embed_visual)             # (N, D)
        inputs = self.layer_inputs(tokens, router, cache)
        for block in self.blocks:
            x = checkpoint(block, x, inputs, use_reentrant=False) if recompute else block(x, inputs)
        return router.unpack(self.norm(x))                                             # (B, T, D)

    def layer_inputs(self, tokens: Tensor, router: Router | None, cache: KVCache | None) -> LayerInputs:
        """Rotary angles, and where plain causality is not enough the mask."""
        T, padding = tokens.shape[1], cache.padding if cache else None
        S = cache.length if cache else T
        cos, sin = (each[:, :, S - T:S] for each in (cache.angles if cache else self._angles(T)))
        mask = None
        if padding is not None or 1 < T < S:
            mask = torch.ones((T, S), dtype=torch.bool, device=tokens.device).tril(S - T)
        if padding is not None:
            slots = torch.arange(S, device=tokens.device)                              # (S,) in the cache
            mask = mask & (slots >= padding[:, None, None, None])                      # (B, 1, T, S)
            mask = mask | (slots == slots[S - T:, None])          # a padding row reads itself: no softmax over nothing
        return LayerInputs(router, cos, sin, mask, cache)

    def _angles(self, T: int) -> tuple[Tensor, Tensor]:
        """Of T tokens. Padding at the left counts: rotary positions matter by their differences alone."""
        positions = torch.arange(T, device=self.norm.weight.device)[None]
        return rope_angles(positions, self.config.head_width, self.config.rope_base)

    def new_cache(self, batch: int, max_tokens: int) -> KVCache:
        """Not in the paper: an empty cache for `batch` sequences of up to `max_tokens`."""
        c = self.config
        room = self.norm.weight.new_zeros((2, c.layers, batch, c.kv_heads, max_tokens, c.head_width))
        return KVCache(room, self._angles(max_tokens))

    def text_logits(self, h: Tensor) -> Tensor:
        """Sec. 3.3: l_t of hidden states (..., D) -> (..., V_t)."""
        return F.linear(h, self.text_embedding.weight) if self.text_head is None else self.text_head(h)

    def logits(self, h: Tensor) -> Tensor:
        """Sec. 3.3: l_t and l_v side by side, for one softmax over both. (..., D) -> (..., V_t + V_v), float32."""
        l_t = self.text_logits(h)
        return (l_t if self.vision_head is None else torch.cat((l_t, self.vision_head(h)), dim=-1)).float()

    def head(self, h: Tensor, k: int) -> Tensor:
        """Eq. 2: hidden states (..., D) as head k reads them; head 1 reads them as they are."""
        return h if k == 1 else self.nktp_heads[k - 2](h)

    def loss(self, tokens: Tensor, targets: Tensor, recompute: bool = False) -> Tensor:
        """Eq. 1 and 2: the mean of -log p_k(z_{t+k} | z_{<=t}) over every token that every head is asked for. tokens
        (B, T); targets (B, T, K): z_{t+k} at [:, t, k - 1], or IGNORE, see `data.targets_of`. K = 1 is Eq. 1."""
        h, n = self.hidden(tokens, recompute=recompute), (targets != IGNORE).sum()     # (B, T, D)
        return sum(self.nll(h, z, k) for k, z in enumerate(targets.unbind(-1), 1)) / n.clamp(min=1)

    def nll(self, h: Tensor, z: Tensor, k: int) -> Tensor:
        """-log p of head k's targets z (B, T), summed. h (B, T, D). The (N, V_t + V_v) logits never exist whole: those
        of a chunk are dropped, and computed again in the backward pass; those of a single chunk may stay."""
        h, z = h[z != IGNORE], z[z != IGNORE]                                          # (N, D), (N,)
        part = lambda h, z: F.cross_entropy(self.logits(self.head(h, k)), z, reduction="sum")
        rows = max(1, LOGITS // self.vocabulary.size)
        if self.config.k == 1 and len(h) <= rows:
            return part(h, z)
        return sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in zip(h.split(rows), z.split(rows)))

    def forward(self, tokens: Tensor, targets: Tensor | None = None, recompute: bool = False) -> Tensor:
        """tokens (B, T) -> logits (B, T, V_t + V_v), float32; with targets the loss, which DDP and FSDP hook onto."""
        return self.logits(self.hidden(tokens)) if targets is None else self.loss(tokens, targets, recompute)

    def freeze_language(self) -> "MARS":
        """Sec. 3.2: the linguistic component remains static; the visual side trains. Without visual experts (Table 3's
        ablation) the modalities have every weight in common, so every weight trains."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_visual(name) or not self.config.visual_experts)
        return self

    def initialise(self, generator: torch.Generator | None = None) -> "MARS":
        """Not in the paper, which loads Qwen: random weights of variance 1 / fan-in, embeddings of variance 1, and the
        two matrices that write to the residual stream scaled by 1 / sqrt(2 L); returns self. With Qwen's own 0.02
        attention that looks words up hardly forms."""
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:                                                          # norms stay 1
                writes = 2 * self.config.layers if name.endswith((".out.weight", ".down.weight")) else 1
                std = 1.0 if "embedding" in name else (p.shape[1] * writes) ** -0.5
                nn.init.normal_(p, std=std, generator=generator)
        return self

    @classmethod
    @torch.no_grad()
    def grow(cls, earlier: "MARS", *, noise=0.0, generator: torch.Generator | None = None, **changes) -> "MARS":
        """Sec. 3.3 and 3.4: a larger model out of an earlier one, for Stage I out of a language model (image_vocab=V),
        for Stage III out of Stage II (k=K). changes: of the configuration.

        What both have goes on: its tensors are taken over, not copied. Visual experts start as copies of the text
        experts, visual rows as the mean of the text's rows, heads 2 to K as the identity. noise (ours): added to
        visual rows, in standard deviations of the text's; rows that start equal are told apart slowly.
        """
        with torch.device("meta"):
            model = cls(dataclasses.replace(earlier.config, **changes))
        old, random = earlier.state_dict(), lambda p: torch.randn(p.shape, generator=generator)
        for name, p in list(model.named_parameters()):
            counterpart = name.replace("visual_", "").replace("vision_head", "text_head")
            if name in old and old[name].shape == p.shape:
                tensor = old[name]
            elif name.startswith(("visual_embedding", "vision_head")):
                rows = old.get(counterpart, old["text_embedding.weight"])              # tied: the embedding's
                variance, mean = torch.var_mean(rows, dim=0, correction=0)
                tensor = (mean + noise * variance.sqrt() * random(p).to(mean.device)).to(rows.dtype)   # (V_v, D)
            elif name.startswith("nktp_heads"):
                tensor = torch.full(p.shape, float("norm" in name))                    # the last matrix is 0
                if name.endswith("gate_up.weight"):
                    tensor = random(p) * p.shape[-1] ** -0.5
                tensor = tensor.to(old["text_embedding.weight"])
            else:
                tensor = old[counterpart].clone()
            model._put(name, tensor)
        return model.train(earlier.training)

    def _put(self, name: str, tensor: Tensor) -> None:
        """Makes `tensor` the parameter `name`."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    @classmethod
    def from_qwen(cls, directory: str | Path, image_vocab: int = 8192, *, dtype: torch.dtype = torch.bfloat16,
                  device="cpu", **changes) -> "MARS":
        """Sec. 3.3: a MARS grown out of a folder of Qwen's published weights, see qwen.py; image_vocab = 0: Qwen alone.
        One tensor is copied at a time. Raises ValueError, one line, for a bad folder."""
        layout, sizes = qwen.read_layout(Path(directory))
        with torch.device("meta"):
            model = cls(MARSConfig(**sizes))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, rows, tensor in qwen.stream(Path(directory), layout, shapes, model.config):
            if model.get_parameter(name).is_meta:
                model._put(name, torch.empty(shapes[name], dtype=dtype, device=device))
            model.get_parameter(name).data[rows].copy_(tensor)
        return cls.grow(model.eval(), image_vocab=image_vocab, **changes) if image_vocab else model.eval()

    @classmethod
    def from_pretrained(cls, directory: str | Path, device="cpu") -> "MARS":
        """A folder of ours, or of Qwen's own weights, a language model alone. Raises ValueError for a bad folder."""
        if "model_type" in read_json(Path(directory) / "config.json"):
            return cls.from_qwen(directory, 0, device=device)
        return load_folder(directory, cls, MARSConfig, device)

    def save_pretrained(self, directory: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes `config.json` and `model.safetensors`. state: the tensors, where processes share them."""
        save_folder(directory, self, state)


def is_visual(name: str) -> bool:
    """Sec. 3.3: whether the parameter `name` is of the visual side: embedding, experts, vision head, NKTP heads."""
    return "visual_" in name or name.startswith(("vision_head.", "nktp_heads."))


if __name__ == "__main__":
    import scale
    scale.main()
