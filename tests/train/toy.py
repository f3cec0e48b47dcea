"""A task and data small enough to train in milliseconds, with dropout so that random numbers matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vlmoe.config import Recipe, from_mapping
from vlmoe.data.batch import Batch
from vlmoe.data.loader import Step
from vlmoe.tasks.base import StepOutput, Summed, Task

VOCABULARY = 12


class ToyTask(Task):
    """Predicts the sum of two tokens; the output matrix is the embedding's (tied), dropout needs the generator."""

    def __init__(self, dropout: float = 0.2, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.hidden = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.embed.weight

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        text_BT, target_B = self._read(batches)
        x_BD = self.drop(torch.tanh(self.hidden(self.embed(text_BT).flatten(1))))
        logits_BV = self.head(x_BD)
        loss = F.cross_entropy(logits_BV, target_B)
        accuracy = (logits_BV.argmax(-1) == target_B).float().mean()
        load_E = torch.bincount(text_BT.flatten() % 4, minlength=4)
        metrics = {"text/mlm": loss.detach(), "text/mlm_accuracy": accuracy}
        losses = {"mlm": Summed(loss * len(target_B), len(target_B))}
        return StepOutput(losses, metrics, {"1/text": load_E, "3/vision": load_E[:2]})

    def predictions(self, batches: dict[str, Batch]) -> dict[str, int]:
        return {"mlm": len(self._read(batches)[1])}

    def tokens(self, batches: dict[str, Batch]) -> int:
        return self._read(batches)[0].numel()

    @staticmethod
    def _read(batches: dict[str, Batch]) -> tuple[Tensor, Tensor]:
        batch = batches["text"]
        assert batch.text_BT is not None
        assert batch.target_BT is not None
        return batch.text_BT, batch.target_BT[:, 0]


class ToyData(Dataset[Step]):
    """Item n is a pure function of (seed, n). bad: micro-steps with a sample that had to be skipped."""

    def __init__(self, seed: int = 0, batch: int = 4, bad: frozenset[int] = frozenset()) -> None:
        self.seed, self.batch, self.bad = seed, batch, bad

    def __getitem__(self, n: int) -> Step:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + n)
        text_BT = torch.randint(VOCABULARY // 2, (self.batch, 2), generator=generator)
        batch = Batch(
            keys=[f"{n}/{i}" for i in range(self.batch)], text_BT=text_BT, target_BT=text_BT.sum(1, keepdim=True)
        )
        bad = [(f"broken-{n}", "not an image")] if n in self.bad else []
        return Step({"text": batch}, bad, self.batch + len(bad))


def toy_recipe(run_dir: Path | str, **train: Any) -> Recipe:
    """Six steps on the CPU, a checkpoint every two, unless said otherwise."""
    settings = {
        "steps": 6, "warmup": 2, "lr": 0.05, "checkpoint_every": 2, "device": "cpu", "accumulate": 1, **train
    }  # fmt: skip
    return from_mapping(
        {"name": "toy", "run": {"dir": str(run_dir)}, "train": settings, "data": {"workers": 0, "max_bad_share": 0.5}}
    )


def toy_task(seed: int = 0, **options: Any) -> ToyTask:
    torch.manual_seed(seed)
    return ToyTask(**options)
