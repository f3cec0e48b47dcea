"""Losses on held-out batches with their intervals, and whether these are narrow enough to mean anything."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from vlmoe.data.batch import Batch
from vlmoe.metrics import Score, bootstrap
from vlmoe.tasks.finite import NotFinite
from vlmoe.tasks.pretrain import MaskedDataModelling

FEW = 30  # samples: of fewer a bootstrap interval is itself too narrow
WIDE = 0.1  # an interval's width over its value


@torch.no_grad()
def held_out_losses(task: MaskedDataModelling, batches: Iterable[tuple[str, Batch]]) -> dict[str, Score]:
    """Mean cross-entropy in nats of hidden words ("pair/mlm") and hidden patches' codes ("pair/mim"), of each kind of
    batch, with intervals over samples. batches: (kind, batch on the model's device).

    Raises NotFinite: a loss is nan or infinite.
    """
    sums: dict[str, list[np.ndarray]] = {}
    counts: dict[str, list[np.ndarray]] = {}
    for kind, batch in batches:
        for objective, (total_B, count_B) in task.losses_by_sample(batch).items():
            name = f"{kind}/{objective}"
            sums.setdefault(name, []).append(total_B.double().cpu().numpy())
            counts.setdefault(name, []).append(count_B.cpu().numpy())
    found = {name: _mean(np.concatenate(sums[name]), np.concatenate(counts[name])) for name in sums}
    return {name: score for name, score in found.items() if score.n}


def _mean(total: np.ndarray, count: np.ndarray) -> Score:
    asked = count > 0
    total, count = total[asked], count[asked]
    if not np.isfinite(total).all():
        raise NotFinite(int((~np.isfinite(total)).sum()), len(total), "held-out losses")
    if not len(total):
        return Score(float("nan"), None, 0)
    low, high = bootstrap(lambda pick: total[pick].sum(-1) / count[pick].sum(-1), len(total))
    return Score(float(total.sum() / count.sum()), (low, high), len(total))


def too_wide(score: Score) -> bool:
    """Whether a loss's interval is too wide, or of too few samples, to tell much by."""
    if score.interval is None or score.n < FEW:
        return True
    return score.interval[1] - score.interval[0] > WIDE * abs(score.value)
