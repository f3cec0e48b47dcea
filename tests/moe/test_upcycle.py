"""A sparse layer filled from a dense one: what computes the same, with a router as it is drawn, and what does not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmoe.moe import FeedForward, MoELayer, SoftMoELayer, upcycle
from vlmoe.moe.upcycle import difference

D, H = 8, 12


def dense(width: int = D, hidden: int = H, **options: Any) -> FeedForward:
    torch.manual_seed(0)
    made = FeedForward(width, hidden, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=width**-0.5)
    return made


def sharp(layer: MoELayer, std: float = 1.0) -> MoELayer:
    """Its gates are far from even."""
    with torch.no_grad():
        layer.router.weight.normal_(std=std)
    return layer.eval()


def tokens(width: int = D) -> Tensor:
    return torch.randn(4, 25, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("hidden", "experts", "options"),
    [
        (H, 4, {"k": 2, "renormalize": True}),
        (H, 4, {"k": 3, "router": "sigmoid", "renormalize": True}),
        (H, 4, {"k": 2, "router": "hash"}),
        (H, 4, {"k": 1, "router": "hash"}),
        (H, 4, {"k": 2, "router": "cosine", "renormalize": True}),
        (H // 2, 8, {"k": 2, "renormalize": True}),  # one copy of two pieces
        (H // 2, 8, {"k": 4, "renormalize": True, "router": "sigmoid"}),  # two copies
        (H // 3, 9, {"k": 3, "router": "hash"}),
        (H // 2, 4, {"k": 2, "shared": 1, "renormalize": True}),
        (H // 4, 6, {"k": 2, "shared": 2, "renormalize": True}),
        (H, 4, {"k": 1, "shared": 1}),  # nothing is left for routed ones
        (H // 2, 4, {"k": 2, "shared": 2, "router": "expert_choice"}),
    ],
)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_the_dense_layers(
    hidden: int, experts: int, options: dict[str, Any], activation: str, bias: bool
) -> None:
    source = dense(activation=activation, bias=bias)
    layer = sharp(MoELayer(D, hidden, experts, activation=activation, bias=bias, **options))
    assert upcycle(layer, source) < 1e-6
    x = tokens()
    torch.testing.assert_close(layer(x)[0], source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [8, 64, 96])
@pytest.mark.parametrize("k", [2, 4, 6])
def test_the_k_best_are_whole_copies(experts: int, k: int) -> None:
    layer = sharp(MoELayer(D, H // 2, experts, k=k, renormalize=True))
    upcycle(layer, dense())
    index_NK = layer(tokens().flatten(0, 1))[1].expert_index_NK
    copies = (index_NK // 2).sort(dim=1).values
    assert (copies[:, ::2] == copies[:, 1::2]).all()
    assert (index_NK.sort(dim=1).values.diff(dim=1) > 0).all()  # of each copy both pieces


@pytest.mark.parametrize(
    ("hidden", "experts", "options", "apart"),
    [
        (3072, 32, {"k": 1}, (0.2, 0.35)),  # as published; gates follow the input: 2.7 times even ones on the mean
        (1536, 64, {"k": 2}, (0.2, 0.35)),
        (3072, 32, {"k": 2, "router": "sigmoid"}, (0.03, 0.1)),
        (1536, 64, {"k": 3, "renormalize": True}, (0.2, 0.4)),  # one and a half copies
        (1536, 33, {"k": 2, "renormalize": True}, (0.05, 0.5)),  # the last copy has one piece
        (1536, 32, {"k": 2, "renormalize": True, "inner_norm": True}, (0.01, 0.1)),  # a piece has its own mean
        (3072, 32, {"k": 2, "router": "expert_choice"}, (0.3, 0.7)),
    ],
)
def test_what_cannot_be_the_dense_layers_is_measured_and_refused(
    hidden: int, experts: int, options: dict[str, Any], apart: tuple[float, float]
) -> None:
    """Experts and pieces as published, an eighth of the width, and router rows so drawn that the logits have the size
    they have at width 768. Divided by an even gate, the first would put out 2.9 times the dense output."""
    width = 96
    layer = MoELayer(width, hidden // 8, experts, **options)
    source = dense(width, 384, inner_norm=options.get("inner_norm", False))
    with torch.no_grad():
        layer.router.weight.normal_(std=0.02 * 8**0.5)
    found = upcycle(layer, source, allow_inexact=True)
    assert apart[0] < found < apart[1]
    with pytest.raises(ValueError, match=r"would differ from the dense one's by 0\.\d+ of its size"):
        upcycle(layer, source)
    if options.get("router") != "expert_choice" and "inner_norm" not in options:
        x = torch.randn(2000, width)
        with torch.no_grad():
            ratio = layer.eval()(x)[0].norm() / source(x).norm()
        assert 0.95 < ratio < 1.08


def test_width_768_with_32_experts() -> None:
    """The published width and count: one is measured, two renormalised, whole or half ones are the dense layer."""
    source, x = dense(768, 384), [(torch.randn(64, 768), None)]  # an eighth of the hidden units, for the test's time
    assert 0.15 < upcycle(MoELayer(768, 384, 32, k=1), source, x, allow_inexact=True) < 0.4
    assert upcycle(MoELayer(768, 384, 32, k=2, renormalize=True), source, x) < 1e-6
    pieces = MoELayer(768, 192, 64, k=2, renormalize=True)
    assert upcycle(pieces, source, x) < 1e-6
    assert upcycle(pieces, source, x) < 1e-6  # again


def test_the_scale_is_taken_from_the_tokens_given() -> None:
    layer, source = MoELayer(D, H, 4, k=1), dense()
    x = tokens()
    mask = torch.ones(4, 25, dtype=torch.bool)
    mask[:, 20:] = False
    upcycle(layer, source, [(x, mask), (x[:1, :3], None)], allow_inexact=True)
    layer.eval()
    gates = torch.cat([layer(x[:, :20])[1].gate_NK, layer(x[:1, :3])[1].gate_NK])
    torch.testing.assert_close(layer.experts.w2[0] * gates.mean(), source.w2)


def test_noise_may_split_a_copy_in_training_alone() -> None:
    layer, source = MoELayer(D, H // 2, 8, k=2, renormalize=True, noise=1.0), dense()
    with torch.no_grad():
        layer.router.weight.normal_(std=0.02)
    inputs = [(tokens(), None)]
    assert upcycle(layer, source, inputs) < 1e-6
    assert layer.training
    assert difference(layer, source, inputs, training=True) > 0.1
    whole = MoELayer(D, H, 8, k=2, renormalize=True, noise=1.0)
    upcycle(whole, source, inputs)
    assert difference(whole, source, inputs, training=True) < 1e-6  # all copies are alike


def test_a_soft_mixture_of_copies_is_the_dense_layer_on_mixed_tokens() -> None:
    source = dense()
    layer = SoftMoELayer(D, H // 2, 4, slots=2)
    upcycle(layer, source, allow_inexact=True)
    with torch.no_grad():
        layer.router.weight.zero_()
    x = tokens()
    mixed = x.mean(dim=1, keepdim=True).expand_as(x)  # even weights: every slot is the mean of its sequence
    torch.testing.assert_close(layer(x)[0], source(mixed))
    with pytest.raises(ValueError, match="would differ"):
        upcycle(layer, source, [(x, None)])


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
        upcycle(layer(), dense(), allow_inexact=True)
