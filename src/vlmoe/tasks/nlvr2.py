"""NLVR2: is a sentence true of two images? Each image passes with the sentence; both passes together are judged
(as in BEiT-3).

Shape suffixes: B batch · D width · L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmoe.config import FinetuneRecipe
from vlmoe.data.batch import Batch
from vlmoe.data.downstream.collate import Prepare, label_numbers
from vlmoe.data.downstream.example import Example
from vlmoe.metrics import Score, consistency, mean_score
from vlmoe.model import BackboneOutput
from vlmoe.tasks.downstream import Classifier, Guess, first_tokens, mlp_head
from vlmoe.tasks.majority import majority


class NLVR2(Classifier):
    task = "nlvr2"
    swaps = "image"

    def __init__(self, recipe: FinetuneRecipe, labels: tuple[str, ...]) -> None:
        super().__init__(recipe, labels)
        width = recipe.model.width
        self.head = mlp_head(4 * width, 2 * width, len(labels))

    @staticmethod
    def collate(
        prepare: Prepare, recipe: FinetuneRecipe, labels: tuple[str, ...],
        examples: list[Example], rngs: list[np.random.Generator], training: bool,
    ) -> dict[str, Batch]:  # fmt: skip
        texts, keys = [e.text or "" for e in examples], [e.key for e in examples]
        left = prepare.pairs([e.images[0] for e in examples], texts, keys)
        right = prepare.pairs([e.images[1] for e in examples], texts, keys)
        left.label_B = label_numbers(examples)
        return {"left": left, "right": right}

    def logits(self, batches: dict[str, Batch]) -> tuple[Tensor, list[BackboneOutput]]:
        outputs = [self.run(batches["left"]), self.run(batches["right"])]
        return self.head(torch.cat([first_tokens(output) for output in outputs], dim=-1)), outputs

    def score(self, answers: Sequence[Guess], examples: Sequence[Example]) -> dict[str, Score]:
        known = [(a, e) for a, e in zip(answers, examples, strict=True) if e.label is not None]
        right = [a.labels[0] == e.label for a, e in known]
        groups = [e.group or e.key for _, e in known]
        return {"accuracy": mean_score(right, groups), "consistency": consistency(right, groups)}

    def guess(self, examples: Sequence[Example]) -> dict[str, Score]:
        return {"accuracy": majority(examples)}
