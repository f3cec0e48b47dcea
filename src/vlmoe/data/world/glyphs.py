"""The material: real handwritten digits (scikit-learn) and real glyphs (matplotlib's DejaVu fonts) as alpha masks.

A mask is uint8 (S, S): 255 where ink covers the pixel. The ink is scaled, keeping its proportions, to fill the box in
its longer direction and stands in its middle, so that "large" and "small" are true of every object and nothing but
its shape tells a character.
"""

from __future__ import annotations

import gzip
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from vlmoe.data.world.draws import stable_hash
from vlmoe.data.world.icons import font_file

# The last face is kept from training: its weight and its serifs are known from other faces, not the two together.
FACES = {
    "sans": "DejaVuSans.ttf",
    "sans bold": "DejaVuSans-Bold.ttf",
    "sans oblique": "DejaVuSans-Oblique.ttf",
    "mono": "DejaVuSansMono.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif bold": "DejaVuSerif-Bold.ttf",
}
TRAIN_FACES, HELD_OUT_FACE = tuple(FACES)[:-1], tuple(FACES)[-1]
HANDWRITING = "handwriting"  # stands for the face of a handwritten digit

# Glyphs are drawn larger, then area-averaged: no hinting is left and edges are smooth.
_OVERSAMPLING, _OVERSAMPLING_LARGE, _LARGE = 4, 2, 32


@lru_cache(maxsize=1)
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 samples of scikit-learn's optdigits test set: uint8 (1797, 8, 8) of 0 to 16, and their digits (1797,).

    The file is read where it lies: `sklearn.datasets` takes seconds to import, in every data worker.
    """
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz" if spec and spec.origin else Path()
    if path.is_file():
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float64)
        images, digits = table[:, :64], table[:, 64]
    else:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        images, digits = loaded.data, loaded.target
    return images.reshape(-1, 8, 8).astype(np.uint8), digits.astype(np.int64)


@lru_cache(maxsize=1)
def handwriting_pools() -> dict[str, list[list[int]]]:
    """Pool name -> digit -> numbers of its samples. Disjoint: a tenth for "val", a tenth for "handwriting"."""
    pools: dict[str, list[list[int]]] = {name: [[] for _ in range(10)] for name in ("train", "val", "handwriting")}
    for number, digit in enumerate(handwriting()[1].tolist()):
        tenth = stable_hash(f"handwritten sample {number}") % 10
        pools[{0: "handwriting", 1: "val"}.get(tenth, "train")][digit].append(number)
    return pools


def font_path(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FACES[face]


@lru_cache(maxsize=64)
def _font(path: Path, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=16384)
def digit_mask(sample: int, size: int) -> np.ndarray:
    """Handwritten sample as an alpha mask, uint8 (size, size)."""
    pixels = np.minimum(handwriting()[0][sample].astype(np.int64) * 21, 255).astype(np.uint8)  # 12 of 16 is full ink
    return _fit(Image.fromarray(pixels), size, Image.Resampling.BICUBIC)


@lru_cache(maxsize=16384)
def glyph_mask(character: str, face: str, size: int) -> np.ndarray:
    """A character's glyph as an alpha mask, uint8 (size, size). Raises ValueError when it leaves no ink."""
    return _drawn(character, font_path(face), size)


@lru_cache(maxsize=40_000)  # every drawing in two sizes: 16 to 32 MB at 24 to 32 pixels
def icon_mask(font: str, code: int, size: int) -> np.ndarray:
    """A code point of an icon font as an alpha mask, uint8 (size, size). Raises ValueError when it leaves no ink."""
    return _drawn(chr(code), font_file(font), size)


def _drawn(character: str, font: Path, size: int) -> np.ndarray:
    times = _OVERSAMPLING if size < _LARGE else _OVERSAMPLING_LARGE
    core = _font(font, times * size).getmask(character)
    if not all(core.size):
        raise ValueError(f"character {character!r}: no ink in font '{font.name}'")
    return _fit(Image.frombytes("L", core.size, bytes(core)), size, Image.Resampling.BOX)


def _fit(ink: Image.Image, size: int, resampling: Image.Resampling) -> np.ndarray:
    box = ink.getbbox()
    if box is None:
        raise ValueError("no ink")
    ink = ink.crop(box)
    longer = max(ink.size)
    width, height = (max(1, (2 * n * size + longer) // (2 * longer)) for n in ink.size)
    mask = np.zeros((size, size), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    mask[top : top + height, left : left + width] = np.asarray(ink.resize((width, height), resampling))
    mask.flags.writeable = False  # masks are shared between samples
    return mask
