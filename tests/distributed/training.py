"""Trainings that the tests run with several processes and with one. `spawn(world, folder)` starts the processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.distributed.processes import start
from tests.train.toy import ToyData, ToyTask, toy_recipe, toy_task
from vlmoe.config import UserError
from vlmoe.tasks.base import Task
from vlmoe.train.judge import Validation
from vlmoe.train.loop import Trainer, TrainResult, train

STEPS, ACCUMULATE = 24, 4
BAD = frozenset({1, 2, 30})  # micro-batches with a sample that is skipped, of several processes


def run(folder: Path, disturb: Any = None, **settings: Any) -> tuple[TrainResult, ToyTask]:
    """A training of 24 steps of four micro-batches in float64, with dropout, clipping, the guard, bad samples and a
    validation."""
    task = toy_task().double()
    recipe = toy_recipe(
        folder, **{"steps": STEPS, "accumulate": ACCUMULATE, "log_every": 1, "clip": 0.5, "checkpoint_every": 10}
        | settings
    )  # fmt: skip
    judge = Validation(_score, every=10, patience=3)
    return train(recipe, task, ToyData(bad=BAD), folder, judge, disturb), task


def _score(task: Task) -> float:
    """Of the weights alone, so that it needs no data; it rises to the end."""
    assert isinstance(task, ToyTask)
    return float(task.hidden.weight.detach().square().sum())


def killed_once(trainer: Trainer, micro_step: int) -> None:
    """A signal to the last process alone, in the middle of step 8."""
    last = trainer.ranks.world - 1
    if trainer.ranks.rank == last and micro_step == 7 * ACCUMULATE + last:
        os.kill(os.getpid(), signal.SIGTERM)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def spawn(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    return start(_found, world, folder)


def _found(rank: int, world: int, folder: Path) -> dict[str, Any]:
    result, task = run(folder / "whole")
    found: dict[str, Any] = {"whole": (vars(result), dict(task.state_dict()))}
    if world == 2:
        stopped, _ = run(folder / "stopped", killed_once)
        _, task = run(folder / "stopped")
        found |= {"stopped": (stopped.stopped_by, stopped.steps), "resumed": dict(task.state_dict())}
    try:
        run(folder / "refused", accumulate=world + 1)
    except UserError as error:
        found["refused"] = str(error)
    return found
