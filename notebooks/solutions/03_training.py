"""Solutions of 03_training.ipynb; they use names of the notebook, which a test runs first."""

# 1. Each id has a chance of 1 / 160,136.
answer_1 = math.log(160_136)


# 2. n image tokens, <img> and </img> are n + 2 visual tokens in a row, so n + 2 - k pairs lie k apart. Head 1 is asked
#    for <img> too, by the last word: one more.
def answer_2(n, k):
    return n + 2 - k + (k == 1)


# 3. Shift by one; the last position has nothing to predict.
def answer_3(tokens, is_target):
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = torch.where(is_target[:, 1:], tokens[:, 1:], IGNORE)
    return targets


# 4. Two heads, one softmax, the mean over the targets.
def answer_4(h, text_rows, visual_rows, targets):
    logits = torch.cat([h @ text_rows.T, h @ visual_rows.T], dim=-1)                  # (B, T, V_t + V_v)
    log_p, counts = logits - logits.logsumexp(-1, keepdim=True), targets != IGNORE
    return -log_p[counts].gather(-1, targets[counts][:, None]).mean()
