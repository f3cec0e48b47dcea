"""Colour profiles (ICC) that images carry: their colours as sRGB, by LittleCMS through Pillow's ImageCms."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode of the images it describes
LARGEST = 4 << 20  # bytes of a profile; those of printing presses have up to 3 MB
SAME = 2  # levels of 255: a profile that moves no colour further is sRGB's, written by another program


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image of mode L, RGB or CMYK as sRGB, in mode RGB.

    Grey images may carry a profile for RGB: equal parts of the three colours are meant.

    Raises ValueError when the profile is broken or describes images of another kind.
    """
    try:
        mode, transform = _transform(profile)
    except (ImageCms.PyCMSError, OSError, TypeError, ImportError) as error:  # ImportError: a Pillow without LittleCMS
        raise ValueError(f"broken colour profile: {error}") from None
    if (image.mode, mode) == ("L", "RGB"):
        image = image.convert("RGB")
    if image.mode != mode:
        raise ValueError(f"colour profile for images of mode {mode}, not {image.mode}")
    return image if transform is None else transform.apply(image)


@functools.lru_cache(maxsize=16)  # images of one origin have the same profile; making a transform costs up to 10 ms
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of the images a profile describes, and what makes sRGB of them; None where they are sRGB."""
    if len(profile) > LARGEST:
        raise ValueError(f"colour profile of {len(profile)} bytes")
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space
    if space not in MODES:
        raise ValueError(f"colour profile of the colour space {space.strip()}")
    mode = MODES[space]
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    assert isinstance(transform, ImageCms.ImageCmsTransform)
    if mode == "RGB":
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        found = np.asarray(transform.apply(Image.fromarray(probe)))
        if np.abs(found.astype(int) - probe).max() <= SAME:
            return mode, None
    return mode, transform
