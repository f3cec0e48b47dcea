"""Visual question answering: classification over the answers that can be given, with soft scores (VQAv2; BEiT-3).

Shape suffixes: B batch · L answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmoe.config import FinetuneRecipe
from vlmoe.data.batch import Batch
from vlmoe.data.downstream.collate import Prepare
from vlmoe.data.downstream.example import Example
from vlmoe.metrics import Score, mean_score, soft_scores, vqa_accuracy
from vlmoe.model import BackboneOutput
from vlmoe.tasks.downstream import Classifier, Guess, first_tokens, mlp_head


class VQA(Classifier):
    """Each answer is a yes-or-no question to the head: binary cross-entropy against the share of annotators that an
    answer agrees with."""

    task = "vqa"
    swaps = "image"

    def __init__(self, recipe: FinetuneRecipe, labels: tuple[str, ...]) -> None:
        super().__init__(recipe, labels)
        width = recipe.model.width
        self.head = mlp_head(2 * width, 2 * width, len(labels))

    @staticmethod
    def collate(
        prepare: Prepare, recipe: FinetuneRecipe, labels: tuple[str, ...],
        examples: list[Example], rngs: list[np.random.Generator], training: bool,
    ) -> dict[str, Batch]:  # fmt: skip
        batch = prepare.pairs(_images(examples), [e.text or "" for e in examples], [e.key for e in examples])
        number = {answer: i for i, answer in enumerate(labels)}
        batch.label_B = torch.zeros(len(examples), len(labels))
        for b, example in enumerate(examples):
            for answer, score in soft_scores(example.references, example.exact).items():
                if answer in number:
                    batch.label_B[b, number[answer]] = score
        return {"pair": batch}

    def logits(self, batches: dict[str, Batch]) -> tuple[Tensor, list[BackboneOutput]]:
        output = self.run(batches["pair"])
        return self.head(first_tokens(output)), [output]

    def loss(self, logits_BL: Tensor, label_BL: Tensor) -> Tensor:
        """Summed over the answers, so that its size does not hang on how many there are, and over the examples."""
        return F.binary_cross_entropy_with_logits(logits_BL, label_BL, reduction="sum")

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        return logits_BL.sigmoid()

    def score(self, answers: Sequence[Guess], examples: Sequence[Example]) -> dict[str, Score]:
        values = [
            vqa_accuracy(self.labels[a.labels[0]], e.references, e.exact)
            for a, e in zip(answers, examples, strict=True)
            if e.references
        ]
        return {"accuracy": mean_score(values)}

    def guess(self, examples: Sequence[Example]) -> dict[str, Score]:
        """The answer that fits most examples."""
        known = [e for e in examples if e.references]
        total: dict[str, float] = {}
        for example in known:
            for answer, score in soft_scores(example.references, example.exact).items():
                total[answer] = total.get(answer, 0.0) + score
        best = max(total, key=lambda answer: total[answer], default="")
        return {"accuracy": mean_score([vqa_accuracy(best, e.references, e.exact) for e in known])}


def _images(examples: Sequence[Example]) -> list[np.ndarray]:
    return [e.images[0] for e in examples]
