"""What the six downstream tasks share: a pre-trained backbone, a head, the learning rates of both, and what is frozen.

A task is one small file: which batches it takes (`collate`), its head and loss, what it answers (`predict`) and how the
answers are scored (`score`).

Shape suffixes: B batch · D width · L labels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.config import FinetuneRecipe
from vlmoe.data.batch import Batch
from vlmoe.data.downstream.collate import Prepare
from vlmoe.data.downstream.example import Example
from vlmoe.metrics import Score
from vlmoe.model import Backbone, BackboneOutput
from vlmoe.moe import Experts, MoELayer, Router, RoutingStats, SoftRouter
from vlmoe.tasks.base import StepOutput, Summed, Task
from vlmoe.tasks.pretrain import first_choices, summarise_routing

SHOWN = 5  # best answers kept of each prediction


@dataclass
class Guess:
    """A classifier's answer to one example: label numbers, best first, and their probabilities. finite: all of the
    example's logits, not only those of the best, are numbers."""

    labels: list[int]
    probabilities: list[float]
    finite: bool = True


class Downstream(Task):
    """task: its name on the command line. main: the score that early stopping and comparisons look at. swaps: what is
    taken from another example to see how far the task is solved without looking at it ("image", "text" or neither).
    """

    task: ClassVar[str]
    main: ClassVar[str]
    swaps: ClassVar[str] = ""

    def __init__(self, recipe: FinetuneRecipe, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.recipe, self.labels = recipe, labels
        self.backbone = Backbone(recipe.model)
        for module in self.backbone.modules():
            if isinstance(module, MoELayer) and not recipe.sparse.losses:
                module.loss_weights = {}

    @staticmethod
    @abstractmethod
    def collate(
        prepare: Prepare, recipe: FinetuneRecipe, labels: tuple[str, ...],
        examples: list[Example], rngs: list[np.random.Generator], training: bool,
    ) -> dict[str, Batch]:  # fmt: skip
        """The batches of these examples. rngs: one generator for each. Runs in data workers, so it knows no weights."""

    @abstractmethod
    def predict(self, batches: dict[str, Batch]) -> list[Any]:
        """One answer for each example of the batches, as plain values or tensors on the CPU. An answer's `finite` says
        whether all it comes from are numbers, none nan or infinite: others are never scored."""

    @abstractmethod
    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Score]:
        """The task's metrics. Examples whose truth is not known are left out."""

    def guess(self, examples: Sequence[Example]) -> dict[str, Score]:
        """What one answer for all examples would score at best: chance, or the majority class. Empty where a task has
        no such guess."""
        return {}

    def counts(self, examples: Sequence[Example]) -> dict[str, int]:
        """What else is to be known of the examples that scores are made of, in words and numbers."""
        return {}

    def show(self, answer: Any) -> list[dict[str, Any]]:
        """An answer in words, best first: [{"answer": ..., "probability": ...}]."""
        raise NotImplementedError(self.task)

    def run(self, batch: Batch, causal: str | None = None) -> BackboneOutput:
        """The backbone over whatever the batch holds."""
        parts = []
        if batch.image_BCHW is not None:
            parts.append(self.backbone.image(batch.image_BCHW))
        if batch.text_BT is not None:
            parts.append(self.backbone.text(batch.text_BT, batch.valid_BT))
        return self.backbone(parts, causal)

    def output(self, loss: Summed, outputs: Sequence[BackboneOutput], **metrics: Tensor) -> StepOutput:
        """The step's output with the routing of all passes through the backbone."""
        routed: list[tuple[str, RoutingStats]] = [item for output in outputs for item in output.stats.items()]
        routing = summarise_routing(routed, self.measuring)
        named = {f"{self.task}/{name}": value.detach() for name, value in metrics.items()}
        named = {f"{self.task}/loss": loss.mean.detach()} | named
        losses = {self.task: loss} | routing.losses
        return StepOutput(losses, named | routing.metrics, routing.load, routing.layers, routing.spans)

    def predictions(self, batches: dict[str, Batch]) -> dict[str, int]:
        return self.routed_tokens(batches)

    def tokens(self, batches: dict[str, Batch]) -> int:
        patches = (self.recipe.model.image_size // self.recipe.model.patch) ** 2 + 1
        images = sum(len(b.image_BCHW) for b in batches.values() if b.image_BCHW is not None)
        return images * patches + sum(int(b.valid_BT.sum()) for b in batches.values() if b.valid_BT is not None)

    # ------------------------------------------------------------------------------------------------------ training
    def freeze(self) -> None:
        """Apply `sparse.train`: what of the backbone is trained. The head always is."""
        policy = self.recipe.sparse.train
        for module in self.backbone.modules():
            if policy == "experts_only":
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(isinstance(module, Experts))
            frozen = {"freeze_routers": (Router, SoftRouter), "freeze_experts": (Experts,)}.get(policy)
            if frozen is not None and isinstance(module, frozen):
                module.requires_grad_(False)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """AdamW groups with `lr_scale`: the head's `head_lr`, and for the backbone `layer_decay` to the power of the
        distance from the top (block i of n: n - 1 - i; embeddings: n), as BEiT fine-tunes."""
        config, depth = self.recipe.train, self.recipe.model.depth
        decays = {id(p) for group in super().parameter_groups(1.0) if group["weight_decay"] for p in group["params"]}  # type: ignore[attr-defined]
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if not name.startswith("backbone."):
                scale = config.head_lr
            elif name.startswith("backbone.blocks."):
                scale = config.layer_decay ** (depth - 1 - int(name.split(".")[2]))
            else:
                scale = config.layer_decay ** (0 if name.startswith("backbone.norm") else depth)
            groups.setdefault((scale, id(parameter) in decays), []).append(parameter)
        return [
            {"params": parameters, "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0}
            for (scale, decayed), parameters in groups.items()
        ]


class Classifier(Downstream):
    """A task that answers with one of `labels`. Subclasses give `logits` and `targets`."""

    main = "accuracy"

    @abstractmethod
    def logits(self, batches: dict[str, Batch]) -> tuple[Tensor, list[BackboneOutput]]:
        """(B, L) scores of the labels, and what the backbone did."""

    def loss(self, logits_BL: Tensor, label_B: Tensor) -> Tensor:
        """Summed over the examples."""
        return F.cross_entropy(logits_BL, label_B, reduction="sum")

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        return logits_BL.softmax(dim=-1)

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        logits_BL, outputs = self.logits(batches)
        label = _labels(batches)
        best_B = label if label.ndim == 1 else label.argmax(dim=-1)
        accuracy = (logits_BL.detach().argmax(dim=-1) == best_B).float().mean()
        return self.output(Summed(self.loss(logits_BL.float(), label), len(label)), outputs, accuracy=accuracy)

    def predictions(self, batches: dict[str, Batch]) -> dict[str, int]:
        return {self.task: len(_labels(batches))} | super().predictions(batches)

    @torch.no_grad()
    def choices(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        return first_choices(item for output in self.logits(batches)[1] for item in output.stats.items())

    @torch.no_grad()
    def predict(self, batches: dict[str, Batch]) -> list[Guess]:
        logits_BL = self.logits(batches)[0].float()
        probability_BL, finite_B = self.probabilities(logits_BL), logits_BL.isfinite().all(dim=-1)
        best = probability_BL.topk(min(SHOWN, probability_BL.shape[1]), dim=-1)
        rows = zip(best.indices.tolist(), best.values.tolist(), finite_B.tolist(), strict=True)
        return [Guess(labels, probabilities, finite) for labels, probabilities, finite in rows]

    def show(self, answer: Guess) -> list[dict[str, Any]]:
        pairs = zip(answer.labels, answer.probabilities, strict=True)
        return [{"answer": self.labels[label], "probability": p} for label, p in pairs]


def _labels(batches: dict[str, Batch]) -> Tensor:
    return next(b.label_B for b in batches.values() if b.label_B is not None)


def first_tokens(output: BackboneOutput) -> Tensor:
    """(B, 2D): the image's class token beside the text's start token; zeros for a part that is not there."""
    present = {segment.modality for segment in output.segments}
    zeros = torch.zeros_like(output.x_BTD[:, 0])
    return torch.cat([output.features(m)[:, 0] if m in present else zeros for m in ("vision", "text")], dim=-1)


def mlp_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """LayerNorm between two linear layers, as BEiT-3's heads for VQA and NLVR2."""
    head = nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return head
