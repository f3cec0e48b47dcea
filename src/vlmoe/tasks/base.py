"""The contract between a task and the training loop.

A task is an `nn.Module` that owns backbone and heads. The loop knows nothing else of it: it feeds `Step.batches`, takes
the gradient of the step's loss and logs the rest.

A loss is a sum over predictions and their number. A step may have several micro-batches, and its loss is that of all of
them as one batch: each sum over the number in the whole step, not a mean of the micro-batches' means, in which a hidden
word would count for more where few are hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from vlmoe.config import ModelConfig
from vlmoe.data.batch import Batch
from vlmoe.moe import MoELayer

ROUTING = "routing"  # losses of routing are named "routing/block/modality"


@dataclass
class Span:
    """Of one layer in one micro-batch: choices of each expert, summed probabilities with gradient, real tokens; the
    loss's weight and what it spans (micro, step or global)."""

    load_E: Tensor
    probability_E: Tensor
    tokens: Tensor
    weight: float
    scope: str


@dataclass
class Summed:
    """A loss summed over predictions, scalar with gradient, and how many they are."""

    total: Tensor
    count: Tensor | int

    @property
    def mean(self) -> Tensor:
        count = self.count.clamp_min(1) if isinstance(self.count, Tensor) else max(1, self.count)
        return self.total / count


@dataclass
class StepOutput:
    """What a task returns for one micro-batch.

    losses: name -> what is minimised; the loss is the sum of their means. metrics: name -> detached scalar, averaged
    over micro-batches by the loop. load: "block/modality" -> (E,) detached count of assignments to each expert, summed
    over micro-batches. layers: "block/modality" -> detached scalars of that layer's routing. spans: "block/modality" ->
    what a balance loss over more than one pass is made of; the loop adds it, for it alone knows the other micro-batches
    and devices.
    """

    losses: dict[str, Summed]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    load: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """Of this micro-batch alone, scalar with gradient."""
        return reduce(add, (loss.mean for loss in self.losses.values()))

    def loss_in_step(self, predictions: Mapping[str, int], micro_batches: int) -> Tensor:
        """This micro-batch's part in the loss of its step: the sum over the step's micro-batches is the step's loss.

        predictions: by name, of all micro-batches (`Task.predictions`). A loss that is not among them is no sum over
        predictions, and its means are averaged over the micro-batches.
        """
        return reduce(
            add,
            (
                loss.total / max(1, predictions[name]) if name in predictions else loss.mean / micro_batches
                for name, loss in self.losses.items()
            ),
        )


class Task(nn.Module, ABC):
    measuring = True  # whether someone will read the metrics and layers of the next outputs; else they may be empty

    @abstractmethod
    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        """Losses of one micro-batch. batches: "image", "text", "pair" -> Batch, those the recipe asks for."""

    def predictions(self, batches: dict[str, Batch]) -> dict[str, int]:
        """How many predictions each loss of `StepOutput.losses` will sum over; called on batches in the CPU's memory,
        before they are computed. Left out are losses that are no sum over predictions."""
        return {}

    def routed_tokens(self, batches: dict[str, Batch]) -> dict[str, int]:
        """The tokens that each sparse layer will see, by the name of its loss, where a batch's image and text pass the
        backbone as one sequence."""
        found = {}
        for name in self.routed_layers():
            block, modality = name.split("/")
            served_apart = self.backbone.blocks[int(block)].fused is None  # type: ignore[union-attr, index]
            parts = [_tokens_of(batch, self.backbone.config) for batch in batches.values()]  # type: ignore[arg-type, union-attr]
            found[f"{ROUTING}/{name}"] = sum(p.get(modality, 0) for p in parts if served_apart or len(p) == 1)
        return found

    @abstractmethod
    def tokens(self, batches: dict[str, Batch]) -> int:
        """Tokens the backbone processes for these batches, padding not counted; for throughput."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """AdamW groups: matrices and embeddings decay; biases, norms, positions and single tokens do not."""
        decay: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                last = name.rsplit(".", 1)[-1]
                free = parameter.ndim < 2 or last in {"position", "class_token", "mask_token"}
                # A mixture stacks its experts' biases into (E, D): they are still biases.
                (rest if free or last in {"bias", "b1", "b2"} else decay).append(parameter)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def routed_layers(self) -> dict[str, MoELayer]:
        """The sparse layers, by the names that `StepOutput.load` has."""
        backbone = getattr(self, "backbone", None)
        return {} if backbone is None else backbone.routed_layers()

    def choices(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """ "block/modality" -> the first choice of each token of these batches; by it one sees choices change."""
        return {}

    @torch.no_grad()
    def prepare(self, device: torch.device) -> None:
        """Called once, after the module moved to `device` and before the first step."""
        return


def _tokens_of(batch: Batch, config: ModelConfig) -> dict[str, int]:
    """Real tokens of each modality in a batch; an image's are its patches and the class token."""
    found = {}
    if batch.image_BCHW is not None:
        found["vision"] = len(batch.image_BCHW) * ((config.image_size // config.patch) ** 2 + 1)
    if batch.text_BT is not None:
        found["text"] = batch.text_BT.numel() if batch.valid_BT is None else int(batch.valid_BT.sum())
    return found
