"""The gradient of a step: forward and backward of its micro-batches, and what they report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlmoe.data.batch import Batch
from vlmoe.tasks.base import StepOutput, Task
from vlmoe.tasks.pretrain import balance_beyond_passes


@dataclass
class StepRecord:
    """What the micro-batches of a step reported.

    outputs: without what holds gradients. records: by micro-batch, name -> scalar on the device; their mean is the
    step's. load: "block/modality" -> (E,) choices of each expert in the step.
    """

    outputs: list[StepOutput] = field(default_factory=list)
    records: list[dict[str, Tensor]] = field(default_factory=list)
    load: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The step's, a float64 scalar on the device."""
        return torch.stack([record["loss"] for record in self.records]).double().mean()

    def note(self, name: str, value: Tensor) -> None:
        """A scalar that is the whole step's."""
        for record in self.records:
            record[name] = value

    def means(self) -> dict[str, float]:
        """Each name over the micro-batches that have it, read from the device in one go."""
        names = list(dict.fromkeys(name for record in self.records for name in record))
        device = self.records[0]["loss"].device
        columns = [
            torch.stack([r[name].detach().to(device, torch.float64) for r in self.records if name in r])
            for name in names
        ]
        return dict(zip(names, torch.stack([column.mean() for column in columns]).tolist(), strict=True))


def accumulate(
    task: Task,
    micro_batches: Iterator[dict[str, Batch]] | list[dict[str, Batch]],
    predictions: Mapping[str, int],
    seeds: list[int],
    autocast: torch.autocast,
) -> StepRecord:
    """Add the gradient of a step's loss to the parameters'.

    predictions: of the whole step, as of `Task.predictions`. seeds: a generator's for each micro-batch.
    """
    step, count = StepRecord(), len(seeds)
    for batches, seed in zip(micro_batches, seeds, strict=True):
        torch.manual_seed(seed)
        with autocast:
            output = task(batches)
        loss = output.loss_in_step(predictions, count)
        loss = loss + balance_beyond_passes(output.spans, step.load, sum_over_devices()) / count
        loss.backward()
        step.outputs.append(replace(output, losses={}, spans={}))
        step.records.append({"loss": loss.detach() * count, **output.metrics})
        step.load = _added([step.load, output.load])
    return step


def seed_of(seed: int, micro_step: int) -> int:
    """The generator's seed in one micro-step: far apart for neighbouring steps and seeds."""
    digest = hashlib.blake2b(f"{seed}/{micro_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sum_over_devices() -> Callable[[Tensor], Tensor] | None:
    """A sum over all processes of a distributed run, or None when there is one."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None

    def total(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    return total


def _added(loads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for load in loads:
        for name, load_E in load.items():
            total[name] = total[name] + load_E if name in total else load_E
    return total
