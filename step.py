"""Not in the paper: the forward pass that samples image tokens, as fast as plain PyTorch goes with one row.

It computes what `MARS.hidden` does for visual tokens that follow others in a cache (tested), without the router and
without calls of modules: in a small model those take longer than the arithmetic.

Shapes: B batch, T tokens, D width, H query heads, G key-value heads, d width of a head.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kv_cache import KVCache
from mars import MARS
from semvie import LayerInputs, RMSNorm, SemVIEBlock, rotate


def for_sampling(model: MARS) -> MARS:
    """Lays the matrices of a model on a CPU out in the order in which the product with a single row reads them fastest;
    their shapes and values stay. Returns the model, which would train more slowly."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
            weight = module.weight.detach().t().contiguous().t()              # (out, in), one input after another
            module.weight = nn.Parameter(weight, module.weight.requires_grad)
    return model


def step_of_norm(norm: RMSNorm):
    """An RMSNorm as a function: on a CPU, which has no fused kernel, in half as many operations."""
    if norm.weight.device.type != "cpu":
        return norm
    n = len(norm.weight)
    weight, floor = norm.weight * n ** 0.5, norm.weight.new_tensor((n * norm.eps) ** 0.5)
    return lambda x: x * weight / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(floor)


def step_of_block(block: SemVIEBlock):
    """A block as a function of x (B * T, D) and the inputs of all layers, for visual tokens."""
    a, ffn = block.attention, block.visual_ffn or block.ffn
    norm_1, norm_2 = step_of_norm(block.norm_1), step_of_norm(block.norm_2)
    linears, H, G, d = (a.visual_qkv or a.qkv, a.visual_out or a.out, ffn.gate_up, ffn.down), a.H, a.G, a.d
    W_qkv, W_O, W_gate_up, W_down = (linear.weight.t() for linear in linears)           # (in, out)
    b_qkv = W_qkv.new_zeros(W_qkv.shape[1]) if linears[0].bias is None else linears[0].bias

    def step(x: Tensor, inputs: LayerInputs) -> Tensor:
        qkv = torch.addmm(b_qkv, norm_1(x), W_qkv)                                      # (B*T, (H+2G)d)
        qkv = qkv.view(-1, inputs.cos.shape[2], H + 2 * G, d).transpose(1, 2)           # (B, H+2G, T, d)
        qk, v = qkv.split((H + G, G), dim=1)
        q, k = rotate(a.norm_qk(qk), inputs.cos, inputs.sin).split((H, G), dim=1)
        k, v = inputs.cache.write(a.layer, k, v)                                        # (B, G, S, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, enable_gqa=H != G)
        x = torch.addmm(x, y.transpose(1, 2).reshape(len(x), -1), W_O)                  # Eq. 3
        gate, up = torch.mm(norm_2(x), W_gate_up).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate) * up, W_down)                                # Eq. 4
    return step


def hidden_of_images(model: MARS, tokens: Tensor, cache: KVCache) -> Tensor:
    """Visual tokens (B, T) that go on where a cache ends -> last hidden states (B, T, D), as of `MARS.hidden`."""
    cache.extend(tokens.shape[1])
    cache.steps = cache.steps or [*map(step_of_block, model.blocks), step_of_norm(model.norm)]
    inputs, (*steps, norm) = model.layer_inputs(tokens, None, cache), cache.steps
    x = F.embedding(tokens.flatten() - model.vocabulary.text, model.visual_embedding.weight)       # (B*T, D)
    for step in steps:
        x = step(x, inputs)
    return norm(x).view(*tokens.shape, -1)
