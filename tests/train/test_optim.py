"""The schedule by hand, clipping by hand, and no parameter forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.train.toy import ToyTask, toy_task
from vlmoe.config import ModelConfig, TrainConfig
from vlmoe.model.embed import ImageEmbedding
from vlmoe.moe import MoELayer
from vlmoe.moe.soft import SoftMoELayer
from vlmoe.train.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 0.25),  # a quarter of the warm-up
        (2, 0.5),
        (4, 1.0),  # its end
        (6, 0.1 + 0.9 * (1 + 2**-0.5) / 2),  # a quarter of the cosine: cos 45° = 1/sqrt 2
        (8, 0.55),  # half of it: the middle of lr and min_lr
        (12, 0.1),  # the last step
        (13, 0.1),
    ],
)
def test_rate_by_hand(step: int, rate: float) -> None:
    config = TrainConfig(steps=12, warmup=4, lr=1.0, min_lr=0.1)
    assert learning_rate(step, config) == pytest.approx(rate, rel=1e-12)


def test_rate_without_warm_up_or_with_nothing_else() -> None:
    config = TrainConfig(steps=4, warmup=0, lr=1.0, min_lr=0.0)
    assert [learning_rate(s, config) for s in (2, 4)] == pytest.approx([0.5, 0.0])
    config = TrainConfig(steps=4, warmup=8, lr=1.0)
    assert [learning_rate(s, config) for s in (1, 4)] == [0.125, 0.5]
    assert learning_rate(4, TrainConfig(steps=4, warmup=0, lr=1e-6, min_lr=1e-5)) == 1e-6  # never above lr


def test_groups_keep_their_decay_and_their_scale() -> None:
    class Scaled(ToyTask):
        def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
            groups = super().parameter_groups(weight_decay)
            groups[1]["lr_scale"] = 20.0
            return groups

    task = Scaled()
    optimizer = make_optimizer(task, TrainConfig(weight_decay=0.3, beta2=0.95, eps=1e-7))
    set_learning_rate(optimizer, 0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 2.0])
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]) == ((0.9, 0.95), 1e-7)


def test_experts_and_routers_have_rates_of_their_own() -> None:
    class Sparse(ToyTask):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoELayer(8, 4, 3, shared=1)
            self.soft = SoftMoELayer(8, 4, 3)

    task = Sparse()
    optimizer = make_optimizer(task, TrainConfig(expert_lr=0.25, router_lr=0.5, weight_decay=0.3))
    set_learning_rate(optimizer, 0.1)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in task.named_parameters()}
    assert len(found) == len(rate)  # each in one group
    expected = {name: (0.1, 0.0 if name.split(".")[-1] in {"bias", "b1", "b2", "scale"} else 0.3) for name in found}
    for layer in ("moe", "soft"):
        for weight, decay in (("w1", 0.3), ("w2", 0.3), ("b1", 0.0), ("b2", 0.0)):
            expected[f"{layer}.experts.{weight}"] = (0.025, decay)
        expected[f"{layer}.router.weight"] = (0.05, 0.3)
    expected["soft.router.scale"] = (0.05, 0.0)
    assert {name: decay for name, (_, decay) in found.items()} == {name: decay for name, (_, decay) in expected.items()}
    assert {name: rate for name, (rate, _) in found.items()} == pytest.approx(
        {name: rate for name, (rate, _) in expected.items()}
    )
    assert len(make_optimizer(task, TrainConfig()).param_groups) == 2  # by default nothing is told apart


@pytest.mark.parametrize(
    ("width", "patch_lr", "factor"),
    [(8, None, 8 / 48), (48, None, 1.0), (96, None, 1.0), (8, 1.0, 1.0), (96, 0.5, 0.5)],
)
def test_the_projection_of_patches_has_a_rate_of_its_own(width: int, patch_lr: float | None, factor: float) -> None:
    class Seeing(ToyTask):
        def __init__(self) -> None:
            super().__init__()
            self.image = ImageEmbedding(ModelConfig(width=width, image_size=8, patch=4))  # 48 inputs

    task = Seeing()
    optimizer = make_optimizer(task, TrainConfig(patch_lr=patch_lr))
    set_learning_rate(optimizer, 0.1)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.named_parameters():
        expected = 0.1 * factor if name == "image.project.weight" else 0.1
        assert rate[id(parameter)] == pytest.approx(expected), name


def test_a_parameter_in_no_group_is_an_error() -> None:
    class Forgetful(ToyTask):
        def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
            return super().parameter_groups(weight_decay)[:1]

    with pytest.raises(ValueError, match=r"Forgetful.parameter_groups leaves out hidden.bias, head.bias"):
        make_optimizer(Forgetful(), TrainConfig())


@pytest.mark.parametrize(("limit", "scale"), [(0.0, 1.0), (10.0, 1.0), (2.5, 0.5)])
def test_clipping_by_hand(limit: float, scale: float) -> None:
    task = toy_task()
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hidden: nn.Linear = task.hidden
    hidden.weight.grad[0, 0], hidden.bias.grad[1] = 3.0, 4.0  # type: ignore[index]
    assert clip_gradients(task, limit).item() == pytest.approx(5.0)  # a 3-4-5 triangle over two tensors
    found = (hidden.weight.grad[0, 0].item(), hidden.bias.grad[1].item())  # type: ignore[index]
    assert found == pytest.approx((3.0 * scale, 4.0 * scale), rel=1e-5)


def test_constant_then_a_straight_line() -> None:
    config = TrainConfig(steps=10, warmup=2, lr=1.0, min_lr=0.2, schedule="constant_decay", decay_steps=4)
    rates = [learning_rate(step, config) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
