"""Validation of a pre-training run while it trains: losses on what its data hold out, with intervals."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlmoe.config import Recipe
from vlmoe.data.batch import Batch
from vlmoe.data.loader import held_out, held_out_size
from vlmoe.data.sample import KINDS
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.metrics import Score
from vlmoe.tasks.base import Task
from vlmoe.tasks.held_out import FEW, WIDE, held_out_losses, too_wide
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.judge import Judged, Validation

SPLIT = "val"


def held_out_validation(recipe: Recipe, tokenizer: TextTokenizer, device: torch.device) -> Validation | None:
    """What `eval.every` asks for, None where it is 0. It scores the first `eval.samples` held-out samples of each kind,
    the same each time and for every run, and leaves the run as it is: no weights are chosen by it.

    Raises UserError when a source cannot be opened or a kind holds nothing out.
    """
    if not recipe.eval.every:
        return None
    kinds = [kind for kind in KINDS if getattr(recipe.data.batch, kind)]
    sizes = {kind: min(recipe.eval.samples, held_out_size(recipe, SPLIT, kind)) for kind in kinds}

    def batches() -> Iterator[tuple[str, Batch]]:
        for kind, size in sizes.items():
            for start in range(0, size, recipe.eval.batch):
                count = min(recipe.eval.batch, size - start)
                yield kind, held_out(recipe, tokenizer, SPLIT, kind, start, count).to(device)

    def judge(task: Task) -> Judged:
        assert isinstance(task, MaskedDataModelling)
        scores = held_out_losses(task, batches())
        said = ", ".join(f"{name} {_shown(score)}" for name, score in scores.items())
        return Judged(
            -sum(score.value for score in scores.values()), scores, f"held-out loss: {said}", _warning(scores)
        )

    return Validation(judge, every=recipe.eval.every, keep_best=False)


def _shown(score: Score) -> str:
    return f"{score.value:.3f}" + ("" if score.interval is None else " [{:.3f}, {:.3f}]".format(*score.interval))


def _warning(scores: dict[str, Score]) -> str:
    wide = [f"{name} on {score.n} samples" for name, score in scores.items() if too_wide(score)]
    if not wide:
        return ""
    return (
        f"too few held-out samples to tell much by: {', '.join(wide)} (fewer than {FEW} samples, or an interval wider "
        f"than {WIDE:.0%} of the loss); hold out more (held_out of data.sources) or score more (eval.samples)"
    )
