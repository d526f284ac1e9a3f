"""Not in the paper: whether a picture of the rendered world is what its caption asked for, from pixels alone.

The paper measures text-image agreement with trained evaluators (T2I-CompBench, Sec. 4). In our world every fact
is drawn by world.py, so a few rules on pixels decide them: `see` finds the things in a picture, `check` compares
them with a Claim. A slightly blurred or off-colour reconstruction is read as a person would read it; a broken
thing is called 'unknown' and never counts as right.

Shapes: H, W picture; S side of a thing's box in pixels; P = S * S.
"""
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from world import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Claim, shade, stencil, tint

UNKNOWN = "unknown"
FOREGROUND = 36.0      # a pixel this far from the background (RGB distance) may belong to a thing
BACKGROUND = 60.0      # a background farther than this from every palette colour is unknown
COLOUR = 45.0          # a thing whose pixels lie farther than this from every palette colour, on average, is too
OVERLAP = 0.7          # least intersection over union with a drawn silhouette
CONTRAST = 0.2         # least strength of a texture, as a share of the drawn one; below it the thing is solid
KEYS = ("colour", "shape", "texture", "size", "count", "relation", "background", "all")


@dataclass(frozen=True)
class Seen:
    """One thing found in a picture; any word may be 'unknown'."""
    colour: str
    shape: str
    texture: str
    size: str
    box: tuple[int, int, int, int]  # top, left, bottom, right in pixels; bottom and right exclusive


@dataclass(frozen=True)
class Sight:
    """What is seen in a picture."""
    things: tuple[Seen, ...]  # from the largest to the smallest
    background: str


def see(image: Image.Image | np.ndarray, cell: int = 16) -> Sight:
    """The things and the background of an RGB picture whose sides are multiples of `cell`."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] % cell or pixels.shape[1] % cell:
        raise ValueError(f"picture of shape {pixels.shape}: expected (H, W, 3), H and W multiples of {cell}")
    pixels = pixels.astype(np.float32)  # (H, W, 3)
    # Things keep a pixel away from the edge, so what is most usual along the edge is the background.
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)  # (3,)
    distance = np.linalg.norm(pixels - ground, axis=2)  # (H, W)
    names, values = list(BACKGROUNDS), np.array(list(BACKGROUNDS.values()))
    gaps = np.linalg.norm(values - ground, axis=1)
    background = names[gaps.argmin()] if gaps.min() < BACKGROUND else UNKNOWN
    blobs = [blob for blob in components(distance > FOREGROUND) if len(blob) >= cell * cell / 16]  # no specks
    blobs.sort(key=len, reverse=True)
    return Sight(tuple(_recognise(pixels, distance, blob, cell) for blob in blobs), background)


def _flood(wet, free):
    """All free pixels that the wet ones reach by steps to the side, up and down; both (H, W), wet is changed."""
    area = 0
    while (now := np.count_nonzero(wet)) > area:
        area = now
        wet[1:] |= wet[:-1] & free[1:]
        wet[:-1] |= wet[1:] & free[:-1]
        wet[:, 1:] |= wet[:, :-1] & free[:, 1:]
        wet[:, :-1] |= wet[:, 1:] & free[:, :-1]
    return wet


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a boolean (H, W) mask, each an (n, 2) array of rows and columns."""
    left, parts = mask.copy(), []
    while left.any():
        seed = np.zeros_like(left)
        seed.flat[left.argmax()] = True
        part = _flood(seed, left)
        parts.append(np.argwhere(part))
        left &= ~part
    return parts


def _filled(mask):
    """The mask and every hole that it encloses."""
    free = np.pad(~mask, 1, constant_values=True)
    edge = np.pad(np.zeros_like(mask), 1, constant_values=True)
    return ~_flood(edge, free)[1:-1, 1:-1]


