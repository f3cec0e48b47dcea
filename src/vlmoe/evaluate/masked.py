"""Held-out masked prediction: what a pre-trained model fills in, with the image, without it and with a wrong one.

Shape suffixes: B batch · P patches · T text tokens · M hidden positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmoe.data.batch import IGNORE, Batch
from vlmoe.tasks.finite import first_choice
from vlmoe.tasks.pretrain import MaskedDataModelling, hides_patches, summarise_routing

VIEWS = ("seen", "blind", "swapped")
RESAMPLES = 1000


@dataclass
class Tally:
    """Right answers and questions, sample by sample, so that an interval can be drawn over samples."""

    right: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def add(self, right: int, asked: int) -> None:
        if asked:
            self.right.append(right)
            self.asked.append(asked)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / max(sum(self.asked), 1)

    def summary(self) -> dict[str, Any]:
        """Accuracy, its 95% bootstrap interval over samples (fixed resampling seed) and the number of predictions."""
        right, asked = np.array(self.right), np.array(self.asked)
        if not len(asked):
            return {"accuracy": float("nan"), "interval": [float("nan")] * 2, "predictions": 0}
        pick = np.random.default_rng(0).integers(len(asked), size=(RESAMPLES, len(asked)))
        low, high = np.quantile(right[pick].sum(1) / asked[pick].sum(1), [0.025, 0.975])
        return {"accuracy": self.accuracy, "interval": [float(low), float(high)], "predictions": int(asked.sum())}


def with_others_images(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with the images of other samples: of those half of all samples further on, whatever the size of the
    batches, since neighbours in a file often show the same thing."""
    kept = list(batches)
    images = [batch.image_BCHW for batch in kept if batch.image_BCHW is not None]
    assert len(images) == len(kept)
    if not kept:
        return
    others = torch.cat(images).roll(-(sum(map(len, images)) // 2), dims=0)
    yield from zip(kept, others.split([len(batch) for batch in kept]), strict=True)


def view_of(batch: Batch, view: str, other_BCHW: Tensor | None = None) -> Batch:
    """The batch as one of VIEWS: with its own images, with none, or with others'."""
    if view == "blind":
        return replace(batch, image_BCHW=None, patch_mask_BP=None, codes_BP=None)
    if view == "swapped":
        assert other_BCHW is not None
        return replace(batch, image_BCHW=other_BCHW)
    return batch


@torch.no_grad()
def fill_in(model: MaskedDataModelling, batch: Batch, view: str = "seen", other_BCHW: Tensor | None = None) -> Tensor:
    """text_BT with every hidden token replaced by the first choice; images are shown whole. Raises NotFinite."""
    assert batch.text_BT is not None and batch.target_BT is not None
    hidden_BT = batch.target_BT != IGNORE
    x_MD = model.run(view_of(batch, view, other_BCHW), hide_patches=False).features("text")[hidden_BT]
    filled_BT = batch.text_BT.clone()
    filled_BT[hidden_BT] = first_choice(model.text_logits(x_MD), "hidden words' predictions")
    return filled_BT


def text_scores(model: MaskedDataModelling, batches: Iterable[Batch]) -> dict[str, Any]:
    """Accuracy on the hidden text of pairs for each view, also by word class where the data knows it.

    `gap`: accuracy with the image less the better of the two accuracies without it, in points.
    """
    tallies = {view: Tally() for view in VIEWS}
    classes: dict[str, dict[str, Tally]] = {}
    for batch, other_BCHW in with_others_images(batches):
        assert batch.target_BT is not None
        hidden_BT = batch.target_BT != IGNORE
        for view in VIEWS:
            right_BT = (fill_in(model, batch, view, other_BCHW) == batch.target_BT) & hidden_BT
            for word, right, asked in _counts(batch, right_BT, hidden_BT):
                tally = classes.setdefault(word, {v: Tally() for v in VIEWS}) if word else tallies
                tally[view].add(right, asked)
    without = max(tallies["blind"].accuracy, tallies["swapped"].accuracy)
    return {
        **{view: tally.summary() for view, tally in tallies.items()},
        "gap": 100 * (tallies["seen"].accuracy - without),
        "by_word_class": {
            word: {view: tally.accuracy for view, tally in views.items()} | {"predictions": sum(views["seen"].asked)}
            for word, views in sorted(classes.items())
        },
    }


@torch.no_grad()
def text_alone_scores(model: MaskedDataModelling, batches: Iterable[Batch]) -> dict[str, Any]:
    """Accuracy on the hidden text of texts alone, beside the share of the most frequent token (the majority guess), and
    the loss."""
    tally, tokens, kept = Tally(), Counter[int](), list(batches)
    for batch in kept:
        assert batch.target_BT is not None
        hidden_BT = batch.target_BT != IGNORE
        right_BT = (fill_in(model, batch) == batch.target_BT) & hidden_BT
        for right, asked in zip(right_BT.sum(1).tolist(), hidden_BT.sum(1).tolist(), strict=True):
            tally.add(right, asked)
        tokens.update(batch.target_BT[hidden_BT].tolist())
    majority = max(tokens.values()) / sum(tokens.values())
    return tally.summary() | {"majority": majority, "loss": losses(model, kept)["mlm"]}


def words_right(model: MaskedDataModelling, batches: Iterable[Batch]) -> dict[str, float]:
    """Accuracy on the hidden words of texts alone, by word class; the data must know it."""
    classes: dict[str, Tally] = {}
    for batch in batches:
        assert batch.target_BT is not None
        hidden_BT = batch.target_BT != IGNORE
        right_BT = (fill_in(model, batch) == batch.target_BT) & hidden_BT
        for word, right, asked in _counts(batch, right_BT, hidden_BT):
            if word:
                classes.setdefault(word, Tally()).add(right, asked)
    return {word: tally.accuracy for word, tally in sorted(classes.items())}


def _counts(batch: Batch, right_BT: Tensor, hidden_BT: Tensor) -> Iterator[tuple[str, int, int]]:
    """Of each sample: right and hidden tokens, in all ("") and of each word class where the data knows it."""
    for b, (right_T, hidden_T) in enumerate(zip(right_BT.tolist(), hidden_BT.tolist(), strict=True)):
        yield "", sum(right_T), sum(hidden_T)
        words = batch.token_factors[b].get("word_class", []) if batch.token_factors else []
        asked, correct = Counter[str](), Counter[str]()
        for word, hidden, right in zip(words, hidden_T, right_T, strict=False):
            if hidden and word:
                asked[word] += 1
                correct[word] += right
        for word, n in asked.items():
            yield word, correct[word], n


@torch.no_grad()
def image_scores(model: MaskedDataModelling, batches: Iterable[Batch]) -> dict[str, Any]:
    """Accuracy on the codes of hidden patches, beside the share of the most frequent code (the majority guess). Raises
    NotFinite."""
    tally, codes = Tally(), Counter[int]()
    for batch in filter(hides_patches, batches):
        assert batch.patch_mask_BP is not None and model.visual_tokenizer is not None
        target_BP = model.visual_tokenizer.encode(batch)
        logits_BPV = model.image_head(model.run(batch).features("vision")[:, 1:])
        guess_BP = first_choice(logits_BPV, "patches' predictions")
        right_BP = (guess_BP == target_BP) & batch.patch_mask_BP
        for right, asked in zip(right_BP.sum(1).tolist(), batch.patch_mask_BP.sum(1).tolist(), strict=True):
            tally.add(right, asked)
        codes.update(target_BP[batch.patch_mask_BP].tolist())
    majority = max(codes.values(), default=0) / max(sum(codes.values()), 1)
    return tally.summary() | {"majority": majority, "codes_in_use": len(codes)}


@torch.no_grad()
def losses(model: MaskedDataModelling, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy, in nats, of hidden words and of hidden patches' codes, hidden as in training; their sum."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        for name, loss in model.losses(batch).items():
            sums[name] = sums.get(name, 0.0) + loss.total.item()
            counts[name] = counts.get(name, 0) + int(loss.count)
    means = {name: sums[name] / max(counts[name], 1) for name in sums}
    return means | {"sum": sum(means.values())}


@torch.no_grad()
def expert_use(model: MaskedDataModelling, batches: Iterable[Batch]) -> dict[str, dict[str, Any]]:
    """ "block/modality" -> share of the assignments each expert took, largest over mean load, idle experts."""
    routed = [item for batch in batches for item in model.run(batch).stats.items()]
    table: dict[str, dict[str, Any]] = {}
    for name, load_E in summarise_routing(routed).load.items():
        share_E = (load_E / load_E.sum().clamp_min(1)).cpu()
        table[name] = {
            "share": [round(s, 4) for s in share_E.tolist()],
            "max_over_mean": float(share_E.max() * len(share_E)),
            "idle": int((load_E == 0).sum()),
        }
    return table
