"""SemVIE, the Semantic Vision-language Integration Expert (paper Sec. 3.3, Eq. 3 and 4, Fig. 3).

A block is a Qwen block in which QKV and FFN exist twice: a frozen text expert and a trainable visual expert. The
modality of a token decides which of the two it meets. Attention, its output projection and the norms are shared.

Shapes: B batch, T tokens, N = B * T less padding, D width, H query heads, G key-value heads, d width of a head,
S tokens in the cache.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import check, setting
from kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class SemVIEConfig:
    """Sec. 3.3: the sizes of one SemVIE block."""
    width: int = setting(help="D", least=1, most=2**16)
    heads: int = setting(help="H, query heads", least=1, most=2**10)
    kv_heads: int = setting(help="G, key-value heads: H for Qwen-7B, fewer in later families", least=1, most=2**10)
    head_width: int = setting(help="d: D / H for Qwen-7B; Qwen3 chooses it freely", least=2, most=2**12)
    ffn_width: int = setting(help="hidden width of an FFN expert: 11008 for Qwen-7B", least=1, most=2**20)
    norm_eps: float = setting(1e-6, "of RMSNorm", least=1e-12, most=1)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", least=1, most=1e12)
    qkv_bias: bool = setting(True, "biases of W_Q, W_K, W_V; none in Qwen3")
    qk_norm: bool = setting(False, "Qwen3: an RMSNorm of each query and key")
    visual_experts: bool = setting(True, "False: the ablation of Table 3")
    route_output: bool = setting(False, "W_O per modality too, the other reading of Fig. 3")

    def __post_init__(self):
        check(self)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}, expected a multiple of the {self.kv_heads} kv_heads")
        if self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}, expected an even number (rotary embedding)")


# ----------------------------------------------------------------------------- the router of Eq. 3 and 4

class Router:
    """Eq. 3: `r_t, r_v = Router(...)`: sorts the tokens of a batch by modality, text first, once a forward pass.

    The modality is known from the token's id; nothing is learned. All layers work on packed rows, so that an expert
    reads a slice, a token costs one expert, and padding costs nothing. Example, T text, V visual, . padding:

        T T V V .       packed rows:  T T T V V V V
        T V V . .                     0 1 5 2 3 6 7   (positions in the flattened batch)
    """

    def __init__(self, is_visual: Tensor, is_padding: Tensor, language_is_frozen: bool = False):
        """is_visual, is_padding: (B, T) bool. language_is_frozen: text before the first visual token of its sequence,
        such as a prompt, has met nothing that trains, so it goes first and gets no gradient."""
        self.shape, kind = is_visual.shape, 1 + is_visual.long()
        if language_is_frozen:
            kind = kind.masked_fill(is_visual.cumsum(1) == 0, 0)
        kind = kind.masked_fill(is_padding, 3).flatten()                      # (B*T,)
        self.rows = torch.bincount(kind, minlength=4)[:3].tolist()            # prompts, other text, visual tokens
        order, N = kind.argsort(stable=True), sum(self.rows)
        self.inverse = order.argsort().clamp(max=N - 1)                       # padding repeats the last row
        self.order = order[:N]                                                # (N,)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) in the order of the sequence -> (N, ...) in the order of the experts."""
        return x.flatten(0, 1).index_select(0, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) in the order of the experts -> (B, T, ...): the C(., .) of Eq. 3. Rows of padding are arbitrary."""
        return x.index_select(0, self.inverse).unflatten(0, self.shape)

    def __call__(self, x: Tensor, text_expert, visual_expert) -> Tensor:
        """Eq. 3 and 4: each row of x (N, ...) through the expert of its modality, or the one that there is -> (N, ...).
        With gradients an expert without rows runs on its empty slice: DDP waits for a gradient of every parameter."""
        if visual_expert is None:
            return text_expert(x)
        _, n_text, n_visual = self.rows
        if not torch.is_grad_enabled() and 0 in (n_text, n_visual):
            return text_expert(x) if n_text else visual_expert(x)
        prompt, x_t, x_v = x.split(self.rows)
        without_gradient = [text_expert(prompt.detach())] if len(prompt) else []
        return torch.cat((*without_gradient, text_expert(x_t), visual_expert(x_v)))


# ----------------------------------------------------------------------------- the parts of a Qwen block

class RMSNorm(nn.Module):
    """Sec. 3.3 "LN", which in Qwen is RMSNorm. nn.RMSNorm would not cast its weights to the type of its input."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """Eq. 4: FFN^t or FFN^v, `W_down(silu(W_gate x) * W_up x)` as in Qwen. W_gate and W_up are one matrix."""

    def __init__(self, width: int, ffn_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)                                   # (N, D)


def rope_angles(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Not in the paper: Qwen's rotary position embedding (arXiv 2104.09864), one-dimensional for image tokens too.
    positions (B, T) -> cos and sin, each (B, 1, T, d), float32, as `rotate` needs them."""
    inverse = base ** (-torch.arange(0, head_width, 2, device=positions.device).float() / head_width)
    angles = (positions[..., None].float() * inverse)[:, None]                # (B, 1, T, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Not in the paper: turns each pair (x_i, x_{i + d/2}) of x (B, H, T, d) by the angles of its position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


