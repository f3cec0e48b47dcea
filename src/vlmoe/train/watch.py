"""Instruments: what each router does, looked at every few steps, and a warning in words when something is off."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe.data.batch import Batch
from vlmoe.tasks.base import StepOutput, Task

PROBE = 8  # samples of each kind whose choices are compared from look to look
SATURATED = 0.02  # entropy of a token's gates over log(experts), below which a router no longer weighs
DROPPED = 0.2


class Watch:
    """One for a launch. Looks draw no random numbers and change nothing.

    state: of the launch before (`state()`), empty at the run's begin, so that what is said does not depend on where a
    run was interrupted.
    """

    def __init__(self, task: Task, every: int, device: torch.device, state: dict[str, Any]) -> None:
        self.task, self.every = task, every
        self.layers = task.routed_layers()
        self._probe: dict[str, Batch] | None = None
        self._choices = {name: torch.tensor(v, device=device) for name, v in state.get("choices", {}).items()}
        # layer -> (E,) choices since the last look, over so many steps:
        self._load = {name: torch.tensor(v, device=device) for name, v in state.get("load", {}).items()}
        self._steps: int = state.get("steps", 0)
        self._idle: dict[str, list[int]] = dict(state.get("idle", {}))  # layer -> steps each expert had no token for

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {
            "choices": {name: v.tolist() for name, v in self._choices.items()},
            "load": {name: v.tolist() for name, v in self._load.items()},
            "steps": self._steps,
            "idle": self._idle,
        }

    def due(self, step: int) -> bool:
        return bool(self.every and self.layers) and step % self.every == 0

    def see(self, batches: dict[str, Batch]) -> None:
        """Keep a few samples of the run's first micro-batch as the probe."""
        if self._probe is None:
            self._probe = {kind: batch.head(PROBE) for kind, batch in batches.items()}

    def count(self, load: dict[str, Tensor]) -> None:
        """Remember a step's choices, "block/modality" -> (E,)."""
        if self.every:
            self._steps += 1
            self._load = {**self._load, **{n: self._load[n] + x if n in self._load else x for n, x in load.items()}}

    @torch.no_grad()
    def look(self, outputs: list[StepOutput]) -> dict[str, dict[str, float]]:
        """ "block/modality" -> scalars. Call it after backward and before the gradients go."""
        values: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items():
            seen = [output.layers[name] for output in outputs if name in output.layers]
            if not seen:
                continue
            found = {key: torch.stack([s[key].float() for s in seen]).mean() for key in seen[0]}
            load_E = torch.stack([output.load[name] for output in outputs if name in output.load]).sum(dim=0).float()
            found["max_load"] = load_E.max() / load_E.mean().clamp_min(1e-9)
            found["idle"] = (self._load.get(name, load_E) == 0).float().mean()
            found["router_gradient"] = _norm(layer.router.parameters(), load_E.device)
            found["expert_gradient"] = _norm(layer.experts.parameters(), load_E.device)
            values[name] = found
        for name, share in self._churn().items():
            values.setdefault(name, {})["churn"] = share
        self._count_idle()
        flat = [(name, key, value) for name, found in values.items() for key, value in found.items()]
        if not flat:
            return {}
        numbers = torch.stack([value.double().reshape(()) for _, _, value in flat]).tolist()
        result: dict[str, dict[str, float]] = {}
        for (name, key, _), number in zip(flat, numbers, strict=True):
            result.setdefault(name, {})[key] = number
        return result

    def warnings(self, values: dict[str, dict[str, float]]) -> list[str]:
        """What is off, in words."""
        said = []
        for name, found in values.items():
            block, modality = name.split("/")
            where, experts = f"layer {block} {modality}", self.layers[name].num_experts
            idle = [steps for steps in self._idle.get(name, []) if steps]
            if idle:
                said.append(f"{where}: {len(idle)} of {experts} experts idle for {min(idle)} steps")
            even = experts / self.layers[name].k
            if experts > 2 and found.get("max_load", 1.0) > 1 + 0.7 * (even - 1) > 1:
                said.append(f"{where}: one expert serves {found['max_load'] / even:.0%} of the tokens")
            if "entropy" in found and experts > 1 and found["entropy"] < SATURATED * math.log(experts):
                said.append(f"{where}: gates are saturated (entropy {found['entropy']:.3f} nats)")
            if found.get("dropped", 0.0) > DROPPED:
                said.append(f"{where}: {found['dropped']:.0%} of the choices are dropped for capacity")
        return said

    def _count_idle(self) -> None:
        for name, load_E in self._load.items():
            before = self._idle.get(name, [0] * len(load_E))
            counts = zip(load_E.tolist(), before, strict=True)
            self._idle[name] = [0 if load else steps + self._steps for load, steps in counts]
        self._load, self._steps = {}, 0

    def _churn(self) -> dict[str, Tensor]:
        """Share of the probe's tokens whose first choice has changed since the last look."""
        if self._probe is None:
            return {}
        training = self.task.training
        self.task.eval()
        choices = self.task.choices(self._probe)
        self.task.train(training)
        before, self._choices = self._choices, choices
        return {
            name: ((now != before[name]) & (now >= 0)).float().sum() / (now >= 0).float().sum().clamp_min(1)
            for name, now in choices.items()
            if name in before
        }


def _norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Of the gradients; 0 where all are frozen."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
