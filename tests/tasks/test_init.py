"""Pre-training that starts from an earlier one's weights."""

import pytest
import torch

from tests.model.test_sizes import small, sparse
from tests.tasks.test_pretrain import build, pairs
from vlmoe.config import UserError
from vlmoe.moe import MoELayer
from vlmoe.tasks.init import continue_from


def test_the_same_model_goes_on_as_it_was() -> None:
    torch.manual_seed(0)
    earlier, task = build(), build()
    assert continue_from(task, earlier) == []
    for name, tensor in earlier.state_dict().items():
        assert torch.equal(tensor, task.state_dict()[name]), name


def test_a_sparse_model_starts_where_the_dense_one_is() -> None:
    torch.manual_seed(0)
    earlier = build(small()).eval()
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.normal_(std=0.2)
    task = build(sparse(small(), vision="all", text="odd", k=2)).eval()
    filled = continue_from(task, earlier)
    assert len(filled) == small().depth + small().depth // 2
    with torch.no_grad():
        for layer in task.modules():
            if isinstance(layer, MoELayer):
                layer.router.weight.zero_()
    batch = {"pair": pairs()}
    wanted, got = earlier(batch).metrics, task(batch).metrics
    for name in ("pair/mlm", "pair/mim"):
        torch.testing.assert_close(got[name], wanted[name])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match=r"text_bias: \(50,\) there, \(60,\) here"):
        continue_from(build(small(vocabulary=60)), build(small(vocabulary=50)))
    with pytest.raises(UserError, match=r"layer\.\w+.*: no such tensor there, "):
        continue_from(build(sparse(small())), build(small(vl_ffn=0, depth=1)))
    half = sparse(small())
    half.vision.expert_size = 2.0
    with pytest.raises(UserError, match=r"blocks\.1\.branches\.vision\.layer: hidden units"):
        continue_from(build(half), build(small()))
