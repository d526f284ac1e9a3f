"""Solutions of 01_tokenizer.ipynb; they use names of the notebook, which a test runs first."""

# 1. 16 x 24 cells, and the two tokens around them.
answer_1 = (256 // 16) * (384 // 16) + 2


# 2. Drop the first and the last id, take away the offset of the codes, give the list its shape.
def answer_2(ids, height, width, vocabulary):
    return torch.tensor(ids[1:-1]).sub(vocabulary.text).view(height, width)
