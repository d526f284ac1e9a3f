"""Not in the paper: keys and values of a sequence that is being sampled, so that a forward pass reads new tokens alone.

Shapes: B batch, T tokens, G key-value heads, d width of a head, S tokens in the cache.
"""
from torch import Tensor


class KVCache:
    """Not in the paper: keys and values of the past, allocated once, see `MARS.new_cache`."""

    def __init__(self, room: Tensor, angles: tuple[Tensor, Tensor]):
        """room: zeros (2, layers, B, G, max_tokens, d). angles: cos and sin of so many tokens, of `rope_angles`."""
        self.keys, self.values = room
        self.angles, self.length = angles, 0            # length: tokens held, and those of the forward pass that runs
        self.padding: Tensor | None = None              # (B,) at the left of each prompt; None: none anywhere
        self.steps: list = []                           # of each layer and the last norm, see step.py

    def extend(self, T: int) -> None:
        """Before the layers: T tokens follow. The views that each layer writes to and reads are made in one go."""
        spans = (self.length, T), (0, self.length + T)
        views = [each.narrow(3, *span).unbind() for span in spans for each in (self.keys, self.values)]
        self.views, self.length = list(zip(*views)), self.length + T

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, G, T, d) of the new tokens and returns all keys and values so far, (B, G, S, d)."""
        new_keys, new_values, keys, values = self.views[layer]
        new_keys.copy_(k)
        new_values.copy_(v)
        return keys, values
