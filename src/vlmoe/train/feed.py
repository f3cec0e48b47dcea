"""The training loop's data: the micro-batches of each step on the device, with bad samples and waiting counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from vlmoe.config import FinetuneRecipe, Recipe
from vlmoe.data.batch import Batch
from vlmoe.data.loader import BadBudget, Step, make_loader
from vlmoe.data.skipped import bad_of, drawn_of
from vlmoe.distributed import Ranks
from vlmoe.tasks.base import Task
from vlmoe.train.runlog import SKIPPED, RunError

DRAWN, BAD, TOKENS = "samples drawn", "samples skipped", "tokens"  # counted beside a task's predictions


@dataclass
class StepBatches:
    """Of one step. micro_batches: this process's, by kind, on the device. predictions: of the whole step, see
    `Task.predictions`. tokens: that the backbone processes in the step. waited: seconds until the data were there."""

    micro_batches: list[dict[str, Batch]]
    predictions: dict[str, int]
    tokens: int
    waited: float


class Feed:
    """One for a launch. skipped: as a checkpoint kept it, see `state_dict`."""

    def __init__(
        self,
        recipe: Recipe | FinetuneRecipe,
        task: Task,
        dataset: Dataset[Step],
        run_dir: Path,
        device: torch.device,
        skipped: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.recipe, self.task, self.dataset, self.device = recipe, task, dataset, device
        self.budget = BadBudget(run_dir / SKIPPED, recipe.data.max_bad_share)
        if skipped:
            self.budget.load_state_dict(skipped)
        self.source: Iterator[Step] = iter(())
        self.number = ranks.rank  # of the next micro-batch that it gives

    def open(self, start: int, stop: int, lost: Callable[[int, str], None]) -> None:
        """Go on with this process's micro-batches from number `start` on, up to `stop`. lost: is told of each data
        worker that died, by the micro-batch and the cause."""
        self.number = start + self.ranks.rank
        self.source = iter(
            make_loader(
                self.dataset, start=self.number, stop=stop, workers=self.recipe.data.workers, device=self.device,
                lost=lost, every=self.ranks.world,
            )
        )  # fmt: skip

    def first(self) -> dict[str, Batch]:
        """The run's first micro-batch."""
        return self.to_device(self.dataset[0].batches)

    def next(self) -> StepBatches:
        """Of the next step. Raises UserError when too many samples are bad."""
        micro_batches, counted, waited = [], Counter[str](), 0.0
        for _ in self.ranks.mine(self.recipe.train.accumulate):
            began = time.perf_counter()
            step = next(self.source)
            waited += time.perf_counter() - began
            try:
                self.budget.write(step, self.number)
            except OSError as error:
                raise RunError(f"{self.budget.path}: cannot be written: {error}") from None
            self.number += self.ranks.world
            # counted on the CPU: no waiting for the device
            counted.update({DRAWN: drawn_of(step), BAD: bad_of(step), TOKENS: self.task.tokens(step.batches)})
            counted.update(self.task.predictions(step.batches))
            micro_batches.append(self.to_device(step.batches))
        total = self.ranks.count(counted)
        self.budget.count(total.pop(DRAWN), total.pop(BAD), self.recipe.train.accumulate)
        return StepBatches(micro_batches, total, total.pop(TOKENS), waited)

    def to_device(self, batches: dict[str, Batch]) -> dict[str, Batch]:
        return {kind: batch.to(self.device) for kind, batch in batches.items()}