@dataclass
class LayerInputs:
    """Not in the paper: what all layers of one forward pass share, computed once."""
    router: Router | None             # None in step.py
    cos: Tensor                       # (B, 1, T, d)
    sin: Tensor
    mask: Tensor | None               # (T, S) or (B, 1, T, S) bool, what may be read; None: causal, or one query
    cache: KVCache | None


# ----------------------------------------------------------------------------- the block itself

class AttentionMoE(nn.Module):
    """Eq. 3: QKV per modality, then one causal attention over all tokens in their original order."""

    def __init__(self, config: SemVIEConfig, layer: int):
        super().__init__()
        c, self.layer = config, layer
        self.H, self.G, self.d = c.heads, c.kv_heads, c.head_width
        D, qkv_width, bias = c.width, (c.heads + 2 * c.kv_heads) * c.head_width, c.qkv_bias
        self.qkv = nn.Linear(D, qkv_width, bias=bias)                                       # W_Q^t, W_K^t, W_V^t
        self.visual_qkv = nn.Linear(D, qkv_width, bias=bias) if c.visual_experts else None  # W_Q^v, W_K^v, W_V^v
        self.q_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else None
        self.out = nn.Linear(c.heads * self.d, D, bias=False)                               # W_O
        routed = c.visual_experts and c.route_output
        self.visual_out = nn.Linear(c.heads * self.d, D, bias=False) if routed else None

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """x (N, D), packed -> (N, D)."""
        router, H, G = inputs.router, self.H, self.G
        qkv = router.unpack(router(x, self.qkv, self.visual_qkv))                           # (B, T, (H+2G)d)
        qkv = qkv.view(*router.shape, H + 2 * G, self.d).transpose(1, 2)                    # (B, H+2G, T, d)
        qk, v = qkv.split((H + G, G), dim=1)
        q, k = rotate(self.norm_qk(qk), inputs.cos, inputs.sin).split((H, G), dim=1)
        if inputs.cache is not None:
            k, v = inputs.cache.write(self.layer, k, v)                                     # (B, G, S, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask,
                                           is_causal=inputs.mask is None and q.shape[2] > 1,
                                           enable_gqa=H != G)                               # (B, H, T, d)
        y = router.pack(y.transpose(1, 2).flatten(2))                                       # (N, H*d)
        return router(y, self.out, self.visual_out)

    def norm_qk(self, qk: Tensor) -> Tensor:
        """Not in the paper: the norms of Qwen3. qk: queries, then keys, (B, H + G, T, d)."""
        if self.q_norm is None:
            return qk
        return torch.cat((self.q_norm(qk[:, :self.H]), self.k_norm(qk[:, self.H:])), dim=1)


class SemVIEBlock(nn.Module):
    """Sec. 3.3, Fig. 3 right: x + AttentionMoE(LN(x)), then x + FFN-MoE(LN(x)). Eq. 4 prints no residual and feeds r
    instead of LN(r); Fig. 3 draws the bypass, and so does Qwen."""

    def __init__(self, config: SemVIEConfig, layer: int):
        super().__init__()
        self.norm_1 = RMSNorm(config.width, config.norm_eps)
        self.attention = AttentionMoE(config, layer)
        self.norm_2 = RMSNorm(config.width, config.norm_eps)
        self.ffn = SwiGLU(config.width, config.ffn_width)                                   # FFN^t
        self.visual_ffn = SwiGLU(config.width, config.ffn_width) if config.visual_experts else None   # FFN^v

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """x (N, D), packed -> (N, D)."""
        x = x + self.attention(self.norm_1(x), inputs)                                      # Eq. 3
        return x + inputs.router(self.norm_2(x), self.ffn, self.visual_ffn)                 # Eq. 4
