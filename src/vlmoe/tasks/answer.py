"""Put a split's examples to a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.loader import EvalData
from vlmoe.data.loader import make_loader
from vlmoe.metrics import Score
from vlmoe.tasks.downstream import Downstream
from vlmoe.tasks.finite import NotFinite


@dataclass
class Answered:
    """answers and examples in order; skipped: (key, reason) of examples that could not be read."""

    answers: list[Any] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def scores(self, task: Downstream) -> dict[str, Score]:
        return task.score(self.answers, self.examples)

    def scores_by(self, task: Downstream, factor: str) -> dict[str, dict[str, Score]]:
        """Value of a factor -> scores of the examples that have it."""
        values = sorted({e.factors[factor] for e in self.examples if factor in e.factors})
        chosen = {v: [i for i, e in enumerate(self.examples) if e.factors.get(factor) == v] for v in values}
        return {
            value: task.score([self.answers[i] for i in where], [self.examples[i] for i in where])
            for value, where in chosen.items()
        }


def answer_all(
    task: Downstream,
    data: EvalData,
    device: torch.device,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Answered:
    """The task's answers, in evaluation mode. progress: called with the number of examples done.

    Raises NotFinite: an answer is made of numbers that are none. All are counted first.
    """
    was_training = task.training
    task.eval()
    result = Answered()
    try:
        for step in make_loader(data, 0, len(data), workers, device):
            if step.examples:
                result.answers += task.predict({kind: batch.to(device) for kind, batch in step.batches.items()})
            result.examples += step.examples
            result.skipped += step.bad
            if progress is not None:
                progress(len(result.examples) + len(result.skipped))
    finally:
        task.train(was_training)
    broken = sum(not answer.finite for answer in result.answers)
    if broken:
        raise NotFinite(broken, len(result.answers), "answers")
    return result
