"""Solutions of 05_results.ipynb; they use names of the notebook, which a test runs first."""
from images import resize_and_crop, to_pixels

# 1. Count up in hundreds until the lower end of one lies above the upper end of the other.
answer_1 = 100
while interval(round(0.87 * answer_1), answer_1)[1] >= interval(round(0.90 * answer_1), answer_1)[0]:
    answer_1 += 100

# 2. 512 / 16 = 32 cells a side: 1,024 image tokens to write in place of 4,096.
answer_2 = (stages["Stage I"] + stages["Stage II"] + 10e6 * operations(64, 256, 1024)) / day


# 3. The smallest distance is the smallest mean squared error.
def answer_3(drawn, images):
    a, b = (torch.stack([to_pixels(resize_and_crop(image, 32, 32)).flatten() for image in part])
            for part in (drawn, images))
    return torch.cdist(a, b).argmin(1).tolist()


# 4. Try all fractions in steps of one in ten thousand.
def answer_4(correct, n):
    p = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    inside = p[(correct / n - p).abs() <= 1.96 * (p * (1 - p) / n).sqrt() + 1e-12]
    return float(inside.min()), float(inside.max())
