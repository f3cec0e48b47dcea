"""Masked data modelling: what is predicted, what counts, and that routing is summed once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.model.test_sizes import small, sparse
from vlmoe.config import ModelConfig
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.visual_tokenizer import StoredCodes, VQTokenizer
from vlmoe.moe import RoutingStats, route
from vlmoe.tasks.base import StepOutput, Summed
from vlmoe.tasks.pretrain import MaskedDataModelling, pool, summarise_routing

MASK = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(batch: int = 4) -> Batch:
    mask = torch.zeros(batch, 4, dtype=torch.bool)
    mask[:, ::2] = True
    return Batch(
        keys=[f"i{b}" for b in range(batch)],
        image_BCHW=torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8),
        patch_mask_BP=mask,
        codes_BP=torch.randint(0, 12, (batch, 4)),
    )


def texts(batch: int = 4, length: int = 8) -> Batch:
    ids = torch.randint(5, 50, (batch, length))
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, 6:] = False
    hidden = torch.zeros_like(valid)
    hidden[:, 1:4] = True
    return Batch(
        keys=[f"t{b}" for b in range(batch)],
        text_BT=ids.masked_fill(hidden, MASK),
        valid_BT=valid,
        target_BT=ids.masked_fill(~hidden, IGNORE),
    )


def pairs(batch: int = 4) -> Batch:
    i, t = images(batch), texts(batch)
    return Batch(i.keys, i.image_BCHW, i.patch_mask_BP, i.codes_BP, t.text_BT, t.valid_BT, t.target_BT)


def build(config: ModelConfig | None = None) -> MaskedDataModelling:
    return MaskedDataModelling(config or sparse(small()), StoredCodes(12))


def test_each_loss_is_the_cross_entropy_of_its_hidden_positions() -> None:
    task = build().eval()
    batch = pairs()
    out = task({"pair": batch})
    features = task.run(batch)
    assert batch.target_BT is not None and batch.codes_BP is not None and batch.patch_mask_BP is not None
    text = task.text_logits(features.features("text"))
    expected = F.cross_entropy(text.flatten(0, 1), batch.target_BT.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(out.metrics["pair/mlm"], expected.detach())
    image = task.image_head(features.features("vision")[:, 1:])
    expected = F.cross_entropy(image[batch.patch_mask_BP], batch.codes_BP[batch.patch_mask_BP])
    torch.testing.assert_close(out.metrics["pair/mim"], expected.detach())


def test_all_kinds_in_one_step_logged_apart_and_summed() -> None:
    task = build().eval()
    out = task({"pair": pairs(), "image": images(), "text": texts()})
    parts = {"pair/mim", "pair/mlm", "image/mim", "text/mlm"}
    assert parts <= set(out.metrics)
    # 12 hidden words and 8 hidden patches in each batch here, so the pooled mean is the mean of the two kinds
    text = (out.metrics["pair/mlm"] + out.metrics["text/mlm"]) / 2
    image = (out.metrics["pair/mim"] + out.metrics["image/mim"]) / 2
    routing = out.loss.detach() - text - image
    balance = sum(
        0.01 * 2 * out.metrics[f"{m}/balance"] + 0.001 * 2 * out.metrics[f"{m}/z"] for m in ("vision", "text")
    )
    torch.testing.assert_close(routing, balance, rtol=1e-3, atol=1e-4)  # two sparse blocks for each modality
    assert {"vision/balance", "vision/z", "text/balance", "text/z", "text/entropy", "text/idle"} <= set(out.metrics)
    assert set(out.load) == {"1/vision", "1/text", "3/vision", "3/text"}
    # pairs pass block 1 but not block 3 (VL-FFN); padding is not counted
    assert out.load["1/text"].sum() == 2 * (4 * 8 - 2)
    assert out.load["3/text"].sum() == 4 * 8 - 2
    assert out.load["1/vision"].sum() == 2 * 4 * 5


def test_every_prediction_counts_once_whatever_its_kind() -> None:
    means = {"pair/mlm": (1.0, 30), "text/mlm": (5.0, 10), "image/mim": (7.0, 3)}
    found = pool({name: Summed(torch.tensor(mean * n), n) for name, (mean, n) in means.items()})
    assert {name: loss.mean.item() for name, loss in found.items()} == {"mlm": (30 * 1 + 10 * 5) / 40, "mim": 7.0}


def test_tokens_counts_no_padding() -> None:
    assert build().tokens({"pair": pairs(), "text": texts()}) == 4 * 5 + 2 * (4 * 8 - 2)


def test_what_is_shown_does_not_count_as_a_target() -> None:
    """Changing the codes of visible patches changes no loss; changing those of hidden ones does."""
    task = build().eval()
    batch = images()
    before = task({"image": batch}).loss
    assert batch.codes_BP is not None and batch.patch_mask_BP is not None
    batch.codes_BP[~batch.patch_mask_BP] = 11 - batch.codes_BP[~batch.patch_mask_BP]
    assert torch.equal(task({"image": batch}).loss, before)
    batch.codes_BP[batch.patch_mask_BP] = 11 - batch.codes_BP[batch.patch_mask_BP]
    assert not torch.equal(task({"image": batch}).loss, before)


def test_targets_are_the_same_with_and_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 run learns the codes that evaluation asks for, near ties included."""
    visual = VQTokenizer(16, 8, codes=12, dim=4, width=8).eval()
    visual.codebook_VZ.copy_(F.normalize(visual.codebook_VZ[:1] + 0.001 * visual.codebook_VZ, dim=-1))
    task = MaskedDataModelling(sparse(small()), visual).eval()
    batches = {"pair": pairs(32), "image": images(32)}
    seen: list[torch.Tensor] = []

    def cross_entropy(logits_MV: torch.Tensor, target_M: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(target_M)
        return original(logits_MV, target_M, **options)

    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    task(batches)
    plain = list(seen)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        task(batches)
    assert len(plain) == 3  # the pairs' patches and words, the images' patches
    for before, under in zip(plain, seen, strict=True):
        assert torch.equal(before, under)
    image_BCHW = batches["pair"].image_BCHW
    assert image_BCHW is not None
    codes = visual.encode(batches["pair"])
    assert torch.equal(plain[0], codes[batches["pair"].patch_mask_BP])
    z = visual.features(image_BCHW).bfloat16()
    assert not torch.equal((z @ visual.codebook_VZ.bfloat16().T).argmax(-1), codes)  # rounded, they would be others


def test_it_learns_a_small_batch_by_heart() -> None:
    task = build(sparse(small(vl_ffn=1), experts=2)).train()
    batches = {"pair": pairs(6), "text": texts(6), "image": images(6)}
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        out = task(batches)
        out.loss.backward()
        optimizer.step()
    out = task.eval()(batches)
    for name in ("pair/mlm_accuracy", "pair/mim_accuracy", "text/mlm_accuracy"):
        assert out.metrics[name] > 0.98, name
    # image-only: hidden patches of six images must be told by their visible ones
    assert out.metrics["image/mim_accuracy"] > 0.98


def test_matrices_decay_and_vectors_do_not() -> None:
    task = build()
    decay, rest = task.parameter_groups(0.05)
    names = {id(p): n for n, p in task.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}  # type: ignore[attr-defined]
    kept = {names[id(p)] for p in rest["params"]}  # type: ignore[attr-defined]
    assert decayed | kept == set(names.values())
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert not [n for n in decayed if "bias" in n or "norm" in n or "position" in n or n.endswith(("b1", "b2"))]
    assert {"image_head.weight", "backbone.text.tokens.weight"} <= decayed


def stats(load: list[float], loss: float, tokens: int) -> RoutingStats:
    """Routing of one pass, with made-up losses."""
    routing = route(torch.zeros(0, 2), k=1)
    return RoutingStats(
        loss=torch.tensor(loss),
        losses={"balance": torch.tensor(loss)},
        load_E=torch.tensor(load),
        tokens=torch.tensor(tokens),
        expert_index_NK=routing.expert_index_NK,
        gate_NK=routing.gate_NK,
        kept_NK=torch.zeros(0, 1, dtype=torch.bool),
        routing=routing,
        mask_N=None,
    )


def test_passes_of_a_layer_are_averaged_by_tokens_and_layers_summed() -> None:
    routed = [
        ("1/text", stats([3, 0], 1.0, 3)),
        ("1/text", stats([0, 1], 5.0, 1)),
        ("3/text", stats([2, 2], 7.0, 4)),
    ]
    found = summarise_routing(routed)
    loss, metrics, load = StepOutput(found.losses).loss, found.metrics, found.load
    assert loss.item() == pytest.approx((3 * 1.0 + 1 * 5.0) / 4 + 7.0)
    assert metrics["text/balance"].item() == pytest.approx((2.0 + 7.0) / 2)
    assert metrics["text/max_load"].item() == pytest.approx((1.5 + 1.0) / 2)
    assert load["1/text"].tolist() == [3, 1]
    unread = summarise_routing(routed, measuring=False)
    assert (unread.metrics, unread.layers) == ({}, {})
    assert StepOutput(unread.losses).loss == loss
    assert unread.load["1/text"].tolist() == [3, 1]


def test_no_sparse_layer_means_no_routing() -> None:
    found = summarise_routing([])
    assert (found.losses, found.metrics, found.load) == ({}, {}, {})
