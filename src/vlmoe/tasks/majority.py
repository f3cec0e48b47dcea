"""The guess that knows nothing but which class is the most frequent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlmoe.data.downstream.example import Example
from vlmoe.metrics import Score, mean_score


def majority(examples: Sequence[Example]) -> Score:
    """Accuracy of giving these examples' most frequent class for all of them."""
    labels = [e.label for e in examples if e.label is not None]
    best = Counter(labels).most_common(1)[0][0] if labels else None
    return mean_score([label == best for label in labels])
