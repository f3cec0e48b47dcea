"""NLVR2's consistency, as its official metrics.py computes it."""

from __future__ import annotations

from collections.abc import Sequence

from vlmoe.metrics.scores import Score, mean_score


def sentence_id(identifier: str) -> str:
    """ "dev-850-0-1" -> "dev-850-1": what the examples of one sentence share. The third part numbers its image pairs.

    Raises ValueError for an identifier of another shape.
    """
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"identifier {identifier!r}: expected split-number-pair-sentence, like 'dev-850-0-1'")
    return "-".join([*parts[:2], parts[3]])


def consistency(correct: Sequence[bool], groups: Sequence[str]) -> Score:
    """The share of sentences of which every example is right."""
    right: dict[str, bool] = {}
    for good, group in zip(correct, groups, strict=True):
        right[group] = right.get(group, True) and bool(good)
    return mean_score(list(right.values()))
