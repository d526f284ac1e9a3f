"""Solutions of 02_semvie.ipynb; they use names of the notebook, which a test runs first."""

# 1. A block has Q, K and V of 4,096 x 4,096 with a bias each, and three matrices of 4,096 x 11,008.
answer_1 = 32 * (3 * (4096 * 4096 + 4096) + 3 * 4096 * 11_008)                        # 5.94 billion


# 2. Sort the places by kind; Python's sort is stable, so the order of the sequence stays within a kind.
def answer_2(rows):
    kinds = "".join(rows)
    return sorted((i for i, kind in enumerate(kinds) if kind != "."), key=lambda i: kinds[i] == "V")
