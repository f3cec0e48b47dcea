"""What a launch tells: people by its display, the run's folder by its logs. It keeps the launch's clocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmoe.config import FinetuneRecipe, Recipe
from vlmoe.train.checkpoint import State
from vlmoe.train.judge import Judged, Validation
from vlmoe.train.progress import Clock, Display
from vlmoe.train.runlog import RunLog, machine


class Journal:
    """One for a launch. `open` it before anything is logged."""

    log: RunLog

    def __init__(self, recipe: Recipe | FinetuneRecipe, run_dir: Path, device: torch.device, display: Display) -> None:
        self.recipe, self.run_dir, self.device, self.display = recipe, run_dir, device, display
        self.say, self.warn = display.say, display.warn
        self.warned = False  # of a validation that says little
        self.start_clocks()

    def open(self, state: State, dtype: torch.dtype) -> None:
        """Open the logs at the step of a checkpoint, or afresh, and say what begins where."""
        step, steps = state.step, self.recipe.train.steps
        self.log = RunLog(self.run_dir, self.recipe, step, state.logs)
        self.log.launch(step, self.device)
        now = machine(self.device)
        where = f"on {now['device_name']}, {str(dtype).removeprefix('torch.')}"
        if not step:
            self.say(f"{self.run_dir}: {steps} steps {where}")
            return
        self.say(f"{self.run_dir}: going on from step {step} of {steps} {where}")
        if changed := {k: (state.machine.get(k), v) for k, v in now.items() if state.machine.get(k) != v}:
            listed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items())
            self.say(f"  not the machine of the checkpoint ({listed}): results agree up to rounding only")

    # -------------------------------------------------------------------------------------------------------- clocks
    def start_clocks(self) -> None:
        self.launched, self.lap = Clock(), Clock()  # since the launch, since the last logged step

    def fed(self, tokens: int, waited: float) -> None:
        """Count what a step is fed, and the seconds it waited for it."""
        for clock in (self.launched, self.lap):
            clock.tokens += tokens
            clock.waited += waited

    @property
    def seconds(self) -> float:
        """Of training in this launch."""
        return self.launched.rates()[0]

    # -------------------------------------------------------------------------------------------------------- records
    def event(self, kind: str, **details: Any) -> None:
        """For the log alone."""
        self.log.event(kind, **details)

    def act(self, kind: str, *, step: int, cause: str, **details: Any) -> None:
        """Something done for a cause: for the log and for people, who are spared the losses."""
        self.log.event(kind, step=step, cause=cause, **details)
        words = ", ".join(f"{k} {v}" for k, v in details.items() if k not in ("loss", "grad_norm"))
        self.warn(f"step {step}: {kind}{' (' + words + ')' if words else ''}: {cause}")

    def metrics(self, step: int, seconds_before: float, values: dict[str, float]) -> None:
        """One line of metrics; throughput and waiting are those since the line before. seconds_before: of training in
        earlier launches."""
        _, speed, wait_share = self.lap.rates()
        self.lap = Clock()
        timing = {"tokens_per_second": speed, "seconds": seconds_before + self.seconds, "wait_share": wait_share}
        if self.device.type == "cuda":
            timing["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.log.metrics(step, values | timing)
        self.display.update(step, values["loss"], *self.launched.rates()[1:])

    def routing(
        self, step: int, load: dict[str, Tensor], watched: dict[str, dict[str, float]], warnings: list[str]
    ) -> None:
        """One line of the experts' load, and what is off in it."""
        self.log.routing(step, load, watched)
        for warning in warnings:
            self.warn(f"step {step}: {warning}")
            self.event("warning", step=step, text=warning)

    def validation(self, step: int, judged: Judged, so_far: Validation, seconds: float) -> None:
        """What a validation found, that took so long; throughput is that of training alone."""
        best = {"best": so_far.best, "best_step": so_far.best_step}
        self.log.validation(step, judged.parts, score=judged.score, **best, seconds=seconds)
        words = judged.words or f"validation {judged.score:.4f}"
        self.say(f"step {step}: {words}" + ("" if so_far.misses else ", the best so far"))
        if judged.warning and not self.warned:
            self.warned = True
            self.event("warning", step=step, text=judged.warning)
            self.warn(judged.warning)
        if so_far.exhausted:
            self.say(f"no better for {so_far.misses} validations: training ends, step {so_far.best_step} is kept")
        for clock in (self.launched, self.lap):
            clock.began += seconds

    def close(self) -> None:
        self.log.close()

    def sizes(self) -> dict[str, int]:
        """Of the logs in bytes, for the checkpoint."""
        return self.log.sizes()

    def rewind(self, sizes: dict[str, int]) -> None:
        """Go back to a checkpoint with the logs, too."""
        self.log.rewind(sizes)

    def plot(self) -> None:
        from vlmoe.train import plots  # matplotlib is slow to import

        try:
            drawn = [plots.plot_curves(self.run_dir), plots.plot_routing(self.run_dir)]
        except OSError as error:  # the weights are safe: no reason to fail
            self.say(f"{self.run_dir}: no plots, the disk refused them: {error}")
            return
        if any(drawn):
            self.say("plots: " + ", ".join(str(path) for path in drawn if path))


class SilentJournal(Journal):
    """Of a process that is not the run's first: it keeps clocks and nothing else."""

    def open(self, state: State, dtype: torch.dtype) -> None:
        return

    def event(self, kind: str, **details: Any) -> None:
        return

    def act(self, kind: str, *, step: int, cause: str, **details: Any) -> None:
        return

    def metrics(self, step: int, seconds_before: float, values: dict[str, float]) -> None:
        self.lap = Clock()

    def routing(
        self, step: int, load: dict[str, Tensor], watched: dict[str, dict[str, float]], warnings: list[str]
    ) -> None:
        return

    def validation(self, step: int, judged: Judged, so_far: Validation, seconds: float) -> None:
        for clock in (self.launched, self.lap):
            clock.began += seconds

    def close(self) -> None:
        return

    def sizes(self) -> dict[str, int]:
        return {}

    def rewind(self, sizes: dict[str, int]) -> None:
        return

    def plot(self) -> None:
        return
