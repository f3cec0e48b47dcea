"""The samples that a report shows: picture, words, and which experts every part of them went to.

Shape suffixes: R rows (all tokens of a batch) · T recorded tokens · H, W pixels.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmoe.interpret.recording import Recording, Routed
from vlmoe.interpret.sites import Subject, TokenTable

LARGEST = 224  # pixels of a picture's longer side in the report


@dataclass
class Sample:
    """One sequence. rows: of its valid tokens in `table`; image: uint8 (H, W, 3) and grid: rows and columns of its
    patches, None where there are none."""

    key: str
    table: TokenTable
    rows: np.ndarray
    image: np.ndarray | None
    grid: tuple[int, int] | None


def choose(subject: Subject, batches: Sequence[Any], count: int) -> list[Sample]:
    """The first samples of each kind of batch, as evenly as they come, `count` in all."""
    by_kind: dict[str, list[Sample]] = {}
    for batch in batches:
        table = subject.tokens(batch)
        have = by_kind.setdefault(table.kind, [])
        if len(have) >= count:
            continue
        images, grids = pictures(subject, batch, len(table.samples))
        for s in range(min(len(table.samples), count - len(have))):
            rows = np.flatnonzero((table.sample_R == s) & table.valid_R)
            patches = int(((table.modality_R[rows] == "vision") & (table.position_R[rows] >= 0)).sum())
            have.append(Sample(table.samples[s], table, rows, images[s], grids[s] or square(patches)))
    rounds = [kind[n] for n in range(count) for kind in by_kind.values() if n < len(kind)]
    return sorted(rounds[:count], key=lambda s: list(by_kind).index(s.table.kind))


def pictures(subject: Subject, batch: Any, count: int) -> tuple[list[np.ndarray | None], list[tuple[int, int] | None]]:
    """The image of each sample, and the grid of its patches where it is not square. A subject tells by
    `subject.pictures(batch)`, or a batch by `images` and `grids`; one that tells nothing has no pictures."""
    none: list[Any] = [None] * count
    if hasattr(subject, "pictures"):
        images = subject.pictures(batch)
        return [*images, *none][:count], none
    return getattr(batch, "images", None) or none, getattr(batch, "grids", None) or none


def square(patches: int) -> tuple[int, int] | None:
    side = math.isqrt(patches)
    return (side, side) if side and side * side == patches else None


def describe(sample: Sample, recording: Recording, routed: dict[str, Routed], place: dict[str, np.ndarray]) -> Any:
    """The sample as the report wants it. place: for each site the place of each recorded token at it, -1 for none."""
    mine_T = np.flatnonzero(recording.column("sample").where(sample.key))
    modality, position_T = recording.column("modality"), recording.position_T
    routes: dict[str, dict[str, Any]] = {}
    gates: dict[str, dict[str, Any]] = {}
    for name, decisions in routed.items():
        for side in ("vision", "text"):
            rows = mine_T[modality.where(side)[mine_T] & (position_T[mine_T] >= 0)]
            at = place[name][rows]
            if not len(rows) or (at < 0).all():
                continue
            size = int(position_T[rows].max()) + 1
            route: list[list[int]] = [[] for _ in range(size)]
            gate: list[float | None] = [None] * size
            for p, n in zip(position_T[rows].tolist(), at.tolist(), strict=True):
                if n >= 0:
                    route[p] = [e for e in decisions.expert_NK[n].tolist() if e >= 0]
                    gate[p] = round(float(decisions.gate_NK[n, 0]), 4) if route[p] else None
            routes.setdefault(name, {})[side] = route
            gates.setdefault(name, {})[side] = gate
    table, rows = sample.table, sample.rows
    text = rows[table.modality_R[rows] == "text"]
    text = text[np.argsort(table.position_R[text], kind="stable")]
    patches = rows[(table.modality_R[rows] == "vision") & (table.position_R[rows] >= 0)]
    hidden_R = table.factors.get("hidden")
    return {
        "key": sample.key,
        "kind": table.kind,
        "image": None if sample.image is None else data_uri(sample.image),
        "grid": None if sample.grid is None or not len(patches) else list(sample.grid),
        "tokens": [str(t) for t in table.text_R[text]] if len(text) else None,
        "hidden": _hidden(hidden_R, text, table),
        "hidden_patches": _hidden(hidden_R, patches, table),
        "routes": routes,
        "gates": gates,
    }


def _hidden(hidden_R: np.ndarray | None, rows: np.ndarray, table: TokenTable) -> list[int]:
    return [] if hidden_R is None else table.position_R[rows[hidden_R[rows] == "hidden"]].tolist()


def data_uri(image_HWC: np.ndarray) -> str:
    """A PNG inside an address, shrunk where it is large."""
    picture = Image.fromarray(image_HWC)
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
