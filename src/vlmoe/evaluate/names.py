"""What is it called? A thing's whole name told from its picture, every word of it hidden and nothing else.

Shape suffixes: B batch · T text tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch

from vlmoe.config import MaskingConfig
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.evaluate.masked import VIEWS, Tally, fill_in, with_others_images
from vlmoe.tasks.pretrain import MaskedDataModelling

SHOWS = {  # what each split of the world asks: recall first, then what training never shows
    "val": "recall: known things in new scenes",
    "handwriting": "digits by hands never shown",
    "font": "known characters in a typeface never shown",
    "attributes": "known things in colours they never had",
    "drawing": "known things in drawings never shown",
    "unseen": "things never shown nor named",
}
NAMING = frozenset({"kind", "name"})  # word classes that together are a name: "digit" and "seven"


def asked_classes(masking: MaskingConfig) -> frozenset[str]:
    """What is hidden together to ask for a thing: the words that training hides, or else its name."""
    return frozenset(masking.words) or NAMING


def hide_names(batch: Batch, mask_id: int, classes: Collection[str] = NAMING) -> Batch | None:
    """The batch with the whole name of one thing hidden in every text, the first that is named, and nothing else.

    classes: word classes that are hidden together instead of a name, for example those that training asks.

    Texts that name nothing are left out; None where none of them does, or the data does not know its words' classes.
    """
    assert batch.text_BT is not None and batch.target_BT is not None and batch.image_BCHW is not None
    hidden_BT = torch.zeros_like(batch.target_BT, dtype=torch.bool)
    for b, factors in enumerate(batch.token_factors):
        found = factors.get("word_class", [])
        named = [t for t, word_class in enumerate(found) if word_class in classes]
        things = factors.get("object", [""] * len(found))
        for t in named:
            hidden_BT[b, t] = things[t] == things[named[0]]
    kept_B = hidden_BT.any(dim=1).nonzero().flatten()
    if not len(kept_B):
        return None
    text_BT = batch.text_BT.where(batch.target_BT == IGNORE, batch.target_BT)
    hidden_BT = hidden_BT.to(text_BT.device)
    return replace(
        batch,
        keys=[batch.keys[b] for b in kept_B.tolist()],
        image_BCHW=batch.image_BCHW[kept_B],
        patch_mask_BP=None if batch.patch_mask_BP is None else batch.patch_mask_BP[kept_B],
        codes_BP=None if batch.codes_BP is None else batch.codes_BP[kept_B],
        text_BT=text_BT.masked_fill(hidden_BT, mask_id)[kept_B],
        target_BT=text_BT.masked_fill(~hidden_BT, IGNORE)[kept_B],
        valid_BT=None if batch.valid_BT is None else batch.valid_BT[kept_B],
        hidden_patch_M=None,
        hidden_token_M=None,
        patch_factors=[],
        token_factors=[],
    )


def name_scores(
    model: MaskedDataModelling, batches: Iterable[Batch], mask_id: int, classes: Collection[str] = NAMING
) -> dict[str, Any] | None:
    """Share of whole names that are right in every token, for each view; `names`: how many different ones were asked;
    `chance`: one over that. None where the data does not know which words are names."""
    tallies, asked = {view: Tally() for view in VIEWS}, set[tuple[int, ...]]()
    hidden = (hide_names(batch, mask_id, classes) for batch in batches)
    for batch, other_BCHW in with_others_images(b for b in hidden if b is not None):
        assert batch.target_BT is not None
        hidden_BT = batch.target_BT != IGNORE
        for view in VIEWS:
            right_B = ((fill_in(model, batch, view, other_BCHW) == batch.target_BT) | ~hidden_BT).all(dim=1)
            for right in right_B.tolist():
                tallies[view].add(int(right), 1)
        asked |= {tuple(t for t in row if t != IGNORE) for row in batch.target_BT.tolist()}
    if not asked:
        return None
    return {view: tally.summary() for view, tally in tallies.items()} | {"names": len(asked), "chance": 1 / len(asked)}
