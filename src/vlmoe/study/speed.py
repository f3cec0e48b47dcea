"""How fast a device trains models of a side and a size, by a study's runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from vlmoe.study.collect import Row, finished, groups
from vlmoe.study.declare import StudyError


class Speeds:
    """FLOPs per second of training on a device, by side and size: medians of the study's runs, log-log between their
    sizes, at the ends those of the nearest. given: what dense models are said to do; sparse ones are then as much
    slower as in the study."""

    def __init__(self, rows: Sequence[Row], given: float | None) -> None:
        self.given = given
        self.points: dict[str, list[tuple[float, float]]] = {}
        for (side, size), runs in groups(finished(rows), "side", "params_active").items():
            if rates := [r["flops_per_second"] for r in runs if r["flops_per_second"]]:
                self.points.setdefault(side, []).append((size, statistics.median(rates)))
        if "dense" not in self.points:
            raise StudyError("the study has no finished dense run to take the device's speed from")

    def measured(self, side: str, size: float) -> float:
        sizes, rates = zip(*sorted(self.points[side]), strict=True)
        return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(rates))))

    def of(self, side: str, size: float) -> float:
        """size: parameters per token, embeddings left out."""
        if self.given is None:
            return self.measured(side, size)
        return self.given * self.measured(side, size) / self.measured("dense", size)
