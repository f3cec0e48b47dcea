"""A sparse layer filled from a dense one gives the dense one's output as long as gates are even."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmoe.moe import FeedForward, MoELayer, SoftMoELayer, upcycle

D, H = 8, 12


def dense(**options: Any) -> FeedForward:
    torch.manual_seed(0)
    made = FeedForward(D, H, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
    return made


def even(layer: MoELayer) -> MoELayer:
    """Its gates are even."""
    with torch.no_grad():
        layer.router.weight.zero_()
    return layer.double().eval()


def tokens() -> Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("hidden", "experts", "options"),
    [
        (H, 4, {"k": 1}),
        (H, 4, {"k": 2, "renormalize": True}),
        (H, 4, {"k": 3, "router": "sigmoid"}),
        (H, 4, {"k": 2, "router": "hash"}),
        (H, 4, {"k": 2, "router": "cosine"}),
        (H // 2, 4, {"k": 1, "shared": 1}),
        (H // 4, 6, {"k": 1, "shared": 3, "router": "sigmoid"}),
        (H, 4, {"k": 2, "shared": 1}),  # nothing is left for routed ones
        (H // 3, 3, {"k": 3}),  # all three groups are chosen, once each
    ],
)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_the_dense_layers(
    hidden: int, experts: int, options: dict[str, Any], activation: str, bias: bool
) -> None:
    source = dense(activation=activation, bias=bias)
    layer = even(MoELayer(D, hidden, experts, activation=activation, bias=bias, **options))
    upcycle(layer, source)
    torch.testing.assert_close(layer(tokens())[0], source(tokens()))


def test_a_soft_mixture_of_copies_is_the_dense_layer_on_mixed_tokens() -> None:
    source = dense()
    layer = even(SoftMoELayer(D, H, 3))
    upcycle(layer, source)
    x = tokens()
    mixed = x.mean(dim=1, keepdim=True).expand_as(x)  # even weights: every slot is the mean of its sequence
    torch.testing.assert_close(layer(x)[0], source(mixed))


def test_many_small_experts_are_the_dense_layer_in_the_mean() -> None:
    source = dense()
    layer = even(MoELayer(D, H // 3, 6, k=1, renormalize=True))
    upcycle(layer, source)
    x = tokens()
    each = []
    for e in range(6):
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[e] = 1e3
        positive = x.abs()  # so that expert e has the largest logit
        each.append(layer(positive)[0])
    torch.testing.assert_close(torch.stack(each).mean(dim=0), source(x.abs()))
    torch.testing.assert_close(each[0], each[3])  # copies


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: MoELayer(D, 5, 4), "divides the dense layer's 12"),
        (lambda: MoELayer(D, H, 4, shared=2), "24 in shared ones"),
        (lambda: MoELayer(D + 1, H, 4), "width: experts have 9, the dense layer 8"),
        (lambda: MoELayer(D, H, 4, activation="relu"), "activation: experts have 'relu'"),
        (lambda: MoELayer(D, H, 4, inner_norm=True), "inner_norm"),
        (lambda: MoELayer(D, H, 4, bias=False), "bias"),
        (lambda: MoELayer(D, H, 4, common=2), "in common"),
    ],
)
def test_what_does_not_fit_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(layer(), dense())
