"""Where sparsity pays: compute saved over how long models are trained and over how much there is to know.

A point is a length of the dense model: how many times less the sparse model of its size and world needs for the loss
that the dense one has then. Its curve goes through all its lengths, those that are longer included.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from vlmoe.study.collect import BITS_PER_PARAMETER, Row, finished, groups
from vlmoe.study.compare import Factor, points_of, saved, summarise, world_of
from vlmoe.study.page import Section
from vlmoe.study.saved import by_seed, times

PUBLISHED = 3.1  # times fewer FLOPs at equal quality: Shen et al. 2023, VL-MoE, figure 1
LEVELS = (1.0, PUBLISHED)
Point = dict[str, Any]


def saving_map(rows: Sequence[Row]) -> list[Point]:
    """A point for each sparse model of several lengths and each length of its dense twin, shortest first. flops,
    seconds: factors as of `compare.summarise`, paired by seed; loss: of the dense runs, mean over seeds."""
    main = finished(rows)
    runs_of: dict[tuple[str, int], list[Row]] = groups(main, "model", "seed")
    lengths: dict[tuple[str, int], list[Row]] = groups(main, "model", "steps")
    found = []
    for model, runs in groups([r for r in main if r["side"] == "sparse"], "model").items():
        if len({r["steps"] for r in runs}) < 2:
            continue
        for (twin, _), dense in sorted(lengths.items(), key=lambda item: item[0][1]):
            if twin != runs[0]["twin"]:
                continue
            point: Point = {"model": model, "kind": runs[0].get("kind") or model, **_about(dense)}
            for cost in ("flops", "seconds"):
                factors: dict[int, Factor] = {}
                for row in sorted(dense, key=lambda r: r["seed"]):
                    if ours := runs_of.get((model, row["seed"])):
                        factors[row["seed"]] = saved(points_of(ours, cost), points_of([row], cost))
                point[cost] = summarise(factors) if factors else None
            if point["flops"]:
                found.append(point)
    return found


def _about(dense: Sequence[Row]) -> Point:
    first = dense[0]
    needed, held = first.get("bits_needed"), BITS_PER_PARAMETER * first["params_active"]
    return {
        "twin": first["model"], "world": world_of(first), "concepts": first.get("concepts"), "steps": first["steps"],
        "tokens_per_parameter": first["tokens"] / first["params_active"],
        "bits_needed": needed, "bits_held": held, "bits_ratio": needed / held if needed else None,
        "loss": statistics.fmean(r["loss"] for r in dense),
    }  # fmt: skip


def curve_of(points: Sequence[Point], x: str, cost: str = "flops") -> list[tuple[float, float]]:
    """Of the points whose factor is measured: (x, factor), by x."""
    known = [p for p in points if p[cost] and not p[cost]["bound"] and p[x] is not None]
    return sorted((p[x], p[cost]["factor"]) for p in known)


def crossing(curve: Sequence[tuple[float, float]], level: float) -> tuple[float, bool] | None:
    """Where a curve first rises to a level, straight between its points in the logarithms of both, and whether it is
    there from its first point on; None where it never is."""
    for i, (x, y) in enumerate(curve):
        if y >= level:
            if i == 0:
                return x, True
            before, below = curve[i - 1]
            return before * (x / before) ** (math.log(level / below) / math.log(y / below)), False
    return None


def crossings(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Of each sparse model: the tokens per parameter from which on it saves FLOPs, and at which it saves the published
    factor."""
    found = []
    for model, mine in groups(points, "model").items():
        curve = curve_of(mine, "tokens_per_parameter")
        for level in LEVELS:
            at = crossing(curve, level)
            found.append({
                "model": model, "kind": mine[0]["kind"], "world": mine[0]["world"], "concepts": mine[0]["concepts"],
                "level": level, "tokens_per_parameter": at[0] if at else None, "from_the_first": bool(at and at[1]),
            })  # fmt: skip
    return found


def per_parameter(tokens: float) -> str:
    """0.4, 1,340"""
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.2g}"


def picture_of(kind: str) -> str:
    return f"map-{kind}.png"


TEXT = (
    "How many times fewer FLOPs (and seconds) the sparse model needs for the loss that the dense one has after so many "
    "tokens of training for each of its parameters (per token, embeddings not counted); a line for each number of "
    "things there are to know. Geometric mean and Student's 95% interval over seeds, and a dot for each seed; hollow "
    "with an arrow: a bound, because some seed's curve ends before that loss or begins below it. *Bits needed over "
    "held*: what it takes to tell each thing from all others, over what the dense model can hold, about 2 bits for "
    "each of the same parameters "
    "(Allen-Zhu and Li 2024, arXiv 2404.05405). Both sides are charged all they compute, routers and dispatch "
    "included."
)


def map_sections(points: Sequence[Point]) -> list[Section]:
    """One for each kind of sparse model."""
    sections = []
    for kind, mine in groups(points, "kind").items():
        head = ["world", "concepts", "tokens per parameter", "steps", "bits needed / held", "loss of dense", "FLOPs",
                "FLOPs by seed", "wall clock"]  # fmt: skip
        body = [
            [p["world"] or "-", f"{p['concepts']:,}" if p["concepts"] else "-",
             per_parameter(p["tokens_per_parameter"]), f"{p['steps']:,}",
             f"{p['bits_ratio']:.2g}" if p["bits_ratio"] else "-", f"{p['loss']:.3f}",
             times(p["flops"]), by_seed(p["flops"]), times(p["seconds"])]
            for p in mine
        ]  # fmt: skip
        text = "\n\n".join([TEXT, " ".join(told(c) for c in crossings(mine))])
        sections.append(Section(f"Where sparsity pays: {kind}", text, head, body, picture_of(kind)))
    return sections


def told(found: dict[str, Any]) -> str:
    """One crossing as a sentence."""
    where = f" with {found['concepts']:,} concepts" if found["concepts"] else ""
    if not where and found["world"]:
        where = f" in {found['world']}"
    what = "passes the dense model" if found["level"] == 1 else f"passes {found['level']:g} times"
    at = found["tokens_per_parameter"]
    if at is None:
        return f"{found['kind']}{where} never {what}."
    since = "from its first length on, " if found["from_the_first"] else "at "
    return f"{found['kind']}{where} {what} {since}{per_parameter(at)} tokens per parameter."
