"""Natural language inference (MNLI): does a premise entail a hypothesis, contradict it, or neither? Text alone.

Shape suffixes: B batch · L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vlmoe.config import FinetuneRecipe
from vlmoe.data.batch import Batch
from vlmoe.data.downstream.collate import Prepare, label_numbers
from vlmoe.data.downstream.example import Example
from vlmoe.metrics import Score, mean_score
from vlmoe.model import BackboneOutput
from vlmoe.tasks.downstream import Classifier, Guess, mlp_head
from vlmoe.tasks.majority import majority


class NLI(Classifier):
    task = "nli"
    swaps = "text"  # the premise

    def __init__(self, recipe: FinetuneRecipe, labels: tuple[str, ...]) -> None:
        super().__init__(recipe, labels)
        width = recipe.model.width
        self.head = mlp_head(width, 2 * width, len(labels))

    @staticmethod
    def collate(
        prepare: Prepare, recipe: FinetuneRecipe, labels: tuple[str, ...],
        examples: list[Example], rngs: list[np.random.Generator], training: bool,
    ) -> dict[str, Batch]:  # fmt: skip
        premises, hypotheses = [e.text or "" for e in examples], [e.text_pair or "" for e in examples]
        batch = prepare.two_texts(premises, hypotheses, [e.key for e in examples])
        batch.label_B = label_numbers(examples)
        return {"text": batch}

    def logits(self, batches: dict[str, Batch]) -> tuple[Tensor, list[BackboneOutput]]:
        output = self.run(batches["text"])
        return self.head(output.features("text")[:, 0]), [output]

    def score(self, answers: Sequence[Guess], examples: Sequence[Example]) -> dict[str, Score]:
        known = [(a, e) for a, e in zip(answers, examples, strict=True) if e.label is not None]
        return {"accuracy": mean_score([a.labels[0] == e.label for a, e in known])}

    def guess(self, examples: Sequence[Example]) -> dict[str, Score]:
        return {"accuracy": majority(examples)}
