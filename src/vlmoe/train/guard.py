"""The autopilot: keeps a run alive through what breaks others, and says what it did.

Each step, on the device and without waiting for it, an update is held back when the loss or the gradient is no number
or when the loss jumps above what it has been (`admit`). Every few steps the guard looks (`look`): it logs what was
held back, revives experts that died, raises the pressure to balance where routing collapses, and asks for a roll-back
when the run does not recover. While nothing is wrong it changes nothing: a healthy run is the plain run, bit for bit.

Shape suffixes: E experts · W losses remembered.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmoe.config import GuardConfig
from vlmoe.moe import MoELayer, SoftMoELayer
from vlmoe.moe.routers import HashRouter
from vlmoe.tasks.base import Task

WINDOW = 64  # losses the running median is taken over
RECENT = 16  # losses that say where the run is now
NOISE = 0.05  # of a revived expert's weights, in units of their standard deviation
RISEN = 0.1  # of the lowest level, by which the recent losses are well above it; and five standard errors
LOOKS = 6  # in a row at which a layer is found collapsed before the pressure rises: early in training it may be for two
WITHERED = 1e-3  # an expert whose weights are this small beside the median expert's is dead

Event = Callable[..., None]


@dataclass
class Verdict:
    """What a look found. roll_back: return to the last checkpoint, for this reason. fatal: nothing left to try."""

    roll_back: str = ""
    fatal: str = ""


@dataclass
class Memory:
    """What the guard knows of the run, all of it kept in checkpoints."""

    losses: list[float] = field(default_factory=list)
    lowest: float | None = None  # level: the median of the last WINDOW losses
    spread: float = 0.0  # of the losses when the level was lowest, a robust standard deviation
    held_back: int = 0  # updates in a row, up to now
    held_back_in_all: int = 0
    roll_backs: int = 0  # since the run last made progress
    best_step: int = 0  # the furthest step it had reached when it last rolled back
    idle: dict[str, list[int]] = field(default_factory=dict)
    collapsed: dict[str, int] = field(default_factory=dict)
    pressure: dict[str, float] = field(default_factory=dict)


class Guard:
    """One for a run. `state` is plain data for the checkpoint; give it back when resuming."""

    def __init__(
        self, config: GuardConfig, task: Task, optimizer: torch.optim.Optimizer, seed: int, device: torch.device,
        state: dict[str, Any],
    ) -> None:  # fmt: skip
        self.config, self.task, self.optimizer, self.seed, self.device = config, task, optimizer, seed, device
        self.memory = Memory(**state)
        self.layers = {n: layer for n, layer in task.routed_layers().items() if not isinstance(layer, SoftMoELayer)}
        for name, value in self.memory.pressure.items():
            self.layers[name].pressure = value
        self._pending: list[tuple[int, Tensor]] = []
        self._load: dict[str, Tensor] = {}
        self._steps = 0
        self._losses_W: Tensor
        self._recall()

    @property
    def state(self) -> dict[str, Any]:
        return vars(self.memory)

    @property
    def healthy(self) -> bool:
        """Whether what there is now is worth keeping."""
        return self.memory.held_back == 0 and not self._high()

    # ------------------------------------------------------------------------------------------------------- each step
    @torch.no_grad()
    def admit(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1 if the update may be made, 0 if not, a float32 scalar on the device. Call it once a step."""
        loss, grad_norm = loss.detach().double(), grad_norm.detach().double()
        finite = loss.isfinite() & grad_norm.isfinite()
        median = self._losses_W.nanmedian()
        spread = 1.4826 * (self._losses_W - median).abs().nanmedian()
        limit = median + torch.maximum(self.config.spike * spread, 0.5 * median.abs() + 0.1)
        full = ~self._losses_W[0].isnan()
        jump = full & (loss > limit)
        ok = finite & ~jump
        shifted_W = torch.cat([self._losses_W[1:], loss.reshape(1)])
        self._losses_W = torch.where(ok, shifted_W, self._losses_W)
        self._pending.append((step, torch.stack([finite.double(), jump.double(), loss, grad_norm, median])))
        return ok.float()

    def count(self, load: dict[str, Tensor]) -> None:
        """Remember a step's choices, name -> (E,)."""
        self._steps += 1
        for name, load_E in load.items():
            self._load[name] = self._load[name] + load_E if name in self._load else load_E

    # ------------------------------------------------------------------------------------------------------- each look
    def look(self, event: Event) -> Verdict:
        """Read what happened since the last look, act, and log each action through `event(kind, step=..., ...)`."""
        if not self._pending:
            return Verdict()
        rows = torch.stack([row for _, row in self._pending]).tolist()
        steps = [step for step, _ in self._pending]
        for step, (finite, jump, loss, norm, median) in zip(steps, rows, strict=True):
            if finite and not jump:
                self.memory.held_back = 0
                continue
            self.memory.held_back += 1
            self.memory.held_back_in_all += 1
            if not finite:
                cause = "the loss is no number" if not math.isfinite(loss) else "the gradient is no number"
            else:
                cause = f"loss {loss:.4g} jumped above the median of {median:.4g}"
            event("update held back", step=step, cause=cause, loss=repr(loss), grad_norm=repr(norm))
        step, self._pending = steps[-1], []
        self.memory.losses = [x for x in self._losses_W.tolist() if not math.isnan(x)]
        self._tend_experts(step, event)
        verdict = self._judge(step, event)
        if not verdict.roll_back and not verdict.fatal:
            self._tend_balance(step, event)
        self._load, self._steps = {}, 0
        return verdict

    def rolled_back(self, state: dict[str, Any], step: int) -> None:
        """The weights are those of a checkpoint again, whose `state` this is; count that it happened."""
        kept = self.memory
        self.memory = Memory(**state)
        self.memory.held_back_in_all = kept.held_back_in_all
        self.memory.roll_backs, self.memory.best_step = kept.roll_backs + 1, max(kept.best_step, step)
        for name, layer in self.layers.items():
            layer.pressure = self.memory.pressure.get(name, 1.0)
        self._load, self._steps, self._pending = {}, 0, []
        self._recall()

    def _recall(self) -> None:
        known = self.memory.losses[-WINDOW:]
        values = [math.nan] * (WINDOW - len(known)) + known
        self._losses_W = torch.tensor(values, dtype=torch.float64, device=self.device)

    def _high(self) -> bool:
        """Whether the recent losses are well above the lowest level the run has held."""
        known, lowest = self.memory.losses, self.memory.lowest
        if lowest is None or len(known) < WINDOW:
            return False
        error = 1.25 * self.memory.spread / math.sqrt(RECENT)  # of a median
        return _median(known[-RECENT:]) > lowest + max(RISEN * abs(lowest), 5 * error)

    def _judge(self, step: int, event: Event) -> Verdict:
        memory, patience = self.memory, self.config.patience
        if len(memory.losses) == WINDOW and not memory.held_back:
            level = _median(memory.losses)
            if memory.lowest is None or level < memory.lowest:
                memory.lowest = level
                memory.spread = 1.4826 * _median([abs(x - level) for x in memory.losses])
        if step > memory.best_step:
            memory.roll_backs = 0
        reason = ""
        if memory.held_back >= patience:
            reason = f"{memory.held_back} updates in a row were held back"
        elif self._high():
            reason = f"the loss has risen from {memory.lowest:.4g} to {_median(memory.losses[-RECENT:]):.4g} and stays"
        if not reason:
            return Verdict()
        if memory.roll_backs >= self.config.max_roll_backs:
            if memory.held_back < patience:  # a higher loss, but one to train from: perhaps the data are harder now
                self.accept_level(step, event)
                return Verdict()
            return Verdict(fatal=f"{reason}, also after {memory.roll_backs} roll-backs")
        return Verdict(roll_back=reason)

    def accept_level(self, step: int, event: Event) -> bool:
        """Forget what the loss used to be: there is nothing to return to. False when the weights are damaged."""
        if self._damaged():
            return False
        self.memory.losses, self.memory.lowest, self.memory.held_back = [], None, 0
        self._recall()
        event("level accepted", step=step, cause="nothing to return to; the loss is judged afresh from here")
        return True

    def _damaged(self) -> bool:
        return any(not torch.isfinite(p).all() for p in self.task.parameters())

    # -------------------------------------------------------------------------------------------------------- experts
    @torch.no_grad()
    def _tend_experts(self, step: int, event: Event) -> None:
        """Revive experts that nobody chooses, whose weights have withered, or whose weights are no numbers."""
        for name, layer in self.layers.items():
            if layer.experts.w1.requires_grad is False or isinstance(layer.router, HashRouter):
                continue
            own = len(layer.experts.w1)
            size_E = (layer.experts.w1.square().sum((1, 2)) + layer.experts.w2.square().sum((1, 2))).sqrt()
            sizes = size_E.tolist()
            finite = [s for s in sizes if math.isfinite(s)]
            if not finite:
                continue
            middle = _median(finite)
            load = self._load[name].tolist()[:own] if name in self._load else [1] * own
            idle = self.memory.idle.setdefault(name, [0] * own)
            for e in range(own):
                idle[e] = idle[e] + self._steps if load[e] == 0 else 0
                if not math.isfinite(sizes[e]):
                    cause = "its weights are no numbers"
                elif sizes[e] < WITHERED * middle:
                    cause = "its weights have withered to nothing"
                elif idle[e] >= self.config.dead_after and self.memory.held_back == 0:
                    cause = f"no token chose it for {idle[e]} steps"
                else:
                    continue
                fit = [j for j in range(own) if math.isfinite(sizes[j]) and sizes[j] >= WITHERED * middle and j != e]
                if not fit:
                    continue
                donor = max(fit, key=lambda j: load[j])
                self._revive(layer, name, step, e, donor)
                idle[e], sizes[e] = 0, sizes[donor]
                event("expert revived", step=step, layer=name, expert=e, donor=donor, cause=cause)

    def _revive(self, layer: MoELayer, name: str, step: int, dead: int, donor: int) -> None:
        """The donor's weights and router row with noise, and no history in the optimizer."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{step}/{name}/{dead}".encode()))
        experts, router = layer.experts, layer.router
        rows = [experts.w1, experts.b1, experts.w2, experts.b2, router.weight]
        for parameter in rows:
            if parameter is None:
                continue
            value = parameter.data[donor]
            noise = torch.randn(value.shape, generator=generator).to(value)
            parameter.data[dead] = value + NOISE * value.std(correction=0) * noise
            for moment in self.optimizer.state.get(parameter, {}).values():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    moment[dead] = 0
        if router.bias_rate > 0:
            router.bias_E[dead] = router.bias_E[donor]

    # -------------------------------------------------------------------------------------------------------- balance
    def _tend_balance(self, step: int, event: Event) -> None:
        """Raise the pressure on layers that send nearly everything to one expert, and lower it when they recover."""
        for name, layer in self.layers.items():
            load = self._load[name].tolist() if name in self._load else []
            steered = bool(layer.loss_weights) or layer.router.bias_rate > 0
            if not steered or not sum(load) or len(load) <= layer.k:
                continue
            busiest = max(load) / sum(load) * layer.k  # share of tokens that the busiest expert serves: 1 is all
            even = layer.k / len(load)
            collapsed = busiest > even + self.config.collapse * (1 - even)
            before = layer.pressure
            looks = self.memory.collapsed[name] = self.memory.collapsed.get(name, 0) + 1 if collapsed else 0
            if looks >= LOOKS:
                layer.pressure = min(2 * before, self.config.max_pressure)
            elif before > 1 and busiest < even + 0.5 * self.config.collapse * (1 - even):
                layer.pressure = max(before / 2, 1.0)
            self.memory.pressure[name] = layer.pressure
            if layer.pressure == 1.0:
                del self.memory.pressure[name]
            if layer.pressure != before:
                kind = "pressure raised" if layer.pressure > before else "pressure lowered"
                cause = f"the busiest expert serves {busiest:.0%} of the tokens"
                event(kind, step=step, layer=name, pressure=layer.pressure, cause=cause)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
