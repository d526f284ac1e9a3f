"""Solutions of 02_semvie.ipynb; they use names of the notebook, which a test runs first."""

# 1. A block has Q, K and V of 4,096 x 4,096 with a bias each, and three matrices of 4,096 x 11,008.
answer_1 = 32 * (3 * (4096 * 4096 + 4096) + 3 * 4096 * 11_008)                        # 5.94 billion

# 2. 64 image tokens, <img> and </img> each read all 5.
answer_2 = 66 * 5


# 3. Sort the positions by kind; Python's sort is stable, so the order of the sequence stays within a kind.
def answer_3(rows):
    kinds = "".join(rows)
    return sorted((i for i, kind in enumerate(kinds) if kind != "."), key=lambda i: kinds[i] == "V")


# 4. Both experts compute all tokens, and each token keeps one: right, but twice the work that the router needs.
def answer_4(attention, x, visual):
    is_visual_token = torch.tensor(visual)[:, None]                                   # (T, 1)
    qkv = torch.where(is_visual_token, attention.visual_qkv(x), attention.qkv(x))     # (T, 3D)
    q, k, v = qkv.view(len(x), 3, -1, attention.d).permute(1, 2, 0, 3)                # each (H, T, d)
    cos, sin = rope_angles(torch.arange(len(x))[None], attention.d, config.rope_base)
    q, k = rotate(q, cos[0], sin[0]), rotate(k, cos[0], sin[0])
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)     # (H, T, d)
    return attention.out(y.transpose(0, 1).reshape(len(x), -1))
