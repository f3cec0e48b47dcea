"""Whether another JPEG decoder than Pillow's would make our images faster: processor time, and pixels compared.

pip install --target DIR simplejpeg; PYTHONPATH=DIR python benchmarks/jpeg_decoders.py --json FILE

Photographs that come with scikit-learn and matplotlib, cut to squares of 256 and 512 pixels, JPEG of quality 90, to
the model's 48 and 224 pixels. `pillow` is `decode_image`. `simplejpeg` reads the header with Pillow, as orientation,
profile and limits need it, and takes the pixels from simplejpeg at the same scale. `resize` is the part of `pillow`
after decoding. `torch_resize` does that with torch's antialiased bicubic instead, whose pixels differ. All take turns;
the figure is the median of the rounds, with the least beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg  # type: ignore[import-not-found, unused-ignore]
import torch
from PIL import Image

from provenance import provenance
from vlmoe.data.images import decode_image

SEED, IMAGES, ROUNDS = 0, 24, 15
PHOTOS = (("sklearn", "datasets/images/china.jpg"), ("sklearn", "datasets/images/flower.jpg"),
          ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"))  # fmt: skip


def photographs(side: int) -> list[bytes]:
    rng, found = np.random.default_rng(SEED), []
    for i in range(IMAGES):
        package, name = PHOTOS[i % len(PHOTOS)]
        with Image.open(io.BytesIO((files(package) / name).read_bytes())) as image:
            part = int(min(image.size) * rng.uniform(0.6, 1))
            x, y = (int(rng.random() * (length - part + 1)) for length in image.size)
            square = image.convert("RGB").crop((x, y, x + part, y + part)).resize((side, side))
        buffer = io.BytesIO()
        square.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def shrink(side: int, size: int) -> int:
    return next((s for s in (8, 4, 2) if s * 2 * size <= side), 1)


def resized(image: Image.Image, size: int) -> np.ndarray:
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=(0, 0, *image.size)))


def by_simplejpeg(raw: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(raw), formats=("JPEG",)) as image:
        image.getexif()
        least = -(-image.width // shrink(image.width, size))
    pixels = simplejpeg.decode_jpeg(raw, "RGB", min_height=least, min_width=least)
    return resized(Image.fromarray(pixels), size)


def resized_by_torch(image: Image.Image, size: int) -> np.ndarray:
    x_1CHW = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    y_1CHW = torch.nn.functional.interpolate(x_1CHW, (size, size), mode="bicubic", antialias=True)
    return y_1CHW[0].permute(1, 2, 0).contiguous().numpy()


def measure(side: int, size: int) -> dict[str, Any]:
    raws = photographs(side)
    decoded = []
    for raw in raws:
        image = Image.open(io.BytesIO(raw))
        image.draft(None, (side // shrink(side, size),) * 2)
        decoded.append(image.convert("RGB"))
    ways: dict[str, Callable[[int], np.ndarray]] = {
        "pillow": lambda i: decode_image(raws[i], "", size, 10**9),
        "simplejpeg": lambda i: by_simplejpeg(raws[i], size),
        "resize": lambda i: resized(decoded[i], size),
        "torch_resize": lambda i: resized_by_torch(decoded[i], size),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            for i in range(IMAGES):
                way(i)
            took[name].append((time.process_time() - began) / IMAGES * 1e6)
    apart = {
        name: max(int(np.abs(way(i).astype(int) - ways["pillow"](i)).max()) for i in range(IMAGES))
        for name, way in ways.items()
    }
    return {
        "jpeg_side": side,
        "size": size,
        "microseconds": {n: {"median": round(statistics.median(t)), "least": round(min(t))} for n, t in took.items()},
        "largest_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("pillow", "simplejpeg")}
    rows = [measure(side, size) for side in (256, 512) for size in (48, 224)]
    result = provenance() | versions | {"seed": SEED, "images": IMAGES, "rounds": ROUNDS, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
