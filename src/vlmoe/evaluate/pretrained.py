"""All held-out scores of a pre-trained model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from vlmoe.config import UserError
from vlmoe.data.batch import Batch
from vlmoe.evaluate.masked import expert_use, image_scores, losses, text_alone_scores, text_scores
from vlmoe.evaluate.names import NAMING, name_scores
from vlmoe.evaluate.restore import restoration_scores
from vlmoe.tasks.finite import NotFinite
from vlmoe.tasks.pretrain import MaskedDataModelling


def evaluate_masked(
    model: MaskedDataModelling,
    batches_of: Callable[[str, str], Iterable[Batch]],
    splits: Iterable[str],
    kinds: Iterable[str],
    mask_id: int,
    asked: Collection[str] = NAMING,
) -> dict[str, Any]:
    """All scores of a pre-trained model.

    batches_of(split, kind): held-out batches on the model's device. mask_id: the token that stands for a hidden one.
    asked: word classes of what a thing is asked by, see `names.asked_classes`.
    The loss is that of pairs.
    Returns {"splits": {split: scores}, "experts": …}.

    Raises UserError: predictions of a split are nan or infinite.
    """
    was_training = model.training
    model.eval()
    kinds = tuple(kinds)
    try:
        report: dict[str, dict[str, Any]] = {}
        splits = tuple(splits)
        for split in splits:
            scores: dict[str, Any] = {}
            if "pair" in kinds:
                scores["text"] = text_scores(model, batches_of(split, "pair"))
                if names := name_scores(model, batches_of(split, "pair"), mask_id, asked):
                    scores["names"] = names
                image = image_scores(model, batches_of(split, "pair"))
                if image["predictions"]:
                    scores["image"] = image
                if restored := restoration_scores(model, batches_of(split, "pair")):
                    scores["restored"] = restored
                scores["loss"] = losses(model, batches_of(split, "pair"))
            if "image" in kinds:
                scores["image_alone"] = image_scores(model, batches_of(split, "image"))
            if "text" in kinds:
                scores["text_alone"] = text_alone_scores(model, batches_of(split, "text"))
            report[split] = scores
        looked = tuple(kind for kind in kinds if kind != "text") or kinds  # texts alone only where there is no image
        experts = expert_use(model, (batch for kind in looked for batch in batches_of(splits[0], kind)))
    except NotFinite as error:
        raise UserError(f"split {split}: {error}") from None
    finally:
        model.train(was_training)
    return {"splits": report, "experts": experts}
