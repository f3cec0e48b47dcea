"""Compute saved, in words: factors, bounds and what they show."""

from __future__ import annotations

import math
from typing import Any

from vlmoe.study import draw
from vlmoe.study.compare import AT_LEAST, AT_MOST
from vlmoe.study.page import Section

SIGNS = {"": "", AT_LEAST: "≥ ", AT_MOST: "≤ "}
TWIN = {AT_MOST: "not reached", AT_LEAST: "reached by its first run"}  # why a seed gives but a bound
BEST = {AT_LEAST: "not reached by dense", AT_MOST: "reached by dense's first run"}


def times(found: dict[str, Any] | None, why: dict[str, str] = TWIN) -> str:
    """ "2.10 [1.81, 2.52]"; where seeds are censored a bound and in how many, without an interval: "≤ 1.045 (not
    reached in 1 of 3 seeds)"."""
    if not found:
        return "-"
    bounds = [seed["bound"] for seed in found["seeds"].values()]
    reasons = [f"{words} in {bounds.count(b)} of {len(bounds)} seeds" for b, words in why.items() if b in bounds]
    if found["factor"] is None:
        return f"unknown ({', '.join(reasons)})"
    interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if found["low"] is not None else ""
    return _shown(found) + interval + (f" ({reasons[0]})" if reasons else "")


def by_seed(found: dict[str, Any] | None) -> str:
    """ "1.15, 1.01, ≤ 0.986" """
    if not found:
        return "-"
    return ", ".join(_shown(seed) for seed in found["seeds"].values())


def _shown(found: dict[str, Any]) -> str:
    """A bound is rounded away from what it bounds."""
    if not found["bound"]:
        return f"{found['factor']:.2f}"
    away = math.ceil if found["bound"] == AT_MOST else math.floor
    return f"{SIGNS[found['bound']]}{away(1000 * found['factor']) / 1000:.3f}"


def verdict(found: dict[str, Any]) -> str:
    """Whether a factor shows a gain."""
    if found["bound"] == AT_MOST:
        return "The mean is known from above only: no gain is shown."
    if found["bound"] == AT_LEAST:
        return "The mean is known from below only, so there is no interval."
    if found["bound"]:
        return "The mean is not known: no gain is shown."
    if found["low"] is None:
        return "One seed: no interval, so no gain is shown."
    if found["low"] > 1:
        return "A gain: the interval lies above 1."
    return "A loss: the interval lies below 1." if found["high"] < 1 else "The interval includes 1: no gain is shown."


def saved_section(report: dict[str, Any]) -> Section | None:
    if not report["saved"]:
        return None
    head = [
        "sparse model", "dense twin", "FLOPs per token, x dense", "FLOPs", "FLOPs by seed", "wall clock",
        "wall clock by seed", "FLOPs, best dense", "wall clock, best dense", "lengths",
    ]  # fmt: skip
    body = [
        [e["model"], e["twin"], f"{e['flops_ratio']:.3f}" if e["flops_ratio"] else "-",
         times(e["flops"]), by_seed(e["flops"]), times(e["seconds"]), by_seed(e["seconds"]),
         times(e["flops_best"], BEST), times(e["seconds_best"], BEST), str(e["lengths"])]
        for e in report["saved"]
    ]  # fmt: skip
    text = (
        "How many times less the sparse model needs to reach the final loss of the dense model of its width and "
        "depth, by its finished runs of several lengths, log-log between them; geometric mean and Student's 95% "
        "interval over seeds, paired by seed. *Best dense*: how many times more the frontier of all dense models and "
        "lengths needs at the sparse model's final loss, for seeds with runs of every dense model. A seed whose curve "
        "ends before it is down at that loss gives an upper bound (≤), one that is below it from its first run on a "
        "lower one (≥); the mean is then a bound, too, and has no interval. Models of one length are left out."
    )
    return Section("Compute saved at equal loss", text, head, body, draw.SAVED)
