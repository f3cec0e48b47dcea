"""Samples a second of every source on one core, alone and through tokenizer, masking and collation.

python benchmarks/data.py --json benchmarks/results/data.json

Files are made in a temporary folder from the embedded world: 512 pairs as 256 x 256 JPEG with captions, read from the
page cache. The figure is the median of the repeats, the spread their extremes.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from PIL import Image

from provenance import provenance
from vlmoe.config import Recipe, from_mapping
from vlmoe.data.collate import Collator
from vlmoe.data.counter import shuffled, stream
from vlmoe.data.loader import StepData
from vlmoe.data.masking import mask_patches
from vlmoe.data.sample import Source
from vlmoe.data.sources import build_sources
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer

FILES = 512
PIXELS = 256


def recipe_for(source: dict[str, Any], kind: str, codes: int = 256) -> Recipe:
    """The demo's shapes with one source of one kind, in batches of 64."""
    batch = {"image": 0, "text": 0, "pair": 0, kind: 64}
    return from_mapping(
        {
            "model": {"image_size": 48, "patch": 8, "max_text": 48, "vocabulary": 1024, "codes": codes},
            "data": {
                "sources": [{**source, "kind": kind}],
                "world": {"image_size": 48, "concepts": 36, "max_objects": 2},
                "batch": batch,
                "text_tokenizer": {"samples": 4000},
            },
        }
    )


def write_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The same pairs as a folder, as shards and as parquet."""
    world = build_sources(
        recipe_for({"type": "world"}, "pair").data, recipe_for({"type": "world"}, "pair").model, "pair"
    )
    samples = []
    for i in range(FILES):
        sample = world[0][0][i]
        assert sample.image is not None
        buffer = io.BytesIO()
        Image.fromarray(sample.image).resize((PIXELS, PIXELS)).save(buffer, format="JPEG", quality=90)
        samples.append((buffer.getvalue(), sample.text or ""))
    (folder / "folder").mkdir()
    for i, (image, text) in enumerate(samples):
        (folder / "folder" / f"{i:05d}.jpg").write_bytes(image)
        (folder / "folder" / f"{i:05d}.txt").write_text(text)
    for part in range(2):
        with webdataset.TarWriter(str(folder / f"s-{part}.tar")) as writer:
            for i in range(part * FILES // 2, (part + 1) * FILES // 2):
                writer.write({"__key__": f"{i:05d}", "jpg": samples[i][0], "txt": samples[i][1].encode()})
    images = [{"bytes": image, "path": None} for image, _ in samples]
    table = pa.table({"image": images, "text": [text for _, text in samples]})
    pq.write_table(table, folder / "p.parquet", row_group_size=100)
    return {
        "folder": {"type": "folder", "path": str(folder / "folder")},
        "shards": {"type": "shards", "path": str(folder / "s-{0..1}.tar")},
        "parquet": {"type": "parquet", "path": str(folder / "p.parquet")},
    }


def rate(work: Callable[[int], object], samples: int, seconds: float) -> float:
    """Samples a second of `work(i)`, which handles `samples` of them, over about `seconds`."""
    work(0)
    began, i = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        i += 1
        work(i)
    return i * samples / (time.perf_counter() - began)


def raw(source: Source, loaded: StepData) -> Callable[[int], object]:
    """Samples of a source in the order a run takes them, nothing done with them."""
    (_, mixture, _) = next(iter(loaded.parts.values()))
    return lambda i: source[mixture.index(i)[1]]


def cases(folder: Path) -> dict[str, tuple[Callable[[int], object], int]]:
    """name -> (work, samples it handles)."""
    found: dict[str, tuple[Callable[[int], object], int]] = {}
    world = {"type": "world"}
    tokenizer: TextTokenizer = build_text_tokenizer(recipe_for(world, "pair"))
    sources = {("world", kind): (world, kind) for kind in ("image", "text", "pair")}
    sources |= {(name, "pair"): (source, "pair") for name, source in write_files(folder).items()}
    for (name, kind), (source, _) in sources.items():
        recipe = recipe_for(source, kind)
        data = StepData(recipe, tokenizer)
        opened = build_sources(recipe.data, recipe.model, kind, "train", recipe.seed)[0][0]
        found[f"{name} {kind}, raw"] = raw(opened, data), 1
        found[f"{name} {kind}, as batches"] = data.__getitem__, 64
    recipe = recipe_for(world, "pair")
    collator = Collator(recipe.model, recipe.data.masking, tokenizer, "pair")
    pairs = [build_sources(recipe.data, recipe.model, "pair")[0][0][i] for i in range(64)]
    ready = [collator.ready(sample) for sample in pairs]
    found["tokenizing alone"] = lambda i: [collator.ready(sample) for sample in pairs], 64
    found["masking and collating alone"] = lambda i: collator.batch(ready, list(range(64 * i, 64 * i + 64)), 1), 64
    found["patch mask 6 x 6 alone"] = lambda i: mask_patches(6, 0.4, 2, stream(1, i)), 1
    found["patch mask 14 x 14 alone"] = lambda i: mask_patches(14, 0.4, 16, stream(1, i)), 1
    found["epoch order alone (12 million samples)"] = lambda i: shuffled(i, 12_000_000, 1), 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = cases(Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(arguments.repeats):  # in turns, so that a busy moment of the machine does not hit one case alone
            for name, (function, samples) in work.items():
                rates[name].append(rate(function, samples, arguments.seconds))
    results = {
        name: {"samples_per_s": round(statistics.median(r)), "min": round(min(r)), "max": round(max(r))}
        for name, r in rates.items()
    }
    for name, result in results.items():
        print(f"{name:42} {result['samples_per_s']:>9,} ({result['min']:,} to {result['max']:,}) samples/s")
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = {
            "what": "samples a second on one core; median, least and most of the repeats",
            "python": platform.python_version(),
            **provenance(),
            "commit": commit,
            "repeats": arguments.repeats,
            "seconds": arguments.seconds,
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
