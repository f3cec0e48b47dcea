"""Random views of images in training: a part of the image, mirrored, in other colours.

A crop is drawn as by torchvision's RandomResizedCrop (Szegedy et al. 2015, section 6), colours are changed as by its
ColorJitter, both with Pillow. All choices come from one generator for each sample (see `counter.stream`) and are always
drawn in the same order, so that a run shows the same view at the same step again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance

from vlmoe.config import AugmentConfig

TRIES = 10  # crops drawn until one lies in the image; after that it is the largest of a permitted shape in the middle

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class View:
    """One showing of an image. Two views drawn from one generator differ."""

    def __init__(self, config: AugmentConfig, rng: np.random.Generator) -> None:
        self.config = config
        self._crops: list[list[float]] = rng.random((TRIES, 4)).tolist()
        self._flip: float = rng.random()
        self._amounts: list[float] = rng.uniform(-1, 1, 4).tolist()
        self._order: list[int] = rng.permutation(4).tolist()

    def box(self, width: int, height: int) -> Box | None:
        """The part of an image that is shown; None: the centre square."""
        if self.config.crop is None:
            return None
        least, ratio = self.config.crop, self.config.ratio
        for area, shape, x, y in self._crops:
            pixels = width * height * (least + area * (1 - least))
            aspect = math.exp((2 * shape - 1) * math.log(ratio))
            w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * ratio)), min(height, round(width * ratio))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def change(self, image: Image.Image) -> Image.Image:
        """The upright RGB image mirrored and in other colours."""
        config = self.config
        if self._flip < config.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        changes: list[tuple[float, Callable[[Image.Image, float], Image.Image]]] = [
            (config.brightness, lambda i, amount: ImageEnhance.Brightness(i).enhance(1 + amount)),
            (config.contrast, lambda i, amount: ImageEnhance.Contrast(i).enhance(1 + amount)),
            (config.saturation, lambda i, amount: ImageEnhance.Color(i).enhance(1 + amount)),
            (config.hue, turn_hue),
        ]
        for number in self._order:
            most, change = changes[number]
            if most:
                image = change(image, most * self._amounts[number])
        return image


Views = Callable[[], View]  # the views of a sample's images, one after the other


def views_of(config: AugmentConfig, rng: np.random.Generator) -> Views:
    return lambda: View(config, rng)


def turn_hue(image: Image.Image, turns: float) -> Image.Image:
    """An RGB image with its hues moved along the circle of colours. turns: 1/3 makes green of red."""
    hue, saturation, value = image.convert("HSV").split()
    steps = round(256 * turns)
    hue = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
