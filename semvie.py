"""SemVIE, the Semantic Vision-language Integration Expert (paper Sec. 3.3, Eq. 3 and 4, Fig. 3).

A SemVIE block is a Qwen block in which QKV and FFN exist twice: a frozen text expert and a trainable
visual expert. A token's modality decides which of the two it meets; attention, its output projection
and the norms are shared.

Shapes: B batch, T tokens, N = B * T less padding, D width, H heads, G key-value heads, d head width.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class SemVIEConfig:
    """Sec. 3.3: the sizes of one SemVIE block."""
    width: int                    # D
    heads: int                    # H query heads
    kv_heads: int                 # G key-value heads; H for Qwen-7B, fewer in the Qwen2 family
    ffn_width: int                # hidden width of a SwiGLU expert: 11008 for Qwen-7B
    norm_eps: float = 1e-6        # of RMSNorm
    rope_base: float = 10000.0    # base of the rotary frequencies
    visual_experts: bool = True   # False: no visual experts, the ablation of Table 3
    route_output: bool = False    # True: W_O per modality too, the other reading of Fig. 3

    def __post_init__(self):
        for name in ("width", "heads", "kv_heads", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(f"width is {self.width}, expected a multiple of twice the {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}, expected a multiple of the {self.kv_heads} kv_heads")

    @property
    def head_width(self) -> int:
        """d, the width of one head."""
        return self.width // self.heads


# ----------------------------------------------------------------------------- the router of Eq. 3 and 4

class Router:
    """Eq. 3: `r_t, r_v = Router(...)`: sorts the tokens of a batch by modality, text first, once a forward.

    The modality is known from the token's id; nothing is learned. All layers then work on one packed (N, D) tensor
    whose first rows are text, so that an expert reads a slice and a token costs one expert. Padding is left out of
    the packed rows and costs nothing. Example, T text, V visual, . padding:

        T T V V .       packed rows:  T T T V V V V
        T V V . .                     0 1 5 2 3 6 7   (places in the flattened batch)
    """

    def __init__(self, is_visual: Tensor, is_padding: Tensor | None = None):
        """is_visual, is_padding: (B, T) bool."""
        self.shape = is_visual.shape
        is_visual = is_visual.flatten()                                       # (B*T,)
        kind = is_visual.long()
        if is_padding is not None:
            kind = kind.masked_fill(is_padding.flatten(), 2)
        n_text, n_visual, n_padding = torch.bincount(kind, minlength=3).tolist()
        self.rows = (n_text, n_visual)
        self.in_place = n_padding == 0 and 0 in (n_text, n_visual)            # already sorted
        if not self.in_place:
            order = kind.argsort(stable=True)
            self.inverse = order.argsort().clamp(max=n_text + n_visual - 1)   # padding repeats the last row
            self.order = order[:n_text + n_visual]                            # (N,)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) in the order of the sequence -> (N, ...) in the order of the experts."""
        x = x.flatten(0, 1)
        return x if self.in_place else x.index_select(0, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) in the order of the experts -> (B, T, ...): the C(., .) of Eq. 3. Padding holds any row."""
        x = x if self.in_place else x.index_select(0, self.inverse)
        return x.unflatten(0, self.shape)

    def __call__(self, x: Tensor, text_expert, visual_expert) -> Tensor:
        """Eq. 3 and 4: every row of x (N, ...) through the expert of its modality -> (N, ...).

        visual_expert None: every row through the text expert. With gradients an expert without rows still
        runs on its empty slice, so that its parameters take part in every backward pass (DDP waits for them).
        """
        if visual_expert is None:
            return text_expert(x)
        if not torch.is_grad_enabled() and 0 in self.rows:
            return text_expert(x) if self.rows[0] else visual_expert(x)
        x_t, x_v = x.split(self.rows)
        return torch.cat((text_expert(x_t), visual_expert(x_v)))


# ----------------------------------------------------------------------------- the parts of a Qwen block

class RMSNorm(nn.Module):
    """Sec. 3.3 "LN", which in Qwen is RMSNorm; shared by the modalities, computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_angles(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Not in the paper: Qwen's rotary position embedding (arXiv 2104.09864), 1-D also for pixels.

    positions (B, T) -> cos, sin, each (B, 1, T, d), float32.
    """
    inverse = base ** (-torch.arange(0, head_width, 2, device=positions.device).float() / head_width)
    angles = positions[..., None].float() * inverse                          # (B, T, d/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]                    # (B, 1, T, d)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Not in the paper: turns the two halves of each head of x (B, H, T, d) by its position's angles."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).type_as(x)


class KVCache:
    """Not in the paper: keys and values of the past, allocated once: a decoding step writes T rows, copies none.

    Raises ValueError where more than `max_tokens` would be written.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, max_tokens: int, head_width: int,
                 device=None, dtype=None):
        shape = (layers, batch, kv_heads, max_tokens, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0                     # tokens held; moved by `advance`, once all layers have written
        self.padding: Tensor | None = None  # (B,) padding at the left of each prompt, None: none anywhere

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v (B, G, T, d) and returns all keys and values so far, (B, G, length + T, d)."""
        end = self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens, {end} were asked for")
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more as held."""
        self.length += tokens


class SwiGLU(nn.Module):
    """Eq. 4: FFN^t or FFN^v, `W_down(silu(W_gate x) * W_up x)` as in Qwen."""

    def __init__(self, width: int, ffn_width: int):
        super().__init__()
        self.gate = nn.Linear(width, ffn_width, bias=False)
        self.up = nn.Linear(width, ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))                  # (N, D)


