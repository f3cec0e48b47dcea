"""A score and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
_CHUNK = 1 << 24  # indices drawn at a time


@dataclass(frozen=True)
class Score:
    """value: over n examples; nan when n is 0. interval: 95% percentile bootstrap, None where there is none."""

    value: float
    interval: tuple[float, float] | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_score(values: Sequence[float] | Sequence[bool], groups: Sequence[str] | None = None) -> Score:
    """Mean of one value an example. groups: examples of one group are resampled together, as they are not
    independent."""
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return Score(float("nan"), None, 0)
    total: np.ndarray = x
    count = np.ones_like(x)
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        total, count = np.bincount(group, weights=x), np.bincount(group).astype(np.float64)
    low, high = bootstrap(lambda pick: total[pick].sum(-1) / count[pick].sum(-1), len(total))
    return Score(float(x.mean()), (low, high), len(x))


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% interval of a statistic of n examples. statistic: indices (r, n) -> r values. The resampling seed is fixed,
    so that the same scores have the same interval."""
    rng = np.random.default_rng(0)
    at_once = max(1, _CHUNK // n)
    found = [
        statistic(rng.integers(n, size=(min(at_once, resamples - start), n))) for start in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)
