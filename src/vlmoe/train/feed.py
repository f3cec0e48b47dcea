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
from vlmoe.tasks.base import Task
from vlmoe.train.runlog import SKIPPED, RunError


@dataclass
class StepBatches:
    """Of one step. micro_batches: by kind, on the device. predictions: of all of them, see `Task.predictions`.
    tokens: that the backbone processes. waited: seconds until the data were there."""

    micro_batches: list[dict[str, Batch]]
    predictions: Counter[str]
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
    ) -> None:
        self.recipe, self.task, self.dataset, self.device = recipe, task, dataset, device
        self.budget = BadBudget(run_dir / SKIPPED, recipe.data.max_bad_share)
        if skipped:
            self.budget.load_state_dict(skipped)
        self.source: Iterator[Step] = iter(())

    def open(self, start: int, stop: int, lost: Callable[[int, str], None]) -> None:
        """Go on with the micro-batch of number `start`, up to `stop`. lost: is told of each data worker that died, by
        the micro-batch and the cause."""
        self.source = iter(
            make_loader(
                self.dataset, start=start, stop=stop, workers=self.recipe.data.workers, device=self.device, lost=lost
            )
        )

    def first(self) -> dict[str, Batch]:
        """The run's first micro-batch."""
        return self.to_device(self.dataset[0].batches)

    def next(self) -> StepBatches:
        """Of the next step. Raises UserError when too many samples are bad."""
        found = StepBatches([], Counter(), 0, 0.0)
        for _ in range(self.recipe.train.accumulate):
            began = time.perf_counter()
            step = next(self.source)
            found.waited += time.perf_counter() - began
            try:
                self.budget.add(step)
            except OSError as error:
                raise RunError(f"{self.budget.path}: cannot be written: {error}") from None
            found.tokens += self.task.tokens(step.batches)  # counted on the CPU: no waiting for the device
            found.predictions.update(self.task.predictions(step.batches))
            found.micro_batches.append(self.to_device(step.batches))
        return found

    def to_device(self, batches: dict[str, Batch]) -> dict[str, Batch]:
        return {kind: batch.to(self.device) for kind, batch in batches.items()}
