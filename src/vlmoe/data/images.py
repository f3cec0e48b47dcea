"""Images from anyone's files, safely: bytes -> uint8 RGB of the model's size, or BadSample with the reason.

Pillow decodes. The largest centred square is resized with Pillow's antialiased bicubic filter, in one pass; a JPEG much
larger than needed is decoded at a half, a quarter or an eighth of its size first (never below twice the target).
Colours become sRGB by the image's colour profile, transparency is laid over white, 16-bit greys keep their upper 8
bits, of an animation the first frame counts, EXIF orientation is applied. In training the image may be a random view
of what the file holds (`vlmoe.data.augment`).
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from vlmoe.data.augment import View
from vlmoe.data.colour import to_srgb
from vlmoe.data.sample import BadSample

# Formats of pictures; of them those that this Pillow reads count. Its others are documents, data, or drawings that
# another program renders. Of JPEG files with several pictures (MPO) the first is read.
_PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI", "HEIF", "JXL")
Image.init()
FORMATS = tuple(f for f in _PICTURES if f in Image.OPEN)
_USUAL = ("jpg", "jpeg", "png", "webp", "gif")
SUFFIXES = (*_USUAL, *sorted({e[1:] for e, f in Image.registered_extensions().items() if f in FORMATS} - {*_USUAL}))
OTHER_PICTURES = {"heic", "heif", "jxl", "svg", "psd", "eps", "ico", "pcx", "dds", "exr", "hdr", "cr2", "nef", "dng",
                  "jp2", "avif", "qoi", "tga", "raw", "arw"} - {*SUFFIXES}  # fmt: skip
_ORIENTATION = 0x0112
_TURNS = {  # EXIF orientation -> what puts it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


WITHOUT_PROFILE = "without their colour profile, which cannot be used"


def decode_image(
    raw: bytes, key: str, image_size: int, max_pixels: int, view: View | None = None, notes: list[str] | None = None
) -> np.ndarray:
    """uint8 (image_size, image_size, 3): the centre square, or what `view` shows.

    notes: gets WITHOUT_PROFILE where the colour profile is broken or of another kind of image.

    Raises BadSample: not an image of a known format, truncated, corrupt, or more than `max_pixels` by its header (then
    nothing is decoded).
    """
    if not raw:
        raise BadSample(key, "empty image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about sizes (judged below) and odd metadata
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadSample(key, f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
                if min(width, height) < 1:
                    raise BadSample(key, f"image of {width} x {height} pixels")
                return _square(image, image_size, view, [] if notes is None else notes)
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample(key, f"more pixels than data.max_pixels = {max_pixels}") from None
    except Image.UnidentifiedImageError:
        raise BadSample(key, f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise BadSample(key, f"broken image: {str(error) or type(error).__name__}") from None


def _square(image: Image.Image, size: int, view: View | None, notes: list[str]) -> np.ndarray:
    turn, profile = _TURNS.get(_orientation(image)), image.info.get("icc_profile")
    width, height = image.size
    crop = view and view.box(width, height)
    needed = min(crop[2] - crop[0], crop[3] - crop[1]) if crop else min(width, height)
    if image.format in {"JPEG", "MPO"}:
        shrink = next((s for s in (8, 4, 2) if s * 2 * size <= needed), 1)
        image.draft(None, (width // shrink, height // shrink))
    pixels = _plain(image)
    if crop:  # as many shapes are wide as high, so the image need not be turned before
        x, y = pixels.width / width, pixels.height / height
        box = (crop[0] * x, crop[1] * y, crop[2] * x, crop[3] * y)
    else:
        side = min(pixels.size)
        left, top = (pixels.width - side) / 2, (pixels.height - side) / 2
        box = (left, top, left + side, top + side)
    pixels = pixels.resize((size, size), Image.Resampling.BICUBIC, box=box)
    alpha = pixels.getchannel("A") if pixels.mode in {"LA", "RGBA"} else None
    colours = pixels.convert(pixels.mode[:-1]) if alpha else pixels
    if profile:
        try:
            colours = to_srgb(colours, profile)
        except ValueError:  # a picture in slightly wrong colours is worth more than none
            notes.append(WITHOUT_PROFILE)
    colours = colours.convert("RGB")
    if alpha:
        colours.putalpha(alpha)
        colours = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    if turn is not None:  # turning the small square gives the same as turning the image first
        colours = colours.transpose(turn)
    if view:
        colours = view.change(colours)
    return np.array(colours, dtype=np.uint8)


def _plain(image: Image.Image) -> Image.Image:
    """8 bits a channel: L, RGB or CMYK, or LA or RGBA where there is transparency (resizing weighs colours by it)."""
    if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion clips instead of scaling
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    grey = image.mode in {"1", "L", "LA", "La"}
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        wanted = "LA" if grey else "RGBA"
    else:
        wanted = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the image unusable
        return 1
