"""Pre-training that starts from an earlier one's weights."""

import pytest
import torch

from tests.model.test_sizes import small, sparse
from tests.tasks.test_pretrain import build, images, pairs, texts
from vlmoe.config import UserError
from vlmoe.data.batch import Batch
from vlmoe.tasks.init import continue_from
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.tasks.upcycling import fill_experts


def test_the_same_model_goes_on_as_it_was() -> None:
    torch.manual_seed(0)
    earlier, task = build(), build()
    assert continue_from(task, earlier) == {}
    for name, tensor in earlier.state_dict().items():
        assert torch.equal(tensor, task.state_dict()[name]), name


def trained() -> MaskedDataModelling:
    """A dense model whose weights are no fresh ones."""
    torch.manual_seed(0)
    earlier = build(small()).eval()
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.normal_(std=0.2)
    return earlier


def three() -> dict[str, Batch]:
    return {"pair": pairs(), "text": texts(), "image": images()}


def test_a_sparse_model_starts_where_the_dense_one_is() -> None:
    earlier = trained()
    config = sparse(small(), vision="all", text="odd", k=2)
    config.text.granularity = 2
    for side in (config.vision, config.text):
        side.router.renormalize = True
    task = build(config)
    layers = continue_from(task, earlier)
    assert len(layers) == small().depth + small().depth // 2
    found = fill_experts(task, earlier, layers, three())
    assert set(found.layers) == set(found.layers_in_training) == set(layers)
    assert max(found.layers.values()) < 1e-6 and found.output < 1e-5
    assert found.layers_in_training["backbone.blocks.1.branches.text.layer"] > 1e-3  # noise splits close copies
    assert task.training and not earlier.training
    assert all(layer.router.weight.abs().max() > 0 for layer in task.routed_layers().values())
    batches = three()
    wanted, got = earlier(batches).metrics, task.eval()(batches).metrics
    for name in ("pair/mlm", "pair/mim", "text/mlm", "image/mim"):
        torch.testing.assert_close(got[name], wanted[name])


def test_what_would_not_compute_the_same_is_measured_and_refused() -> None:
    earlier, task = trained(), build(sparse(small(), k=1))
    layers = continue_from(task, earlier)
    with torch.no_grad():  # logits of the size they have at the published width
        for layer, _ in layers.values():
            layer.router.weight.normal_(std=0.2)
    with pytest.raises(UserError, match=r"vision\.layer: .* differ from .* init_allow_inexact=true"):
        fill_experts(task, earlier, layers, three())
    found = fill_experts(task, earlier, layers, three(), allow_inexact=True)
    assert all(0.01 < x < 1 for x in [found.output, *found.layers.values()])
    batch = pairs()
    with torch.no_grad():
        there = earlier.run(batch).x_BTD[batch_real(batch)]
    only = fill_experts(task, earlier, layers, {"pair": batch}, allow_inexact=True)
    with torch.no_grad():
        here = task.eval().run(batch).x_BTD[batch_real(batch)]
    assert only.output == pytest.approx(((here - there).norm() / there.norm()).item(), rel=1e-4)


def batch_real(batch: Batch) -> torch.Tensor:
    """Of a pair: class token and patches, then the words."""
    assert batch.patch_mask_BP is not None and batch.valid_BT is not None
    return torch.cat([batch.valid_BT.new_ones(len(batch), 1 + batch.patch_mask_BP.shape[1]), batch.valid_BT], dim=1)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match=r"text_bias: \(50,\) there, \(60,\) here"):
        continue_from(build(small(vocabulary=60)), build(small(vocabulary=50)))
    with pytest.raises(UserError, match=r"layer\.\w+.*: no such tensor there, "):
        continue_from(build(sparse(small())), build(small(vl_ffn=0, depth=1)))
    half = sparse(small())
    half.vision.expert_size = 2.0
    with pytest.raises(UserError, match=r"blocks\.1\.branches\.vision\.layer: hidden units"):
        continue_from(build(half), build(small()))
