"""The training loop, one for every task.

It knows a task by `vlmoe.tasks.base` (a loss with a gradient, and what to log) and data by `vlmoe.data.loader` (item n
is a pure function of seed and n). Everything random in a micro-step is drawn from a generator seeded by (seed, n), so a
run that goes on from a checkpoint continues bit for bit as if it had never stopped, on the same machine.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from vlmoe.config import FinetuneRecipe, Recipe, TrainConfig, UserError, to_mapping
from vlmoe.data.batch import Batch
from vlmoe.data.loader import Step
from vlmoe.distributed import Ranks
from vlmoe.model.device import pick_device, pick_precision
from vlmoe.moe import SoftMoELayer
from vlmoe.tasks.base import Task
from vlmoe.train import checkpoint
from vlmoe.train.allocator import keep_freed_memory
from vlmoe.train.feed import Feed
from vlmoe.train.gradients import StepRecord, accumulate, seed_of
from vlmoe.train.guard import Guard
from vlmoe.train.journal import Journal, SilentJournal
from vlmoe.train.judge import Validation
from vlmoe.train.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from vlmoe.train.progress import Display
from vlmoe.train.runlog import BEST, CHECKPOINTS, EVENTS, lock_run, machine
from vlmoe.train.signals import StopRequest
from vlmoe.train.watch import Watch

ROUTING_RECORDS = 1000  # at most in a run: enough for a heat map over time, small beside the checkpoints


class NonFiniteError(UserError):
    """The loss or the gradient is no number any more; the message names the step and the metrics."""


@dataclass
class TrainResult:
    """What a launch did.

    steps: updates the model has now, over all launches. seconds, tokens_per_second, wait_share (of the loop's time,
    spent waiting for data): of this launch, 0 when it had nothing to do. final_loss: of the last step. stopped_by: the
    signal that ended the launch early, or None when the run is complete. resumed_from: the step it started at.
    held_back: updates that the guard did not make, over all launches.
    """

    steps: int
    seconds: float
    tokens_per_second: float
    wait_share: float
    final_loss: float | None
    stopped_by: int | None
    resumed_from: int
    held_back: int = 0

    @property
    def mostly_held_back(self) -> bool:
        """Whether more than half of the updates were not made: such a run has learned little of what it was shown."""
        return 2 * self.held_back > self.steps

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None


def train(
    recipe: Recipe | FinetuneRecipe,
    task: Task,
    dataset: Dataset[Step],
    run_dir: str | Path,
    validation: Validation | None = None,
    disturb: Callable[[Trainer, int], None] | None = None,
) -> TrainResult:
    """Train `task` to `train.steps`, or on from the newest checkpoint in `run_dir`.

    task: freshly initialised from the recipe's seed; it holds the trained weights afterwards, with a validation those
    of the best one. dataset: item n is the n-th micro-batch. disturb: called before each micro-step with its number,
    to put faults into a run. run_dir: gets checkpoints/, the logs of `runlog`, skipped.jsonl and, at the end,
    curves.png and routing.png. Where `torch.distributed` is set up, all its processes must call this: they share the
    micro-batches of each step, and the first one writes the folder.

    Raises:
        UserError: `train.accumulate` is no multiple of the number of processes, the folder is in use or cannot be
            written, a checkpoint is damaged or of another recipe, too many samples are bad, the loss is not finite, or
            memory is short.
    """
    run_dir = Path(run_dir)
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    ranks = Ranks()
    check_ranks(recipe.train, ranks.world)
    with lock_run(run_dir, ranks.first):
        return Trainer(recipe, task, dataset, run_dir, device, validation, disturb, ranks).run()


class Trainer:
    """One launch. Use `train`, which holds the folder's lock."""

    def __init__(
        self,
        recipe: Recipe | FinetuneRecipe,
        task: Task,
        dataset: Dataset[Step],
        run_dir: Path,
        device: torch.device,
        validation: Validation | None = None,
        disturb: Callable[[Trainer, int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.disturb, self.ranks = disturb, ranks or Ranks()
        self.recipe, self.config, self.run_dir, self.device = recipe, recipe.train, run_dir, device
        self.dtype = pick_precision(self.config.precision, device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        self.folder = run_dir / CHECKPOINTS
        self.validation = validation
        if self.ranks.first:
            checkpoint.sweep(self.folder)
        self.ranks.wait()
        self.task = task.to(device).train()
        self.task.prepare(device)
        self.optimizer = make_optimizer(self.task, self.config)
        self.state = checkpoint.State(0, 0, 0.0, None, to_mapping(recipe), machine=machine(device))
        found = checkpoint.newest(self.folder)
        if found is not None:
            checkpoint.check_recipe(found, recipe)
            self.state = checkpoint.restore(found, self.task, self.optimizer)
            if self.ranks.first:  # an earlier launch may have died before it could
                checkpoint.prune(self.folder, self.config.keep, self.config.keep_at)
        if self.validation is not None:
            for name, value in self.state.validation.items():
                setattr(self.validation, name, value)
        self.feed = Feed(recipe, self.task, dataset, run_dir, device, self.state.bad, self.ranks)
        self.routed = self.task.routed_layers()
        self.watch = Watch(self.task, self.config.watch_every, device, self.state.watch)
        guard = self.config.guard
        self.guard = None
        if guard.on:
            self.guard = Guard(guard, self.task, self.optimizer, recipe.seed, device, self.state.guard)
        self.last_loss: Tensor | None = None
        self.data_moved = False  # a roll-back leaves out the data since the checkpoint
        self.resumed_from = self.saved_step = self.state.step
        if self.config.compile:
            self.task.compile()
        self.model = self.ranks.join(self.task)

    def run(self) -> TrainResult:
        console = None if self.ranks.first else Console(quiet=True)
        with Display(self.recipe.name, self.state.step, self.config.steps, console) as display:
            journal = Journal if self.ranks.first else SilentJournal
            self.journal = journal(self.recipe, self.run_dir, self.device, display)
            if self._ended():
                self._take_best()
                at = f"already at step {self.state.step} of {self.config.steps}"
                self.journal.say(f"{self.run_dir}: {at}, nothing left to train")
                if not (self.run_dir / "curves.png").exists():  # killed between the last checkpoint and the plots
                    self.journal.plot()
                return self._result(None)
            self.journal.open(self.state, self.dtype)
            try:
                stopped_by = self._loop()
            except torch.OutOfMemoryError as error:
                first = str(error).splitlines()[0]
                hint = "make data.batch smaller and train.accumulate larger, or set model.recompute=true"
                raise UserError(f"out of memory in step {self.state.step + 1}: {first}\n{hint}") from None
            finally:
                self.journal.close()
            result = self._result(stopped_by)
            if stopped_by is None:
                self._take_best()
                self.journal.plot()
            else:
                done = self.state.step > 0
                saved = "saved; the same command goes on from there" if done else "before there was anything to save"
                at = f"step {self.state.step} of {self.config.steps}"
                self.journal.say(f"stopped by {signal.Signals(stopped_by).name} at {at}, {saved}")
            if result.mostly_held_back:
                held_back = f"{result.held_back} of {result.steps} updates were held back"
                self.journal.warn(f"{held_back}, see {self.run_dir / EVENTS}")
            return result

    # --------------------------------------------------------------------------------------------------------- loop
    def _loop(self) -> int | None:
        """Steps until the end or a signal. Returns the signal's number or None."""
        if self.state.step and self.watch.every and self.routed:  # what a launch from the beginning sees first
            self.watch.see(self.feed.first())
        with StopRequest() as stop:
            self._open_data()
            self.journal.start_clocks()
            stopped_by = 0
            # a signal to one process ends all of them after the same step
            while not self._ended() and not (stopped_by := self.ranks.most(stop.number or 0)):
                self._step()  # whole or, by an exception, the end: nothing is saved of a part of one
                if self.data_moved:
                    self._open_data()
                    continue
                self._validate()
                if not self._ended() and self._worth_saving():
                    self._save()
            complete = self._ended()
            if complete:
                self.feed.budget.finish()
            self._save()
            if self.guard is not None and self.guard.memory.held_back_in_all:
                held_back = self.guard.memory.held_back_in_all
                self.journal.event("held back in all", step=self.state.step, updates=held_back)
            return None if complete else stopped_by

    def _open_data(self) -> None:
        """From the next micro-batch on, as many as the steps that are left."""

        def lost(micro_step: int, cause: str) -> None:
            self.journal.event("worker replaced", step=self.state.step, micro_step=micro_step, cause=cause)
            self.journal.warn(f"step {self.state.step + 1}: a data worker was {cause}; it is replaced")

        left = (self.config.steps - self.state.step) * self.config.accumulate
        self.feed.open(self.state.micro_step, self.state.micro_step + left, lost)
        self.data_moved = False

    def _worth_saving(self) -> bool:
        """Whether a checkpoint is due. One that is to be kept is made of a state that is not to return to as well."""
        kept = self.state.step in self.config.keep_at
        if not kept and self.state.step % self.config.checkpoint_every:
            return False
        return self._healthy() or (kept and not self.data_moved)

    def _healthy(self) -> bool:
        """Whether this is a state to return to. What the guard holds back it may still have to undo."""
        if self.guard is None:
            return True
        self._look()
        return self.guard.healthy and not self.data_moved

    def _step(self) -> None:
        """One update from `accumulate` micro-batches."""
        config, number = self.config, self.state.step + 1
        last = number == config.steps
        logged, looked_at = number % config.log_every == 0 or last, self.watch.due(number)
        rate = learning_rate(number, config)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        self.task.measuring = logged or looked_at or self.guard is None  # without it, an error lists them
        batches = self.feed.next()
        self.journal.fed(batches.tokens, batches.waited)
        seeds = [seed_of(self.recipe.seed, self.state.micro_step + i) for i in self.ranks.mine(config.accumulate)]
        shown = self._shown(batches.micro_batches)
        found = accumulate(self.model, shown, batches.predictions, seeds, self.autocast, self.ranks)
        if self.task.measuring:
            found = found.gathered(self.ranks)
        found.note("grad_norm", clip_gradients(self.task, config.clip))
        self.watch.count(found.load)
        watched = self.watch.look(found.outputs) if looked_at else {}
        ok = self._admit(number, found)
        self.optimizer.step()
        for name, layer in self.routed.items():
            if name in found.load and not isinstance(layer, SoftMoELayer):
                layer.router.balance(found.load[name], ok * layer.pressure)
        self.state.step = number
        self.state.micro_step += config.accumulate
        self.last_loss = found.loss
        if logged:
            means = found.means()
            self.journal.metrics(number, self.state.seconds, {"loss": means.pop("loss"), "lr": rate, **means})
        if found.load and (watched or last or number % routing_every(config) == 0):
            self.journal.routing(number, found.load, watched, self.watch.warnings(watched))
        if self.guard is not None:
            self.guard.count(found.load)
            if number % self.config.guard.every == 0 or last:
                self._look()

    def _shown(self, micro_batches: list[dict[str, Batch]]) -> Iterator[dict[str, Batch]]:
        """The same, each shown to the instruments, and to what disturbs the run, right before its forward pass."""
        for i, batches in zip(self.ranks.mine(self.config.accumulate), micro_batches, strict=True):
            self.watch.see(batches)
            if self.disturb is not None:
                self.disturb(self, self.state.micro_step + i)
            yield batches

    def _admit(self, number: int, found: StepRecord) -> Tensor | float:
        """1 where the update may be made. The guard decides on the device, and the optimizer reads its word there."""
        if self.guard is None:
            self._check_finite(number, found.means())
            return 1.0
        ok = self.guard.admit(number, found.loss, found.records[0]["grad_norm"])
        self.optimizer.found_inf = 1 - ok  # type: ignore[attr-defined]  # fused AdamW skips the update where it is 1
        return ok

    def _look(self) -> None:
        """Let the guard act on what happened since its last look."""
        assert self.guard is not None
        verdict = self.guard.look(self.journal.act)
        if not verdict.roll_back and not verdict.fatal:
            return
        found = checkpoint.newest(self.folder)
        step = self.state.step
        if not verdict.fatal and found is None and self.guard.accept_level(step, self.journal.act):
            return
        if verdict.fatal or found is None:
            reason = verdict.fatal or f"{verdict.roll_back}, and there is no checkpoint to return to"
            self.journal.event("given up", step=step, cause=reason)
            raise NonFiniteError(f"step {step}: {reason}\n{advice(found)}")
        restored = checkpoint.restore(found, self.task, self.optimizer)
        self.guard.rolled_back(restored.guard, step)
        self.state.step = self.saved_step = restored.step
        self.journal.rewind(restored.logs)
        cause = f"{verdict.roll_back}; the data since then is left out"
        self.journal.act("rolled back", step=step, cause=cause, to=restored.step)
        self.data_moved = True

    def _ended(self) -> bool:
        early = self.validation is not None and self.validation.exhausted
        return early or self.state.step >= self.config.steps

    def _validate(self) -> None:
        """Judge the task when it is time, and keep its weights when it was never better."""
        v, step = self.validation, self.state.step
        if v is None or not v.due(step, self.config.steps):
            return
        began = time.perf_counter()
        judged = v.judge(self.task, step, self.run_dir / BEST, self.ranks)
        self.journal.validation(step, judged, v, time.perf_counter() - began)

    def _take_best(self) -> None:
        self.ranks.wait()  # for the first one to have written them
        if self.validation is not None:
            self.validation.take_best(self.task, self.run_dir / BEST)

    def _check_finite(self, number: int, means: dict[str, float]) -> None:
        if math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"]):
            return
        listed = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.journal.event("not finite", step=number, metrics={k: repr(v) for k, v in means.items()})
        raise NonFiniteError(
            f"step {number}: loss or gradient is not finite: {listed}\n{advice(checkpoint.newest(self.folder))}"
        )

    def _save(self) -> None:
        """A checkpoint of the last whole step, unless it has one. Any process could write it; the first one does."""
        if self.state.step == self.saved_step:
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.saved_step = self.state.step
        if not self.ranks.first:
            self.ranks.wait()
            return
        state = checkpoint.State(
            step=self.state.step,
            micro_step=self.state.micro_step,
            seconds=self.state.seconds + self.journal.seconds,
            loss=self._loss(),
            recipe=to_mapping(self.recipe),
            bad=self.feed.budget.state_dict(),
            logs=self.journal.sizes(),
            machine=machine(self.device),
            validation=self.validation.record() if self.validation is not None else {},
            guard=copy.deepcopy(self.guard.state) if self.guard is not None else {},
            watch=self.watch.state(),
        )
        path = checkpoint.save(self.folder, state, self.task, self.optimizer, self.config.keep, self.config.keep_at)
        self.journal.event("checkpoint", step=self.state.step, path=str(path.relative_to(self.run_dir)))
        self.ranks.wait()

    def _loss(self) -> float | None:
        """Of the last step, read from the device; None when it was no number, or there was none."""
        if self.last_loss is not None:
            loss = self.last_loss.item()
            self.state.loss = loss if math.isfinite(loss) else None
        return self.state.loss

    def _result(self, stopped_by: int | None) -> TrainResult:
        trained = self.state.step > self.resumed_from
        seconds, speed, wait_share = self.journal.launched.rates() if trained else (0.0, 0.0, 0.0)
        held_back = self.guard.memory.held_back_in_all if self.guard is not None else 0
        return TrainResult(
            self.state.step, seconds, speed, wait_share, self._loss(), stopped_by, self.resumed_from, held_back
        )


def check_ranks(config: TrainConfig, world: int) -> None:
    """A step is made of whole micro-batches, the same number for each process. Raises UserError."""
    if config.accumulate % world:
        raise UserError(
            f"key 'train.accumulate': got {config.accumulate} micro-batches a step for {world} processes, expected a "
            f"multiple of {world}: {world}, {2 * world}, {3 * world}, ... What a step learns from is the same with any "
            "number of processes; to keep its size, make data.batch smaller by as much"
        )


def advice(newest: Path | None) -> str:
    """What is left of a run that cannot go on, and what to try. newest: its last checkpoint."""
    kept = f"The newest checkpoint, {newest}, is untouched." if newest else "There is no checkpoint yet."
    return f"{kept} A lower train.lr, a longer train.warmup or a smaller train.clip in a new run.dir usually helps"


def routing_every(config: TrainConfig) -> int:
    """Steps between two records of the experts' load."""
    return max(config.log_every, math.ceil(config.steps / ROUTING_RECORDS))
