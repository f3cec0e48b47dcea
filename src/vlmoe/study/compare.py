"""What a study's finished runs say: compute saved at equal loss, the frontier, the ablation.

A run's loss in the middle, while its learning rate is still high, is no run of half the length. So every point here is
the end of a finished run, and a curve of loss against compute goes through finished runs of several lengths, straight
from one to the next in the logarithms of both.

Where a curve ends before it is down at the other's loss, or begins below it, the factor of that seed is censored: only
a bound is known. A mean over seeds of which some are censored is a bound as well, and has no interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from vlmoe.study.collect import Row, finished, groups

AT_LEAST, AT_MOST, UNKNOWN = "at least", "at most", "unknown"
COSTS = {"flops": "training FLOPs", "seconds": "wall clock", "memory_bytes": "memory"}
CONFIDENCE = 0.95


@dataclass
class Factor:
    """bound: "" where the curve crosses the loss, and `value` is measured. Otherwise it is censored: "at most" or "at
    least" `value`."""

    value: float
    bound: str = ""


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and Student's 95% interval; low and high are None for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    spread = statistics.stdev(values) / math.sqrt(len(values))
    half = float(student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * spread
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def cost_at(curve: Sequence[tuple[float, float]], loss: float) -> Factor | None:
    """The least cost at which a curve of (cost, loss) is down to `loss`; "at most" where its cheapest run already is;
    None where it never is."""
    points = sorted(curve)
    for i, (cost, value) in enumerate(points):
        if value <= loss:
            if i == 0:
                return Factor(cost, "" if value == loss else AT_MOST)
            before, above = points[i - 1]
            share = math.log(above / loss) / math.log(above / value)
            return Factor(before * (cost / before) ** share)
    return None


def saved(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> Factor:
    """How many times less our curve costs than theirs at the end of theirs, the loss of their longest run. Where ours
    is never down there it costs more than its longest run: "at most". Where its cheapest run already is: "at least"."""
    cost, loss = max(theirs)
    found = cost_at(ours, loss)
    if found is None:
        return Factor(cost / max(ours)[0], AT_MOST)
    return Factor(cost / found.value, AT_LEAST if found.bound else "")


def saved_against_best(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> Factor:
    """How many times more the frontier of all their runs costs than our longest run at its loss. "at least" where
    theirs is never down there, "at most" where their cheapest run already is."""
    cost, loss = max(ours)
    found = cost_at(frontier(theirs), loss)
    if found is None:
        return Factor(max(theirs)[0] / cost, AT_LEAST)
    return Factor(found.value / cost, AT_MOST if found.bound else "")


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, loss): those that no other beats in both."""
    best: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((cost, loss))
    return best


def summarise(factors: dict[int, Factor]) -> dict[str, Any]:
    """Of one factor for each seed: the geometric mean and its interval over seeds.

    censored: how many seeds give only a bound. With any, there is no interval and `factor` is a bound of the mean, in
    the same direction (`bound`); None and "unknown" where seeds are bounded in both directions.
    """
    logs = mean_interval([math.log(f.value) for f in factors.values()])
    bounds = {f.bound for f in factors.values() if f.bound}
    bound = UNKNOWN if len(bounds) > 1 else next(iter(bounds), "")
    no_interval = bool(bound) or logs["low"] is None
    return {
        "factor": None if bound == UNKNOWN else math.exp(logs["mean"]),
        "low": None if no_interval else math.exp(logs["low"]),
        "high": None if no_interval else math.exp(logs["high"]),
        "bound": bound,
        "censored": sum(bool(f.bound) for f in factors.values()),
        "seeds": {str(seed): {"factor": f.value, "bound": f.bound} for seed, f in factors.items()},
    }


def compute_saved(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For every sparse model and each of FLOPs and wall clock: against the dense model of its size at that one's final
    loss, and against the best of all dense models of its world at its own. Paired by seed; against the best, only seeds
    for which every such model has runs. A model of one length has no curve and is left out. flops_ratio: of FLOPs
    per token, over the dense model's."""
    main = finished(rows)
    curves: dict[tuple[str, int], list[Row]] = groups(main, "model", "seed")
    found = []
    per_token = {r["model"]: r["flops_per_token"] for r in main}
    for model, runs in groups([r for r in main if r["side"] == "sparse"], "model").items():
        twin = runs[0]["twin"]
        dense = {r["model"] for r in main if r["side"] == "dense" and world_of(r) == world_of(runs[0])}
        entry: dict[str, Any] = {"model": model, "twin": twin}
        entry["flops_ratio"] = per_token[model] / per_token[twin] if twin in per_token else None
        entry["lengths"] = len({r["steps"] for r in runs})
        if entry["lengths"] < 2:
            continue
        for cost in ("flops", "seconds"):
            twins, best = {}, {}
            for seed in sorted({r["seed"] for r in runs}):
                ours = points_of(curves[model, seed], cost)
                if (twin, seed) in curves:
                    twins[seed] = saved(ours, points_of(curves[twin, seed], cost))
                if all((name, seed) in curves for name in dense):
                    pool = [p for name in dense for p in points_of(curves[name, seed], cost)]
                    best[seed] = saved_against_best(ours, pool)
            entry[cost] = summarise(twins) if twins else None
            entry[f"{cost}_best"] = summarise(best) if best else None
        found.append(entry)
    return found


def world_of(row: Row) -> str:
    """The world's name, "" where the study declares none."""
    return row.get("world") or ""


def points_of(rows: Sequence[Row], cost: str) -> list[tuple[float, float]]:
    return [(r[cost], r["loss"]) for r in rows]


def means(rows: Sequence[Row]) -> list[Row]:
    """One row for each model and length: costs and losses as means over seeds, with least and most of the loss."""
    found = []
    for (model, steps), runs in groups(finished(rows), "model", "steps").items():
        losses = [r["loss"] for r in runs]
        found.append(
            {
                "model": model, "steps": steps, "side": runs[0]["side"], "world": world_of(runs[0]),
                "seeds": len(runs),
                "loss": statistics.fmean(losses), "least": min(losses), "most": max(losses),
                **{c: statistics.fmean([r[c] for r in runs]) for c in COSTS if all(r[c] for r in runs)},
            }
        )  # fmt: skip
    return found


def frontiers(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Cost -> the (model, steps) that no other of their world beats in both cost and loss, world by world, cheapest
    first; over seeds' means."""
    worlds = groups(means(rows), "world")
    return {cost: [point for points in worlds.values() for point in _front(points, cost)] for cost in COSTS}


def _front(points: Sequence[Row], cost: str) -> list[dict[str, Any]]:
    front: list[dict[str, Any]] = []
    known = [p for p in points if cost in p]
    for point in sorted(known, key=lambda p: (p[cost], p["loss"])):
        if not front or point["loss"] < front[-1]["loss"]:
            front.append({k: point[k] for k in ("model", "side", "steps", cost, "loss")})
    return front


def ablation(rows: Sequence[Row], models: dict[str, str], measures: Sequence[str]) -> list[dict[str, Any]]:
    """The paper's rows at the longest runs of equal compute that all of them have: each measure's mean and interval
    over the seeds that all have, and its difference to the dense row, paired by seed."""
    by_row = {
        row: groups([r for r in finished(rows) if r["model"] == model], "steps", "seed")
        for row, model in models.items()
    }
    if not by_row or not all(by_row.values()):
        return []
    for steps in sorted({steps for steps, _ in by_row["dense"]}, reverse=True):
        lengths = {row: _equal(by_row["dense"], runs, steps) for row, runs in by_row.items()}
        seeds = [
            s
            for s in sorted({s for _, s in by_row["dense"]})
            if all((lengths[row], s) in by_row[row] for row in by_row)
        ]
        if seeds:
            break
    else:
        return []
    plain = [by_row["dense"][lengths["dense"], s][0] for s in seeds]
    found = []
    for row, runs in by_row.items():
        ours = [runs[lengths[row], s][0] for s in seeds]
        entry: dict[str, Any] = {
            "row": row,
            "model": models[row],
            "steps": lengths[row],
            "seeds": seeds,
            "measures": {},
        }
        entry |= {k: ours[0][k] for k in ("params_total", "params_per_token", "flops_per_token", "flops")}
        for measure in measures:
            pairs: list[Any] = [(a.get(measure), b.get(measure)) for a, b in zip(ours, plain, strict=True)]
            if all(a is not None and b is not None for a, b in pairs):
                difference = mean_interval([a - b for a, b in pairs]) if row != "dense" else None
                entry["measures"][measure] = mean_interval([a for a, _ in pairs]) | {"difference": difference}
        found.append(entry)
    return found


def _equal(dense: dict[Any, list[Row]], ours: dict[Any, list[Row]], steps: int) -> int | None:
    """Which length of ours is the equal of that one: as many steps, or else about as many FLOPs."""
    if any(s == steps for s, _ in ours):
        return steps
    flops = next(runs[0]["flops"] for (s, _), runs in dense.items() if s == steps)
    near = {s: abs(math.log(runs[0]["flops"] / flops)) for (s, _), runs in ours.items()}
    best = min(near, key=lambda s: near[s])
    return best if near[best] < 0.1 else None
