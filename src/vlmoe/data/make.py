"""Write a recipe's samples as WebDataset shards, so that they can be looked at, shared and read by other programs."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from rich.progress import track

from vlmoe.config import Recipe, UserError
from vlmoe.data.files import write_truth
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import Sample
from vlmoe.data.sources import build_sources


def make_shards(
    recipe: Recipe,
    out: str | Path,
    kind: str = "pair",
    split: str = "train",
    samples: int = 10_000,
    per_shard: int = 1_000,
    progress: bool = False,
) -> list[Path]:
    """Write samples of a recipe's sources, in the order a run would draw them, to out/SPLIT-KIND-00000.tar ...

    Each sample has a .png, a .txt with its caption, and a .json with key, caption and, where the source knows them,
    the factors of each patch and of ranges of the caption. Bad samples are replaced, as in a run. Each shard appears
    under its name when it is complete.

    Returns the shards' paths. Raises UserError when `out` holds shards of this name already, or a number is not
    positive.
    """
    if samples < 1 or per_shard < 1:
        raise UserError(f"samples = {samples} and per_shard = {per_shard}: expected positive numbers")
    out = Path(out)
    existing = sorted(out.glob(f"{split}-{kind}-*.tar"))
    if existing:
        raise UserError(f"{existing[0]} exists already: nothing was written; choose another folder or remove it")
    sources = build_sources(recipe.data, recipe.model, kind, split, recipe.seed, factors=True)
    mixture = Mixture(sources, recipe.seed, split == "train", max(1, getattr(recipe.data.batch, kind)))
    if samples > len(mixture):
        raise UserError(f"{samples} samples asked for; the {split} split has {len(mixture)} of kind {kind}")
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    starts = range(0, samples, per_shard)
    for number, start in enumerate(track(starts, "Writing shards") if progress else starts):
        path = out / f"{split}-{kind}-{number:05d}.tar"
        temporary = path.with_suffix(".tar.tmp")
        with webdataset.TarWriter(str(temporary), mtime=0, user="", group="") as writer:
            for position in range(start, min(start + per_shard, samples)):
                sample = mixture.draw(position, lambda s: s, [])
                writer.write(_members(sample, f"{position:09d}"))
        os.replace(temporary, path)
        paths.append(path)
    return paths


def _members(sample: Sample, key: str) -> dict[str, Any]:
    """A sample as webdataset's writer wants it: suffix -> bytes."""
    members: dict[str, Any] = {"__key__": key}
    about: dict[str, Any] = {"key": sample.key, **write_truth(sample)}
    if sample.image is not None:
        buffer = io.BytesIO()
        Image.fromarray(sample.image).save(buffer, format="PNG")
        members["png"] = buffer.getvalue()
    if sample.text is not None:
        members["txt"] = sample.text.encode()
        about["text"] = sample.text
    if sample.codes is not None:
        buffer = io.BytesIO()
        np.save(buffer, sample.codes, allow_pickle=False)
        members["codes.npy"] = buffer.getvalue()
    members["json"] = json.dumps(about, ensure_ascii=False).encode()
    return members
