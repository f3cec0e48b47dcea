"""Hidden patches put back into a picture, and how near to the true ones they come.

Shape suffixes: B batch · P patches · H, W pixels · V codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from vlmoe.data.batch import Batch
from vlmoe.tasks.finite import first_choice
from vlmoe.tasks.pretrain import MaskedDataModelling, hides_patches

PASSES = 4
PLAIN = 2  # a patch whose values of each colour differ by at most this shows nothing


@torch.no_grad()
def restore(model: MaskedDataModelling, batch: Batch, passes: int = PASSES) -> Tensor | None:
    """The pictures with their hidden patches filled in, uint8 (B, 3, H, W); None where codes have no pixels.

    In several passes, as in MaskGIT (Chang et al. 2022): each pass keeps the surest of the patches that are left, and
    the next one sees them. Chosen all at once they would not know of each other, and a stroke would go on into
    nothing. The visual tokenizer draws them beside the codes of the patches that were never hidden. Raises NotFinite.
    """
    assert batch.image_BCHW is not None and batch.patch_mask_BP is not None and model.visual_tokenizer is not None
    codes_BP = model.visual_tokenizer.encode(batch)
    left_BP, image_BCHW = batch.patch_mask_BP, batch.image_BCHW
    for number in range(passes):
        seen = replace(batch, image_BCHW=image_BCHW, patch_mask_BP=left_BP, hidden_patch_M=None)
        logits_BPV = model.image_head(model.run(seen).features("vision")[:, 1:]).float()
        guess_BP = first_choice(logits_BPV, "patches' predictions")
        codes_BP = torch.where(left_BP, guess_BP, codes_BP)
        drawn_BCHW = model.visual_tokenizer.decode(codes_BP)
        if drawn_BCHW is None:
            return None
        sure_BP = logits_BPV.softmax(-1).amax(-1).masked_fill(~left_BP, -1)
        rank_BP = sure_BP.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count_B1 = (left_BP.sum(dim=1, keepdim=True) / (passes - number)).ceil()
        chosen_BP = left_BP & (rank_BP < count_B1)
        image_BCHW = image_BCHW.where(~pixels_of(chosen_BP, batch.image_BCHW), drawn_BCHW)
        left_BP = left_BP & ~chosen_BP
    return image_BCHW


def pixels_of(mask_BP: Tensor, image_BCHW: Tensor) -> Tensor:
    """A mask of patches as one of pixels, bool (B, 1, H, W)."""
    side = math.isqrt(mask_BP.shape[1])
    patch = image_BCHW.shape[-1] // side
    mask_BHW = mask_BP.unflatten(1, (side, side)).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return mask_BHW[:, None]


def restoration_scores(model: MaskedDataModelling, batches: Iterable[Batch]) -> dict[str, float] | None:
    """Of hidden patches that show something: mean squared error of the restored pixels, in units of white; that of
    filling them with the picture's commonest visible colour; and what is explained beyond that, one less their ratio.
    None where no such patch is hidden or codes have no pixels."""
    error = plain = count = 0.0
    for batch in filter(hides_patches, batches):
        filled_BCHW = restore(model, batch)
        if filled_BCHW is None:
            return None
        assert batch.image_BCHW is not None and batch.patch_mask_BP is not None
        truth_BCHW = batch.image_BCHW
        ground_BC11 = commonest_colour(truth_BCHW, ~pixels_of(batch.patch_mask_BP, truth_BCHW))
        shows_BP = batch.patch_mask_BP & (spread(truth_BCHW, batch.patch_mask_BP.shape[1]) > PLAIN)
        asked = pixels_of(shows_BP, truth_BCHW)
        error += _error(filled_BCHW, truth_BCHW, asked)
        plain += _error(ground_BC11, truth_BCHW, asked)
        count += float(asked.sum())
    if not count:
        return None
    return {"error": error / count, "plain": plain / count, "explained": 1 - error / max(plain, 1e-12)}


def _error(guess_BCHW: Tensor, truth_BCHW: Tensor, asked_B1HW: Tensor) -> float:
    squared_BCHW = ((guess_BCHW.float() - truth_BCHW.float()) / 255).square()
    return float((squared_BCHW.mean(1, keepdim=True) * asked_B1HW).sum())


def commonest_colour(image_BCHW: Tensor, shown_B1HW: Tensor) -> Tensor:
    """Of each picture's shown pixels, (B, 3, 1, 1)."""
    found = []
    for image_CHW, shown_1HW in zip(image_BCHW, shown_B1HW, strict=True):
        colours, counts = image_CHW[:, shown_1HW[0]].unique(dim=1, return_counts=True)
        found.append(colours[:, counts.argmax()])
    return torch.stack(found)[:, :, None, None]


def spread(image_BCHW: Tensor, patches: int) -> Tensor:
    """By how much the values of a patch differ, the colour of which they differ most, (B, P)."""
    side = math.isqrt(patches)
    patch = image_BCHW.shape[-1] // side
    x = image_BCHW.int().unflatten(3, (side, patch)).unflatten(2, (side, patch))  # B C rows y columns x
    return (x.amax((3, 5)) - x.amin((3, 5))).amax(1).flatten(1)
