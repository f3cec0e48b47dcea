"""Pictures that are nearly the same: saved again as JPEG, at another size, with a little noise.

The hash is the usual one of 64 bits, pHash: of the grey picture at 32 x 32 pixels, which of the 8 x 8 lowest
frequencies lie above their median. It says nothing of colours, so pictures of near hashes are compared by 4 x 4
colours, too.

Shape suffixes: N pictures · C colours of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

Look = tuple[int, bytes]  # a picture's hash and its colours

BITS = 4  # of the 64 that may differ
COLOURS = 8.0  # of 255: what the colours of two thumbnails may differ by, on average
REACH = 1000  # a picture is compared with so many others that share a fifth of its hash, at most
_SIDE, _LOW, _THUMB = 32, 8, 4
_COSINES = np.cos(np.pi * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))  # the lowest rows of a DCT
_BANDS = BITS + 1  # if at most BITS bits differ, one of more bands has none that does


def look_at(image_HW3: np.ndarray) -> Look:
    """Of a uint8 (H, W, 3) picture: a hash of 64 bits, and its 4 x 4 colours in 48 bytes."""
    picture = Image.fromarray(image_HW3)
    grey = np.asarray(picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big"), picture.resize((_THUMB, _THUMB), Image.Resampling.BOX).tobytes()


def near(pictures: Sequence[Look], known: Sequence[Look] | None = None) -> dict[int, int]:
    """Number of a picture -> number of one that is nearly the same: of those before it, or of `known` if that is given.

    Pictures are brought together by a fifth of their hash, and there by the order they stand in: where more than
    `REACH` share it, as plain ones may, some are not compared.
    """
    looks, start = [*(known or ()), *pictures], len(known or ())
    hash_N = np.array([value for value, _ in looks], dtype=np.uint64)
    colours_NC = np.frombuffer(b"".join(colours for _, colours in looks), dtype=np.uint8).reshape(
        len(looks), 3 * _THUMB**2
    )
    found: dict[int, int] = {}
    for band in range(_BANDS):
        low, high = (round(64 * edge / _BANDS) for edge in (band, band + 1))
        key_N = hash_N >> np.uint64(low) & np.uint64((1 << (high - low)) - 1)
        order_N = np.argsort(key_N, kind="stable")
        for apart in range(1, min(REACH, len(looks))):
            one, other = order_N[:-apart], order_N[apart:]  # with equal keys, `one` stands before `other`
            together = key_N[one] == key_N[other]
            if not together.any():
                break
            one, other = one[together], other[together]
            alike = (np.bitwise_count(hash_N[one] ^ hash_N[other]) <= BITS) & (other >= start)
            if known is not None:
                alike &= one < start
            one, other = one[alike], other[alike]
            alike = _difference(colours_NC[one], colours_NC[other]) <= COLOURS
            for a, b in zip(one[alike].tolist(), other[alike].tolist(), strict=True):
                found.setdefault(b - start, a)
    return found


def _difference(one_NC: np.ndarray, other_NC: np.ndarray) -> np.ndarray:
    """How far colours differ on average, apart from how light each picture is as a whole."""
    difference_NC = one_NC.astype(np.float32) - other_NC
    return np.abs(difference_NC - difference_NC.mean(axis=1, keepdims=True)).mean(axis=1)
