"""Not in the paper: keys and values of a sequence that is being sampled, so that a forward pass reads new tokens alone.

Shapes: B batch, T tokens, G key-value heads, d width of a head, S tokens in the cache.
"""
from torch import Tensor, zeros


class KVCache:
    """Not in the paper: keys and values of the past, allocated once."""

    def __init__(self, layers: int, batch: int, kv_heads: int, max_tokens: int, head_width: int, device, dtype):
        shape = (2, layers, batch, kv_heads, max_tokens, head_width)
        self.keys, self.values = zeros(shape, device=device, dtype=dtype)
        self.max_tokens, self.length = max_tokens, 0    # length: tokens held; moves once all layers have written
        self.padding: Tensor | None = None              # (B,) at the left of each prompt; None: none anywhere
        self.angles: tuple[Tensor, Tensor] = ()         # cos and sin of every token that it has room for
        self.steps: list = []                           # `SemVIEBlock.visual_step` of each layer

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v (B, G, T, d) and returns all keys and values so far, (B, G, S, d)."""
        T, keys, values = k.shape[2], self.keys[layer], self.values[layer]                  # (B, G, max_tokens, d)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        return keys.narrow(2, 0, self.length + T), values.narrow(2, 0, self.length + T)
