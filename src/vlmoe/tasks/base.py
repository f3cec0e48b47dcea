"""The contract between a task and the training loop.

A task is an `nn.Module` that owns backbone and heads. The loop knows nothing else of it: it feeds `Step.batches`, takes
the gradient of `StepOutput.loss` and logs the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlmoe.data.batch import Batch
from vlmoe.moe import MoELayer


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
class StepOutput:
    """What a task returns for one micro-batch.

    loss: scalar with gradient. metrics: name -> detached scalar, averaged over micro-batches by the loop.
    load: "block/modality" -> (E,) detached count of assignments to each expert, summed over micro-batches.
    layers: "block/modality" -> detached scalars of that layer's routing. spans: "block/modality" -> what a balance loss
    over more than one pass is made of; the loop adds it, for it alone knows the other micro-batches and devices.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    load: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)


class Task(nn.Module, ABC):
    @abstractmethod
    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        """Losses of one micro-batch. batches: "image", "text", "pair" -> Batch, those the recipe asks for."""

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
