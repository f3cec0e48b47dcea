"""Image classification: the mean of the patches' features, a norm and a linear layer (BEiT-3 on ImageNet).

Shape suffixes: B batch · L classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from vlmoe.config import FinetuneRecipe
from vlmoe.data.batch import Batch
from vlmoe.data.downstream.collate import Prepare, label_numbers
from vlmoe.data.downstream.example import Example
from vlmoe.metrics import Score, mean_score
from vlmoe.model import BackboneOutput
from vlmoe.tasks.downstream import Classifier, Guess
from vlmoe.tasks.majority import majority


class Classify(Classifier):
    task = "classify"

    def __init__(self, recipe: FinetuneRecipe, labels: tuple[str, ...]) -> None:
        super().__init__(recipe, labels)
        self.norm = nn.LayerNorm(recipe.model.width)
        self.head = nn.Linear(recipe.model.width, len(labels))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def collate(
        prepare: Prepare, recipe: FinetuneRecipe, labels: tuple[str, ...],
        examples: list[Example], rngs: list[np.random.Generator], training: bool,
    ) -> dict[str, Batch]:  # fmt: skip
        batch = prepare.images([e.images[0] for e in examples], [e.key for e in examples])
        batch.label_B = label_numbers(examples)
        return {"image": batch}

    def logits(self, batches: dict[str, Batch]) -> tuple[Tensor, list[BackboneOutput]]:
        output = self.run(batches["image"])
        return self.head(self.norm(output.features("vision")[:, 1:].mean(dim=1))), [output]

    def score(self, answers: Sequence[Guess], examples: Sequence[Example]) -> dict[str, Score]:
        """Top-1 ("accuracy") and top-5 accuracy."""
        known = [(a, e) for a, e in zip(answers, examples, strict=True) if e.label is not None]
        return {
            "accuracy": mean_score([a.labels[0] == e.label for a, e in known]),
            "top5": mean_score([e.label in a.labels[:5] for a, e in known]),
        }

    def guess(self, examples: Sequence[Example]) -> dict[str, Score]:
        return {"accuracy": majority(examples)}
