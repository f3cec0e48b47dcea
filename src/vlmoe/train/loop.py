"""The training loop, one for every task.

It knows a task by `vlmoe.tasks.base` (a loss with a gradient, and what to log) and data by `vlmoe.data.loader` (item n
is a pure function of seed and n). Everything random in a micro-step is drawn from a generator seeded by (seed, n), so a
run that goes on from a checkpoint continues bit for bit as if it had never stopped, on the same machine.
"""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmoe.config import FinetuneRecipe, Recipe, TrainConfig, UserError, to_mapping
from vlmoe.data.batch import Batch
from vlmoe.data.loader import BadBudget, Step, make_loader
from vlmoe.metrics import Score
from vlmoe.model.device import pick_device, pick_precision
from vlmoe.moe import SoftMoELayer
from vlmoe.tasks.base import StepOutput, Task
from vlmoe.tasks.pretrain import balance_beyond_passes
from vlmoe.train import checkpoint
from vlmoe.train.allocator import keep_freed_memory
from vlmoe.train.guard import Guard
from vlmoe.train.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from vlmoe.train.progress import Display
from vlmoe.train.runlog import EVENTS, SKIPPED, RunError, RunLog, lock_run, machine
from vlmoe.train.signals import StopRequest
from vlmoe.train.watch import Watch

