"""Held-out scores by hand, on a model whose answers are known."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlmoe.config import ModelConfig
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.visual_tokenizer import StoredCodes
from vlmoe.evaluate.masked import (
    Tally,
    expert_use,
    fill_in,
    image_scores,
    text_scores,
    with_others_images,
    words_right,
)
from vlmoe.evaluate.pretrained import evaluate_masked
from vlmoe.model import BackboneOutput, Segment
from vlmoe.tasks.pretrain import MaskedDataModelling

MASK = 1


class Reader(MaskedDataModelling):
    """Answers hidden words with the number in its image's first pixel, and with 2 when it sees none; answers hidden
    patches with 3."""

    def run(self, batch: Batch, *, hide_patches: bool = True) -> BackboneOutput:
        size = len(batch)
        answer = torch.full((size,), 2) if batch.image_BCHW is None else batch.image_BCHW[:, 0, 0, 0].long()
        parts: list[Tensor] = []
        segments: list[Segment] = []
        if batch.image_BCHW is not None:
            parts.append(torch.full((size, 5), 3))
            segments.append(Segment("vision", slice(0, 5)))
        if batch.text_BT is not None:
            start = 5 if segments else 0
            parts.append(answer[:, None].expand(size, batch.text_BT.shape[1]))
            segments.append(Segment("text", slice(start, start + batch.text_BT.shape[1])))
        x_BTD = torch.nn.functional.one_hot(torch.cat(parts, dim=1), self.config.width).float()
        return BackboneOutput(x_BTD, tuple(segments), None, {})

    def text_logits(self, x_MD: Tensor) -> Tensor:
        return x_MD


def reader() -> Reader:
    config = ModelConfig(width=8, depth=1, heads=1, image_size=4, patch=2, max_text=4, vocabulary=8, codes=8, vl_ffn=0)
    model = Reader(config, StoredCodes(8))
    model.image_head = torch.nn.Identity()  # type: ignore[assignment]
    return model


def batch() -> Batch:
    """Three pairs; the hidden words of pair b are [b + 4], of the last one also a 2."""
    image = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    image[:, 0, 0, 0] = torch.tensor([4, 5, 6])
    target = torch.full((3, 4), IGNORE)
    target[:, 1] = torch.tensor([4, 5, 6])
    target[2, 2] = 2
    text = torch.full((3, 4), 7)
    text[target != IGNORE] = MASK
    mask = torch.tensor([[True, True, False, False]] * 3)
    codes = torch.tensor([[3, 0, 3, 3], [3, 3, 0, 0], [3, 1, 0, 0]])
    factors = [{"word_class": ["", "name", "", ""]}, {"word_class": ["", "name", "", ""]}]
    factors.append({"word_class": ["", "colour", "function", ""]})
    return Batch(
        ["a", "b", "c"], image, mask, codes, text, torch.ones(3, 4, dtype=torch.bool), target, token_factors=factors
    )


def test_text_accuracy_with_without_and_with_another_image() -> None:
    scores = text_scores(reader(), [batch()])
    assert scores["seen"]["accuracy"] == 3 / 4
    assert scores["blind"]["accuracy"] == 1 / 4
    assert scores["swapped"]["accuracy"] == 0
    assert scores["gap"] == pytest.approx(50.0)  # against the better of the two
    assert scores["by_word_class"] == {
        "name": {"seen": 1.0, "blind": 0.0, "swapped": 0.0, "predictions": 2},
        "colour": {"seen": 1.0, "blind": 0.0, "swapped": 0.0, "predictions": 1},
        "function": {"seen": 0.0, "blind": 1.0, "swapped": 0.0, "predictions": 1},
    }


@pytest.mark.parametrize(("sizes", "count"), [([5], 5), ([2, 2, 1], 5), ([3, 3], 6), ([1], 1), ([], 0)])
def test_anothers_image_is_that_of_the_sample_half_of_all_away(sizes: list[int], count: int) -> None:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    batches = [Batch([""] * len(part), part) for part in pixels.split(sizes)]
    found = list(with_others_images(batches))
    assert [own for own, _ in found] == batches
    assert [int(image[0, 0, 0]) for _, other in found for image in other] == [
        (i + count // 2) % count for i in range(count)
    ]


def test_words_of_texts_alone_by_class() -> None:
    alone = replace(batch(), image_BCHW=None, patch_mask_BP=None, codes_BP=None)
    assert words_right(reader(), [alone, alone]) == {"colour": 0.0, "function": 1.0, "name": 0.0}


def test_only_hidden_words_are_filled_in() -> None:
    b = batch()
    assert b.text_BT is not None and b.target_BT is not None
    filled = fill_in(reader(), b)
    assert torch.equal(filled[b.target_BT == IGNORE], b.text_BT[b.target_BT == IGNORE])
    assert filled[:, 1].tolist() == [4, 5, 6]


def test_image_accuracy_and_the_majority_guess() -> None:
    scores = image_scores(reader(), [batch()])
    assert scores["accuracy"] == 4 / 6
    assert scores["majority"] == 4 / 6
    assert scores["codes_in_use"] == 3
    assert scores["predictions"] == 6


def test_interval_holds_the_accuracy_and_is_the_same_each_time() -> None:
    tally = Tally()
    for i in range(200):
        tally.add(i % 2, 1)
    first = tally.summary()
    low, high = first["interval"]
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.15)
    assert tally.summary() == first


def test_scores_do_not_depend_on_the_batch_size_and_training_mode_comes_back() -> None:
    config = ModelConfig(width=32, depth=2, heads=2, image_size=4, patch=2, max_text=4, vocabulary=8, codes=8, vl_ffn=1)
    for side in (config.vision, config.text):
        side.sparse, side.experts = "all", 4
    torch.manual_seed(0)
    model = MaskedDataModelling(config, StoredCodes(8)).train()

    def pieces(size: int) -> list[Batch]:
        whole = batch()
        out = []
        for start in range(0, 3, size):
            cut = {k: v[start : start + size] for k, v in vars(whole).items() if v is not None}
            out.append(Batch(**cut))
        return out

    def batches_of(size: int) -> Callable[[str, str], Iterable[Batch]]:
        def get(split: str, kind: str) -> Iterable[Batch]:
            assert (split, kind) in {("val", "pair"), ("font", "pair")}
            return pieces(size)

        return get

    one, three = (evaluate_masked(model, batches_of(s), ["val", "font"], ["pair"], MASK) for s in (1, 3))
    assert one["experts"] == three["experts"]
    for split in ("val", "font"):
        a, b = one["splits"][split], three["splits"][split]
        assert a["image"] == b["image"]
        assert a["text"] == b["text"]
    assert model.training


def test_expert_use_by_hand() -> None:
    config = ModelConfig(width=32, depth=1, heads=2, image_size=4, patch=2, max_text=4, vocabulary=8, codes=8, vl_ffn=0)
    config.text.sparse, config.text.experts = "all", 4
    model = MaskedDataModelling(config, StoredCodes(8)).eval()
    with torch.no_grad():
        model.get_submodule("backbone.blocks.0.branches.text.layer.router").weight.zero_()  # type: ignore[operator]
    use = expert_use(model, [batch()])
    assert list(use) == ["0/text"]
    assert sum(use["0/text"]["share"]) == pytest.approx(1.0)
    assert use["0/text"]["max_over_mean"] == pytest.approx(4.0)  # ties all go one way
    assert use["0/text"]["idle"] == 3