@dataclass
class Context:
    """Not in the paper: what all layers of one forward pass share, computed once."""
    router: Router
    cos: Tensor                       # (B, 1, T, d)
    sin: Tensor
    mask: Tensor | None               # (B, 1, T, S) bool, True = may be read; None: plain causal or a single query
    cache: KVCache | None


# ----------------------------------------------------------------------------- the block itself

class AttentionMoE(nn.Module):
    """Eq. 3: QKV per modality, then one causal attention over all tokens in their original order."""

    def __init__(self, config: SemVIEConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.d = layer, config.heads, config.kv_heads, config.head_width
        qkv_width = (config.heads + 2 * config.kv_heads) * config.head_width
        self.qkv = nn.Linear(config.width, qkv_width)                                       # W_Q^t, W_K^t, W_V^t
        self.visual_qkv = nn.Linear(config.width, qkv_width) if config.visual_experts else None   # W_Q^v ...
        self.out = nn.Linear(config.width, config.width, bias=False)                        # W_O
        routed = config.visual_experts and config.route_output
        self.visual_out = nn.Linear(config.width, config.width, bias=False) if routed else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (N, D), packed -> (N, D)."""
        router = context.router
        qkv = router.unpack(router(x, self.qkv, self.visual_qkv))                           # (B, T, (H+2G)d)
        qkv = qkv.unflatten(-1, (-1, self.d)).transpose(1, 2)                               # (B, H+2G, T, d)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(qk, context.cos, context.sin).split((self.heads, self.kv_heads), dim=1)
        if context.cache is not None:
            k, v = context.cache.write(self.layer, k, v)                                    # (B, G, S, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask,
                                           is_causal=context.mask is None and q.shape[2] > 1,
                                           enable_gqa=self.heads != self.kv_heads)          # (B, H, T, d)
        y = router.pack(y.transpose(1, 2).flatten(2))                                       # (N, D)
        return router(y, self.out, self.visual_out)


class SemVIEBlock(nn.Module):
    """Sec. 3.3, Fig. 3 right: x + AttentionMoE(LN(x)), then x + FFN-MoE(LN(x)).

    Eq. 4 prints no residual and feeds r instead of LN(r); Fig. 3 draws the bypass, and so does Qwen.
    """

    def __init__(self, config: SemVIEConfig, layer: int):
        super().__init__()
        self.norm_1 = RMSNorm(config.width, config.norm_eps)
        self.attention = AttentionMoE(config, layer)
        self.norm_2 = RMSNorm(config.width, config.norm_eps)
        self.ffn = SwiGLU(config.width, config.ffn_width)                                   # FFN^t
        self.visual_ffn = SwiGLU(config.width, config.ffn_width) if config.visual_experts else None   # FFN^v

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (N, D), packed -> (N, D)."""
        x = x + self.attention(self.norm_1(x), context)                                     # Eq. 3
        return x + context.router(self.norm_2(x), self.ffn, self.visual_ffn)                # Eq. 4
