"""Images: opened strictly, resized as each stage asks (paper Sec. 3.4), turned into pixels and back.

Shapes: (H, W) pixels. An image is a Pillow image in RGB.
"""
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from files import atomic_write, check_regular, first_line

RASTER = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")      # nothing that starts another program


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Not in the paper: any raster file -> RGB, upright by its EXIF tag, transparency on white, 16 bits scaled to 8.
    content: its bytes, where they are at hand; `path` is then only its name. Raises ValueError, one line."""
    source = check_regular(path, "an image") if content is None else io.BytesIO(content)
    try:
        with warnings.catch_warnings(record=True), Image.open(source, formats=RASTER) as image:
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                raise ValueError("its pixels are floats or have 32 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                             # 16 bits a pixel; Pillow would clip, not scale
                image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:                           # the decoder of each format has errors of its own
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise ValueError(f"{path}: not a whole image ({reason}); expected {', '.join(RASTER)} "
                         "of 8 or 16 bits") from None


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Sec. 3.4, Stage I: scales and crops the middle to (height, width) pixels."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Resize:
    """Sec. 3.4: the size that images are encoded at: one square in Stage I; from Stage II on each has its own."""
    side: int                     # of the square, or the shorter side; in pixels
    max_aspect: float = 1.0       # most that the longer side may be of the shorter, as the image has it; 1: a square
    long_side: int = 0            # Stage III: of an enlarged square, see `upscaled_size`; 0: not enlarged

    def size(self, image: Image.Image, factor: int) -> tuple[int, int]:
        """(H, W) in pixels, multiples of the down-sampling factor."""
        ratio = min(self.max_aspect, max(image.size) / min(image.size))
        long = round(self.side * ratio / factor) * factor
        size = (long, self.side) if image.height > image.width else (self.side, long)
        return upscaled_size(size, self.long_side, factor) if self.long_side else size


def upscaled_size(size: tuple[int, int], long_side: int, factor: int) -> tuple[int, int]:
    """Sec. 3.4, Stage III: the shape of an image -> its enlarged one. (H, W) in pixels, multiples of the factor.

        (64, 64), long_side 128  ->  (128, 128)       as the paper's 256 -> 1,024
        (64, 128), long_side 128  ->  (128, 256)      ours: others are enlarged as many times as a square
    """
    return tuple(round(side * long_side / min(size) / factor) * factor for side in size)


def to_pixels(image: Image.Image) -> Tensor:
    """Not in the paper: an image -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_image(pixels: Tensor) -> Image.Image:
    """Not in the paper: (3, H, W) float -> an image; values beyond [0, 1] are clipped."""
    return Image.fromarray((pixels.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def psnr(image: Image.Image, truth: Image.Image) -> float:
    """Not in the paper: peak signal-to-noise ratio in dB. An error below rounding counts as rounding: 58.9 at most."""
    error = np.mean((np.asarray(image, float) - np.asarray(truth, float)) ** 2)
    return 10 * math.log10(255 ** 2 / max(float(error), 1 / 12))


def grid(images: list[Image.Image], columns: int = 8, gap: int = 2) -> Image.Image:
    """Not in the paper: images in rows, each at the top left of its cell, on white."""
    width, height = (max(sizes) for sizes in zip(*(image.size for image in images)))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def enlarge(image: Image.Image, scale: int = 0) -> Image.Image:
    """Not in the paper: for the eye, `scale` times as large, each pixel a square; 0: at least 256 pixels a side."""
    scale = scale or -(-256 // min(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def undo_enlarge(image: Image.Image) -> Image.Image:
    """Not in the paper: what `enlarge` made `image` of, pixel for pixel; any other image as it is."""
    for n in range(min(image.size) // 8, 1, -1):
        if image.width % n == 0 and image.height % n == 0:
            small = image.reduce(n)
            if small.resize(image.size, Image.Resampling.NEAREST).tobytes() == image.tobytes():
                return small
    return image


def save_image(image: Image.Image, path: str | Path) -> None:
    """Not in the paper: writes a PNG. Raises ValueError, one line, where the path cannot be written."""
    atomic_write(path, lambda temporary: image.save(temporary, format="PNG"))
