"""The gradient of a step: forward and backward of its micro-batches, and what they report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vlmoe.data.batch import Batch
from vlmoe.distributed import Ranks
from vlmoe.tasks.base import StepOutput
from vlmoe.tasks.pretrain import balance_beyond_passes


@dataclass
class StepRecord:
    """What the micro-batches of a step reported.

    outputs: without what holds gradients. records: by micro-batch, name -> scalar on the device; their mean is the
    step's. Both are this process's until `gathered`. load: "block/modality" -> (E,) choices of each expert in the step.
    loss: the step's, a float64 scalar on the device.
    """

    outputs: list[StepOutput] = field(default_factory=list)
    records: list[dict[str, Tensor]] = field(default_factory=list)
    load: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor = None  # type: ignore[assignment]  # known at the end of the step

    def gathered(self, ranks: Ranks) -> StepRecord:
        """With the reports of all processes. Waits for the device where there are several."""
        if ranks.world == 1:
            return self
        device = self.loss.device

        def moved(place: torch.device, found: Any) -> Any:
            return tree_map_only(Tensor, lambda t: t.detach().to(place), found)

        own = [[o.layers, o.load, record] for o, record in zip(self.outputs, self.records, strict=True)]
        of_all = moved(device, ranks.gather(moved(torch.device("cpu"), own)))
        outputs = [StepOutput({}, layers=layers, load=load) for layers, load, _ in of_all]
        return replace(self, outputs=outputs, records=[record for _, _, record in of_all])

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
    model: nn.Module,
    micro_batches: Iterator[dict[str, Batch]] | list[dict[str, Batch]],
    predictions: Mapping[str, int],
    seeds: list[int],
    autocast: torch.autocast,
    ranks: Ranks,
) -> StepRecord:
    """Add the gradient of a step's loss to the parameters'.

    model: the task, as `Ranks.join` gives it. micro_batches: this process's. predictions: of the whole step, as of
    `Task.predictions`. seeds: a generator's for each of these micro-batches.
    """
    step, count = StepRecord(), len(seeds) * ranks.world
    for i, (batches, seed) in enumerate(zip(micro_batches, seeds, strict=True), 1):
        torch.manual_seed(seed)
        with ranks.apart(model) if i < len(seeds) else nullcontext():
            with autocast:
                output: StepOutput = model(batches)
            loss = output.loss_in_step(predictions, count)
            loss = loss + balance_beyond_passes(output.spans, step.load, ranks.total) / count
            loss.backward()
        step.outputs.append(replace(output, losses={}, spans={}))
        step.records.append({"loss": loss.detach() * count, **output.metrics})
        step.load = _added([step.load, output.load])
    loss = torch.stack([record["loss"] for record in step.records]).double().sum()
    loss, *loads = ranks.sum([loss, *step.load.values()])
    step.loss, step.load = loss / count, dict(zip(step.load, loads, strict=True))
    return step


def seed_of(seed: int, micro_step: int) -> int:
    """The generator's seed in one micro-step: far apart for neighbouring steps and seeds."""
    digest = hashlib.blake2b(f"{seed}/{micro_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _added(loads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for load in loads:
        for name, load_E in load.items():
            total[name] = total[name] + load_E if name in total else load_E
    return total
