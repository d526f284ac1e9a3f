"""Solutions of 03_training.ipynb; they use names of the notebook, which a test runs first."""

# 1. Each code has a chance of 1 / 2304.
answer_1 = math.log(2304)


# 2. n codes and <img>, </img> are n + 2 visual tokens in a row, so n + 2 - k pairs lie k apart. Head 1 is asked for
#    <img> too, by the last word: one more.
def answer_2(n, k):
    return n + 2 - k + (k == 1)
