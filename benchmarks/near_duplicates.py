"""Which copies of a picture `vlmoe data check` calls nearly the same, and how often it says so of different pictures.

    python benchmarks/near_duplicates.py --json benchmarks/results/near_duplicates.json

Drawings of different things from the icon fonts, 48 pixels: hard edges and plain paper are the hard case for such
hashes. Beside ours, the difference hash of the same 64 bits. Last, the seconds of a comparison of many random hashes.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from provenance import provenance
from vlmoe.data.near import BITS, Look, look_at, near
from vlmoe.data.world.glyphs import icon_mask
from vlmoe.data.world.icons import things

SIDE = 48


def as_jpeg(image: np.ndarray) -> np.ndarray:
    raw = io.BytesIO()
    Image.fromarray(image).save(raw, "JPEG", quality=50)
    return np.asarray(Image.open(raw))


def at_half_size(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIDE // 2, SIDE // 2)).resize((SIDE, SIDE)))


def noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def darker(image: np.ndarray) -> np.ndarray:
    return (image * 0.9).astype(np.uint8)


def cropped(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image[2:-2, 2:-2]).resize((SIDE, SIDE)))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG, quality 50": as_jpeg, "half the size and back": at_half_size, "noise of 4 in 255": noisy,
    "a tenth darker": darker, "2 of 48 pixels cut off each side": cropped,
}  # fmt: skip


def difference_hash(image: np.ndarray) -> Look:
    """Is a pixel lighter than its left neighbour, on a grid of 9 x 8? Its colours are left out."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int64)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return int.from_bytes(bits.tobytes(), "big"), bytes(48)


def measure(look: Callable[[np.ndarray], Look], pictures: list[np.ndarray]) -> dict[str, Any]:
    """Shares of copies that are found, by change, and of pictures that are called near to an earlier, different one."""
    looks = [look(image) for image in pictures]
    found = {}
    for name, change in CHANGES.items():
        copies = near([look(change(image)) for image in pictures], looks)
        found[name] = round(sum(i in copies for i in range(len(pictures))) / len(pictures), 3)
    return {"copies found": found, "different ones called near": round(len(near(looks)) / len(pictures), 4)}


def seconds_of(count: int) -> float:
    hashes = np.random.default_rng(0).integers(0, 1 << 64, count, dtype=np.uint64).tolist()
    looks = [(value, bytes(48)) for value in hashes]
    began = time.process_time()
    near(looks)
    return round(time.process_time() - began, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--hashes", type=int, default=200_000, help="random ones, to be timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    drawings = [thing.drawings[0] for thing in things()[: args.pictures]]
    pictures = [np.repeat(255 - icon_mask(d.font, d.code, SIDE)[..., None], 3, axis=2) for d in drawings]
    began = time.process_time()
    for image in pictures:
        look_at(image)
    milliseconds = 1000 * (time.process_time() - began) / len(pictures)
    results: dict[str, Any] = {
        "pictures": len(pictures), "bits that may differ": BITS,
        "pHash and colours": measure(look_at, pictures), "difference hash": measure(difference_hash, pictures),
        "CPU milliseconds a picture": round(milliseconds, 3),
        "CPU seconds of a comparison": {f"{args.hashes:,} hashes": seconds_of(args.hashes)},
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