CHECKPOINTS, BEST = "checkpoints", "best"
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
    curves.png and routing.png.

    Raises:
        UserError: the folder is in use or cannot be written, a checkpoint is damaged or of another recipe, too many
            samples are bad, the loss is not finite, or memory is short.
    """
    run_dir = Path(run_dir)
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    with lock_run(run_dir):
        return Trainer(recipe, task, dataset, run_dir, device, validation, disturb).run()


def seed_of(seed: int, micro_step: int) -> int:
    """The generator's seed in one micro-step: far apart for neighbouring steps and seeds."""
    digest = hashlib.blake2b(f"{seed}/{micro_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class _Clock:
    """Time and tokens since some moment."""

    began: float
    tokens: int = 0
    waited: float = 0.0

    def rates(self) -> tuple[float, float, float]:
        """Seconds, tokens per second, share of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        return seconds, self.tokens / seconds, min(1.0, self.waited / seconds)


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
    ) -> None:
        self.disturb = disturb
        self.recipe, self.config, self.dataset, self.run_dir = recipe, recipe.train, dataset, run_dir
        self.device = device
        self.dtype = pick_precision(self.config.precision, device)
        self.folder = run_dir / CHECKPOINTS
        self.validation = validation
        checkpoint.sweep(self.folder)
        self.task = task.to(device).train()
        self.task.prepare(device)
        self.optimizer = make_optimizer(self.task, self.config)
        self.state = checkpoint.State(0, 0, 0.0, None, to_mapping(recipe), machine=machine(device))
        found = checkpoint.newest(self.folder)
        if found is not None:
            checkpoint.check_recipe(found, recipe)
            self.state = checkpoint.restore(found, self.task, self.optimizer)
            # an earlier launch may have died before it could
            checkpoint.prune(self.folder, self.config.keep, self.config.keep_at)
        if self.validation is not None:
            for name, value in self.state.validation.items():
                setattr(self.validation, name, value)
        self.routed = self.task.routed_layers()
        self.watch = Watch(self.task, self.config.watch_every, device, self.state.watch)
        guard = self.config.guard
        self.guard = None
        if guard.on:
            self.guard = Guard(guard, self.task, self.optimizer, recipe.seed, device, self.state.guard)
        self.last_loss: Tensor | None = None
        self.warned = False  # of a validation that says little
        self.data_moved = False  # a roll-back leaves out the data since the checkpoint
        self.resumed_from = self.saved_step = self.state.step
        self.launched = _Clock(time.perf_counter())
        self.lap = _Clock(time.perf_counter())
        if self.config.compile:
            self.task.compile()

    def run(self) -> TrainResult:
        steps = self.config.steps
        with Display(self.recipe.name, self.state.step, steps) as display:
            if self._ended():
                self._take_best()
                display.say(f"{self.run_dir}: already at step {self.state.step} of {steps}, nothing left to train")
                if not (self.run_dir / "curves.png").exists():  # killed between the last checkpoint and the plots
                    self._plot(display)
                return self._result(None)
            self.log = RunLog(self.run_dir, self.recipe, self.state.step, self.state.logs)
            try:
                self._announce(display)
                stopped_by = self._loop(display)
            except torch.OutOfMemoryError as error:
                first = str(error).splitlines()[0]
                hint = "make data.batch smaller and train.accumulate larger, or set model.recompute=true"
                raise UserError(f"out of memory in step {self.state.step + 1}: {first}\n{hint}") from None
            finally:
                self.log.close()
            result = self._result(stopped_by)
            if stopped_by is None:
                self._take_best()
            if stopped_by is not None:
                done = self.state.step > 0
                saved = "saved; the same command goes on from there" if done else "before there was anything to save"
                display.say(
                    f"stopped by {signal.Signals(stopped_by).name} at step {self.state.step} of {steps}, {saved}"
                )
            else:
                self._plot(display)
            if result.mostly_held_back:
                display.warn(
                    f"{result.held_back} of {result.steps} updates were held back, see {self.run_dir / EVENTS}"
                )
            return result

    # --------------------------------------------------------------------------------------------------------- loop
    def _loop(self, display: Display) -> int | None:
        """Steps until the end or a signal. Returns the signal's number or None."""
        self.budget = BadBudget(self.run_dir / SKIPPED, self.recipe.data.max_bad_share)
        if self.state.bad:
            self.budget.load_state_dict(self.state.bad)
        if self.state.step and self.watch.every and self.routed:  # what a launch from the beginning sees first
            self.watch.see({kind: batch.to(self.device) for kind, batch in self.dataset[0].batches.items()})
        with StopRequest() as stop:
            data = self._open_data(display)
            self.launched = _Clock(time.perf_counter())
            self.lap = _Clock(time.perf_counter())
            while not self._ended() and stop.number is None:
                self._step(data, display)  # whole or, by an exception, the end: nothing is saved of a part of one
                if self.data_moved:
                    data, self.data_moved = self._open_data(display), False
                    continue
                self._validate(display)
                if not self._ended() and self._worth_saving(display):
                    self._save()
            complete = self._ended()
            if complete:
                self.budget.finish()
            self._save()
            if self.guard is not None and self.guard.memory.held_back_in_all:
                held_back = self.guard.memory.held_back_in_all
                self.log.event("held back in all", step=self.state.step, updates=held_back)
            return None if complete else stop.number

    def _open_data(self, display: Display) -> Iterator[Step]:
        """From the next micro-batch on, as many as the steps that are left."""

        def lost(micro_step: int, cause: str) -> None:
            self.log.event("worker replaced", step=self.state.step, micro_step=micro_step, cause=cause)
            display.warn(f"step {self.state.step + 1}: a data worker was {cause}; it is replaced")

        left = (self.config.steps - self.state.step) * self.config.accumulate
        return iter(
            make_loader(
                self.dataset,
                start=self.state.micro_step,
                stop=self.state.micro_step + left,
                workers=self.recipe.data.workers,
                device=self.device,
                lost=lost,
            )
        )

    def _worth_saving(self, display: Display) -> bool:
        """Whether a checkpoint is due. One that is to be kept is made of a state that is not to return to as well."""
        kept = self.state.step in self.config.keep_at
        if not kept and self.state.step % self.config.checkpoint_every:
            return False
        return self._healthy(display) or (kept and not self.data_moved)

    def _healthy(self, display: Display) -> bool:
        """Whether this is a state to return to. What the guard holds back it may still have to undo."""
        if self.guard is None:
            return True
        self._look(display)
        return self.guard.healthy and not self.data_moved

    def _step(self, data: Iterator[Step], display: Display) -> None:
        """One update from `accumulate` micro-batches."""
        config, number = self.config, self.state.step + 1
        rate = learning_rate(number, config)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        outputs: list[StepOutput] = []
        records: list[dict[str, Tensor]] = []
        load: dict[str, Tensor] = {}
        last = number == config.steps
        logged, looked_at = number % config.log_every == 0 or last, self.watch.due(number)
        self.task.measuring = logged or looked_at or self.guard is None  # without it, an error lists them
        micro_batches, predictions = self._next(data)
        for i, batches in enumerate(micro_batches):
            self.watch.see(batches)
            if self.disturb is not None:
                self.disturb(self, self.state.micro_step + i)
            torch.manual_seed(seed_of(self.recipe.seed, self.state.micro_step + i))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                output = self.task(batches)
            loss = output.loss_in_step(predictions, config.accumulate)
            loss = loss + balance_beyond_passes(output.spans, load, sum_over_devices()) / config.accumulate
            loss.backward()
            outputs.append(replace(output, losses={}, spans={}))
            records.append({"loss": loss.detach() * config.accumulate, **output.metrics})  # their mean is the step's
            load = _sum([load, output.load])
        grad_norm = clip_gradients(self.task, config.clip)
        self.watch.count(load)
        watched = self.watch.look(outputs) if looked_at else {}
        records = [record | {"grad_norm": grad_norm} for record in records]
        ok = self._admit(number, records)
        self.optimizer.step()
        for name, layer in self.routed.items():
            if name in load and not isinstance(layer, SoftMoELayer):
                layer.router.balance(load[name], ok * layer.pressure)
        self.state.step = number
        self.state.micro_step += config.accumulate
        self.last_loss = torch.stack([record["loss"] for record in records]).double().mean()
        if logged:
            means = _mean(records)
            self._record(display, {"loss": means.pop("loss"), "lr": rate, **means})
        if load and (watched or last or number % routing_every(config) == 0):
            self.log.routing(number, load, watched)
            for warning in self.watch.warnings(watched):
                display.warn(f"step {number}: {warning}")
                self.log.event("warning", step=number, text=warning)
        if self.guard is not None:
            self.guard.count(load)
            if number % self.config.guard.every == 0 or last:
                self._look(display)

    def _admit(self, number: int, records: list[dict[str, Tensor]]) -> Tensor | float:
        """1 where the update may be made. The guard decides on the device, and the optimizer reads its word there."""
        if self.guard is None:
            self._check_finite(number, _mean(records))
            return 1.0
        loss = torch.stack([r["loss"] for r in records]).double().mean()
        ok = self.guard.admit(number, loss, records[0]["grad_norm"])
        self.optimizer.found_inf = 1 - ok  # type: ignore[attr-defined]  # fused AdamW skips the update where it is 1
        return ok

    def _look(self, display: Display) -> None:
        """Let the guard act on what happened since its last look."""
        assert self.guard is not None

        def event(kind: str, **details: Any) -> None:
            self.log.event(kind, **details)
            words = ", ".join(f"{k} {v}" for k, v in details.items() if k not in ("step", "cause", "loss", "grad_norm"))
            display.warn(f"step {details['step']}: {kind}{' (' + words + ')' if words else ''}: {details['cause']}")

        verdict = self.guard.look(event)
        if not verdict.roll_back and not verdict.fatal:
            return
        found = checkpoint.newest(self.folder)
        step = self.state.step
        if not verdict.fatal and found is None and self.guard.accept_level(step, event):
            return
        if verdict.fatal or found is None:
            reason = verdict.fatal or f"{verdict.roll_back}, and there is no checkpoint to return to"
            self.log.event("given up", step=step, cause=reason)
            kept = f"The newest checkpoint, {found}, is untouched. " if found else "There is no checkpoint yet. "
            raise NonFiniteError(
                f"step {step}: {reason}\n{kept}"
                "A lower train.lr, a longer train.warmup or a smaller train.clip in a new run.dir usually helps"
            )
        restored = checkpoint.restore(found, self.task, self.optimizer)
        self.guard.rolled_back(restored.guard, step)
        self.state.step = self.saved_step = restored.step
        self.log.rewind(restored.logs)
        event("rolled back", step=step, to=restored.step, cause=f"{verdict.roll_back}; the data since then is left out")
        self.data_moved = True

    def _ended(self) -> bool:
        early = self.validation is not None and self.validation.exhausted
        return early or self.state.step >= self.config.steps

    def _validate(self, display: Display) -> None:
        """Judge the task when it is time, and keep its weights when it was never better."""
        v, step = self.validation, self.state.step
        if v is None or (step % v.every and step != self.config.steps):
            return
        began = time.perf_counter()
        self.task.eval()
        found = v.score(self.task)
        judged = found if isinstance(found, Judged) else Judged(found)
        score = judged.score
        self.task.train()
        v.misses += 1
        if score > v.best:
            v.best, v.best_step, v.misses = score, step, 0
            if v.keep_best:
                checkpoint.save_weights(self.run_dir / BEST, self.task)
        took = time.perf_counter() - began
        self.log.validation(step, judged.parts, score=score, best=v.best, best_step=v.best_step, seconds=took)
        display.say(
            f"step {step}: {judged.words or f'validation {score:.4f}'}" + ("" if v.misses else ", the best so far")
        )
        if judged.warning and not self.warned:
            self.warned = True
            self.log.event("warning", step=step, text=judged.warning)
            display.warn(judged.warning)
        if v.exhausted:
            display.say(f"no better for {v.misses} validations: training ends, step {v.best_step} is kept")
        for clock in (self.launched, self.lap):  # throughput is that of training
            clock.began += took

    def _take_best(self) -> None:
        if self.validation is not None and self.validation.keep_best and self.validation.best_step:
            checkpoint.load_weights(self.run_dir / BEST, self.task)

    def _next(self, data: Iterator[Step]) -> tuple[list[dict[str, Batch]], Counter[str]]:
        """The micro-batches of the next step on the device, and the predictions in all of them; bad samples and the
        time of waiting are counted."""
        found, predictions = [], Counter[str]()
        for _ in range(self.config.accumulate):
            began = time.perf_counter()
            step = next(data)
            waited = time.perf_counter() - began
            try:
                self.budget.add(step)
            except OSError as error:
                raise RunError(f"{self.run_dir / SKIPPED}: cannot be written: {error}") from None
            tokens = self.task.tokens(step.batches)  # counted on the CPU: no waiting for the device
            predictions.update(self.task.predictions(step.batches))
            for clock in (self.launched, self.lap):
                clock.waited += waited
                clock.tokens += tokens
            found.append({kind: batch.to(self.device) for kind, batch in step.batches.items()})
        return found, predictions

    def _check_finite(self, number: int, means: dict[str, float]) -> None:
        if math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"]):
            return
        kept = checkpoint.newest(self.folder)
        listed = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.log.event("not finite", step=number, metrics={k: repr(v) for k, v in means.items()})
        raise NonFiniteError(
            f"step {number}: loss or gradient is not finite: {listed}\n"
            + (f"The newest checkpoint, {kept}, is untouched. " if kept else "There is no checkpoint yet. ")
            + "A lower train.lr, a longer train.warmup or a smaller train.clip in a new run.dir usually helps"
        )

    # ------------------------------------------------------------------------------------------------------- records
    def _record(self, display: Display, values: dict[str, float]) -> None:
        """One line of metrics; throughput and waiting are those since the line before."""
        _, speed, wait_share = self.lap.rates()
        seconds = self.state.seconds + self.launched.rates()[0]
        self.lap = _Clock(time.perf_counter())
        timing = {"tokens_per_second": speed, "seconds": seconds, "wait_share": wait_share}
        if self.device.type == "cuda":
            timing["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.log.metrics(self.state.step, values | timing)
        display.update(self.state.step, values["loss"], *self.launched.rates()[1:])

    def _save(self) -> None:
        """A checkpoint of the last whole step, unless it has one."""
        if self.state.step == self.saved_step:
            return
        self.optimizer.zero_grad(set_to_none=True)
        state = checkpoint.State(
            step=self.state.step,
            micro_step=self.state.micro_step,
            seconds=self.state.seconds + self.launched.rates()[0],
            loss=self._loss(),
            recipe=to_mapping(self.recipe),
            bad=self.budget.state_dict(),
            logs=self.log.sizes(),
            machine=machine(self.device),
            validation=self.validation.record() if self.validation is not None else {},
            guard=copy.deepcopy(self.guard.state) if self.guard is not None else {},
            watch=self.watch.state(),
        )
        path = checkpoint.save(self.folder, state, self.task, self.optimizer, self.config.keep, self.config.keep_at)
        self.saved_step = self.state.step
        self.log.event("checkpoint", step=self.state.step, path=str(path.relative_to(self.run_dir)))

    def _loss(self) -> float | None:
        """Of the last step, read from the device; None when it was no number, or there was none."""
        if self.last_loss is not None:
            loss = self.last_loss.item()
            self.state.loss = loss if math.isfinite(loss) else None
        return self.state.loss

    def _announce(self, display: Display) -> None:
        now, then = machine(self.device), self.state.machine
        self.log.launch(self.state.step, self.device)
        where = f"on {now['device_name']}, {str(self.dtype).removeprefix('torch.')}"
        if not self.state.step:
            display.say(f"{self.run_dir}: {self.config.steps} steps {where}")
            return
        display.say(f"{self.run_dir}: going on from step {self.state.step} of {self.config.steps} {where}")
        if changed := {k: (then.get(k), v) for k, v in now.items() if then.get(k) != v}:
            listed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items())
            display.say(f"  not the machine of the checkpoint ({listed}): results agree up to rounding only")

    def _plot(self, display: Display) -> None:
        from vlmoe.train import plots  # matplotlib is slow to import

        try:
            drawn = [plots.plot_curves(self.run_dir), plots.plot_routing(self.run_dir)]
        except OSError as error:  # the weights are safe: no reason to fail
            display.say(f"{self.run_dir}: no plots, the disk refused them: {error}")
            return
        if any(drawn):
            display.say("plots: " + ", ".join(str(path) for path in drawn if path))

    def _result(self, stopped_by: int | None) -> TrainResult:
        seconds, speed, wait_share = self.launched.rates() if self.state.step > self.resumed_from else (0.0, 0.0, 0.0)
        held_back = self.guard.memory.held_back_in_all if self.guard is not None else 0
        return TrainResult(
            self.state.step, seconds, speed, wait_share, self._loss(), stopped_by, self.resumed_from, held_back
        )


def routing_every(config: TrainConfig) -> int:
    """Steps between two records of the experts' load."""
    return max(config.log_every, math.ceil(config.steps / ROUTING_RECORDS))


def _mean(values: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each name over the micro-batches that have it, read from the device in one go."""
    names = list(dict.fromkeys(name for v in values for name in v))
    device = values[0]["loss"].device
    columns = [torch.stack([v[name].detach().to(device, torch.float64) for v in values if name in v]) for name in names]
    return dict(zip(names, torch.stack([column.mean() for column in columns]).tolist(), strict=True))


def sum_over_devices() -> Callable[[Tensor], Tensor] | None:
    """A sum over all processes of a distributed run, or None when there is one."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None

    def total(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    return total


def _sum(loads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for load in loads:
        for name, load_E in load.items():
            total[name] = total[name] + load_E if name in total else load_E
    return total