def _recognise(pixels, distance, blob, cell):
    """Names of the thing that a blob of foreground pixels shows."""
    # Cut at half the thing's own contrast: a fixed cut would fatten bright things that are a little blurred.
    level = max(FOREGROUND, 0.5 * np.median(distance[tuple(blob.T)]))
    blob = blob[distance[tuple(blob.T)] > level]
    (top, left), (bottom, right) = blob.min(0), blob.max(0) + 1
    box = tuple(int(x) for x in (top, left, bottom, right))
    mask = np.zeros((bottom - top, right - left), bool)
    mask[blob[:, 0] - top, blob[:, 1] - left] = True

    # Size: both sides of the box within 3 pixels in 16 of what is drawn, a box of whole cells less a pixel around.
    misfit = {size: max(abs(side - (cells - 0.125) * cell) for side in mask.shape) for size, cells in SIZES.items()}
    size = min(misfit, key=misfit.get)
    if misfit[size] > 0.1875 * cell:
        return Seen(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, box)

    # Shape: the drawn silhouette with the largest intersection over union, shifted by up to a pixel.
    side = SIZES[size] * cell
    silhouettes = _drawn(size, cell)[0]  # (6, S, S)
    canvas = np.zeros((side + 2, side + 2), bool)
    row, col = ((side + 2 - n) // 2 for n in mask.shape)
    canvas[row:row + mask.shape[0], col:col + mask.shape[1]] = _filled(mask)
    shifts = [(dy, dx) for dy in range(3) for dx in range(3)]
    views = np.stack([canvas[dy:dy + side, dx:dx + side] for dy, dx in shifts]).reshape(9, -1).astype(np.float32)
    flat = (silhouettes >= 0.5).reshape(len(SHAPES), -1).astype(np.float32)
    shared = views @ flat.T  # (9, 6)
    overlap = shared / (canvas.sum() + flat.sum(1) - shared)
    best, kind = np.unravel_index(overlap.argmax(), overlap.shape)
    if overlap[best, kind] < OVERLAP:
        return Seen(UNKNOWN, UNKNOWN, UNKNOWN, size, box)

    # Colour and texture are read a pixel inside the outline, where a blur brings in little of the background.
    whole = np.pad(silhouettes[kind] == 1, 1)
    rows, cols = np.nonzero(whole[1:-1, 1:-1] & whole[2:, 1:-1] & whole[:-2, 1:-1] & whole[1:-1, 2:] & whole[1:-1, :-2])
    y, x = rows + top - row + shifts[best][0], cols + left - col + shifts[best][1]
    within = (y >= 0) & (y < len(pixels)) & (x >= 0) & (x < pixels.shape[1])
    inner = pixels[y[within], x[within]]  # (n, 3)
    colour = _colour(inner)
    texture = UNKNOWN if colour == UNKNOWN else _texture(
        inner, colour, _drawn(size, cell)[1][kind][:, rows[within], cols[within]])
    return Seen(colour, SHAPES[kind], texture, size, box)


@lru_cache(maxsize=None)
def _drawn(size, cell):
    """Silhouettes (6, S, S) and second tones of every texture (6, 3, S, S), as shares of a pixel from 0 to 1."""
    side = SIZES[size] * cell
    down = lambda fine: fine.reshape(side, 4, side, 4).mean((1, 3))
    drawn = [[stencil(shape, texture, size, cell) for texture in TEXTURES] for shape in SHAPES]
    return (np.stack([down(row[0][0]) for row in drawn]),
            np.stack([[down(pattern) for _, pattern in row] for row in drawn]))


@lru_cache(maxsize=None)
def _tones():
    """Every colour (8, 1, 3) and its way to its shade and to its tint (8, 2, 3)."""
    colours = np.array(list(COLOURS.values()), np.float32)[:, None]
    return colours, np.array([(shade(name), tint(name)) for name in COLOURS], np.float32) - colours


def _colour(inner):
    """The colour whose tones, from its shade over itself to its tint, pass nearest to the pixels (n, 3)."""
    colours, ways = _tones()
    offset = inner - colours  # (8, n, 3)
    along = np.einsum("cnd,ckd->ckn", offset, ways) / (ways ** 2).sum(2, keepdims=True)  # (8, 2, n)
    rest = offset[:, None] - along.clip(0, 1)[..., None] * ways[:, :, None]  # (8, 2, n, 3)
    away = np.sqrt((rest ** 2).sum(3)).min(1).mean(1)  # (8,)
    return tuple(COLOURS)[away.argmin()] if away.min() < COLOUR else UNKNOWN


def _texture(inner, colour, patterns):
    """The texture whose pattern (3, n) is strongest in the pixels (n, 3), as a share of its drawn contrast."""
    strength = {}
    for texture, tone, pattern in zip(TEXTURES[1:], (shade(colour), tint(colour)), patterns[1:]):
        way, wave = np.array(tone, np.float32) - COLOURS[colour], pattern - pattern.mean()  # (3,), (n,)
        strength[texture] = wave @ ((inner - COLOURS[colour]) @ way) / ((wave @ wave) * (way @ way))
    best = max(strength, key=strength.get)
    return best if strength[best] > CONTRAST else "solid"


def related(a: tuple[int, int, int, int], relation: str, b: tuple[int, int, int, int]) -> bool:
    """Whether box a is wholly left of, right of, above or below box b, and faces it."""
    if relation in ("right", "below"):
        a, b, relation = b, a, {"right": "left", "below": "above"}[relation]
    along, across = (1, 0) if relation == "left" else (0, 1)
    return a[along + 2] <= b[along] and a[across] < b[across + 2] and b[across] < a[across + 2]


def compare(sight: Sight, claim: Claim) -> dict[str, bool | None]:
    """Which facts of a claim hold in what is seen; None for those that the claim does not state.

    The claimed things are matched with the seen ones so that most facts hold. `count` and `all` are never None.
    """
    things = list(sight.things[:6])  # the largest: a picture of many things is wrong whichever we match
    things += [None] * (len(claim.things) - len(things))  # None: the claimed thing is nowhere
    best = {}
    for matched in permutations(things, len(claim.things)):
        facts = {key: [] for key in ("colour", "shape", "texture", "size", "relation")}
        for said, seen in zip(claim.things, matched):
            for key in ("colour", "shape", "texture", "size"):
                if getattr(said, key) is not None:
                    facts[key].append(seen is not None and getattr(seen, key) == getattr(said, key))
        for i, relation, j in claim.relations:
            found = matched[i] is not None and matched[j] is not None
            facts["relation"].append(found and related(matched[i].box, relation, matched[j].box))
        if not best or sum(map(sum, facts.values())) > sum(map(sum, best.values())):
            best = facts
    result = {key: all(values) if values else None for key, values in best.items()}
    result["count"] = len(sight.things) == len(claim.things)
    result["background"] = None if claim.background is None else sight.background == claim.background
    result["all"] = all(value is not False for value in result.values())
    return {key: result[key] for key in KEYS}


def check(image: Image.Image | np.ndarray, claim: Claim, cell: int = 16) -> dict[str, bool | None]:
    """Which facts of a claim a picture shows: `compare` with what we `see`."""
    return compare(see(image, cell), claim)
