"""Judging a run while it trains, and keeping its best weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vlmoe.distributed import Ranks
from vlmoe.metrics import Score
from vlmoe.tasks.base import Task
from vlmoe.train import checkpoint


@dataclass(frozen=True)
class Judged:
    """score: higher is better. parts: what it is made of, by name. words: the same for people. warning: why it may say
    little; shown once in a launch."""

    score: float
    parts: dict[str, Score] = field(default_factory=dict)
    words: str = ""
    warning: str = ""


@dataclass
class Validation:
    """When and how a run is judged while it trains, and what came of it.

    score: of the task in evaluation mode, higher is better; it draws no random numbers of torch's default generator.
    keep_best: keep the weights of the best score, and end with them; else the run is only looked at. every: steps
    between two. patience: validations without a better one after which training ends; 0: never.
    best, best_step, misses: the best score, its step, validations since. Weights of the best are kept in the run's
    folder `best`.
    """

    score: Callable[[Task], float | Judged]
    every: int
    patience: int = 0
    keep_best: bool = True
    best: float = -math.inf
    best_step: int = 0
    misses: int = 0

    def record(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step, "misses": self.misses} if self.best_step else {}

    @property
    def exhausted(self) -> bool:
        return bool(self.patience) and self.misses >= self.patience

    def due(self, step: int, last: int) -> bool:
        """Whether a run of `last` steps is judged after this one."""
        return step % self.every == 0 or step == last

    def judge(self, task: Task, step: int, folder: Path, ranks: Ranks) -> Judged:
        """Score the task, and keep its weights in the folder when it was never better. It is in training mode then. The
        first process does both; the others take its word."""
        judged = ranks.told(self._judged(task) if ranks.first else None)
        assert judged is not None
        self.misses += 1
        if judged.score > self.best:
            self.best, self.best_step, self.misses = judged.score, step, 0
            if self.keep_best and ranks.first:
                checkpoint.save_weights(folder, task)
        return judged

    def _judged(self, task: Task) -> Judged:
        task.eval()
        found = self.score(task)
        task.train()
        return found if isinstance(found, Judged) else Judged(found)

    def take_best(self, task: Task, folder: Path) -> None:
        """Give the task the weights of the best score, if any were kept."""
        if self.keep_best and self.best_step:
            checkpoint.load_weights(folder, task)
