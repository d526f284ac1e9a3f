"""Solutions of 01_tokenizer.ipynb; they use names of the notebook, which a test runs first."""

# 1. 16 x 24 cells, and the two special tokens around them.
answer_1 = (256 // 16) * (384 // 16) + 2


# 2. Drop the first and the last id, subtract where image tokens begin, give the list its shape.
def answer_2(ids, height, width, vocabulary):
    return torch.tensor(ids[1:-1]).sub(vocabulary.text).view(height, width)


# 3. The value of the nearest entry, the gradient of z.
def answer_3(z, entries):
    z_q = entries[torch.cdist(z.detach(), entries).argmin(1)]
    return z + (z_q - z).detach()
