"""Hidden patches put back: in which order, by which codes, and how near they come."""

import pytest
import torch
from torch import Tensor

from tests.evaluate.test_masked import batch
from vlmoe.config import ModelConfig
from vlmoe.data.batch import Batch
from vlmoe.data.visual_tokenizer import StoredCodes
from vlmoe.evaluate.restore import commonest_colour, pixels_of, restoration_scores, restore, spread
from vlmoe.model import BackboneOutput, Segment
from vlmoe.tasks.pretrain import MaskedDataModelling


class Grey:
    """A patch's code is the grey of its first pixel, and so it is drawn."""

    codes = 256

    def encode(self, batch: Batch) -> Tensor:
        assert batch.image_BCHW is not None
        return batch.image_BCHW[:, 0, ::2, ::2].flatten(1).long()

    def targets(self, batch: Batch) -> Tensor:
        return self.encode(batch).flatten()[batch.hidden_patches()]

    def decode(self, codes_BP: Tensor) -> Tensor:
        pixels = codes_BP.unflatten(1, (2, 2)).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return pixels[:, None].expand(-1, 3, -1, -1).to(torch.uint8)


class Counts(MaskedDataModelling):
    """Predicts for every patch one more than the largest grey it is shown, surest of the last patch."""

    def run(self, batch: Batch, *, hide_patches: bool = True) -> BackboneOutput:
        assert batch.image_BCHW is not None and batch.patch_mask_BP is not None
        seen = batch.image_BCHW[:, 0, ::2, ::2].flatten(1).long().masked_fill(batch.patch_mask_BP, 0)
        logits = torch.nn.functional.one_hot(seen.amax(1) + 1, 256).float()[:, None] * torch.arange(1.0, 6.0)[:, None]
        return BackboneOutput(logits, (Segment("vision", slice(0, 5)),), None, {})


def model() -> Counts:
    config = ModelConfig(
        width=8, depth=1, heads=1, image_size=4, patch=2, max_text=4, vocabulary=8, codes=256, vl_ffn=0
    )
    counts = Counts(config, Grey())
    counts.image_head = torch.nn.Identity()  # type: ignore[assignment]
    return counts


def picture(*patches: int) -> Tensor:
    return Grey().decode(torch.tensor([patches]))


def test_the_surest_patch_first_and_the_others_see_it() -> None:
    hidden = Batch(["a"], picture(9, 77, 77, 77), torch.tensor([[False, True, True, True]]))
    filled = restore(model(), hidden, passes=3)
    assert filled is not None
    assert torch.equal(filled, picture(9, 12, 11, 10))
    assert torch.equal(restore(model(), hidden, passes=1), picture(9, 10, 10, 10))  # type: ignore[arg-type]
    assert torch.equal(restore(model(), hidden, passes=2), picture(9, 11, 10, 10))  # type: ignore[arg-type]


def test_codes_without_pixels_restore_nothing() -> None:
    stored = MaskedDataModelling(model().config, StoredCodes(256))
    assert restore(stored, batch()) is None
    assert restoration_scores(stored, [batch()]) is None


def test_only_hidden_patches_that_show_something_are_scored() -> None:
    image = picture(250, 250, 0, 250)
    image[..., 3, 1] = 102  # the third patch: one of four pixels is lighter
    hidden = Batch(["a"], image, torch.tensor([[False, False, True, True]]))
    assert spread(image, 4).tolist() == [[0, 0, 102, 0]]
    scores = restoration_scores(model(), [hidden])
    assert scores is not None
    plain = (3 * 250**2 + 148**2) / 4 / 255**2  # the visible patches are of 250
    assert scores["plain"] == pytest.approx(plain)
    restored = restore(model(), hidden)
    assert restored is not None
    error = ((restored[..., 2:, :2].float() - image[..., 2:, :2].float()) / 255).square().mean().item()
    assert scores["error"] == pytest.approx(error)
    assert scores["explained"] == pytest.approx(1 - error / plain, abs=1e-6)


def test_masks_and_colours_of_pixels() -> None:
    assert pixels_of(torch.tensor([[False, True, False, False]]), picture(0, 0, 0, 0))[0, 0].int().tolist() == [
        [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    image = picture(5, 6, 6, 5)
    shown = pixels_of(torch.tensor([[False, True, True, True]]), image)
    assert commonest_colour(image, shown).flatten().tolist() == [6, 6, 6]
