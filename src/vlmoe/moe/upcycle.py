"""A sparse layer that starts as a dense one: sparse upcycling (Komatsuzaki et al. 2023), also into small experts and
shared ones (He et al. 2024).

Shape suffixes: D width · H hidden units · E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmoe.moe.experts import FeedForward
from vlmoe.moe.layer import MoELayer
from vlmoe.moe.routers import HashRouter
from vlmoe.moe.soft import SoftMoELayer


@torch.no_grad()
def upcycle(layer: MoELayer, dense: FeedForward) -> None:
    """Fill the shared and the routed experts with what `dense` has learned; the router stays as it is.

    The dense layer's hidden units are cut into groups of an expert's size. Shared experts take the first groups, routed
    ones the others in turn, so that with G groups left experts e and e + G start as copies. Their second matrix is
    scaled such that as long as gates are even, as a fresh router's nearly are, the layer's output is that of `dense`:
    exactly where one group is left, else in the mean over the experts a token may get; with `inner_norm`, which is over
    a part's own units, only where the parts are whole copies. Where no group is left, the second matrix of routed
    experts starts at zero and the first as it is.

    Raises:
        ValueError: width, activation, bias or inner_norm differ; experts do not divide the dense layer's hidden units,
            or shared ones have more; the layer has experts in common with another.
    """
    experts, shared = layer.experts, layer.shared
    hidden, H = experts.w2.shape[1], dense.w2.shape[0]
    kept = 0 if shared is None else shared.w2.shape[0]
    _check(layer, dense, hidden, kept, H)
    groups = (H - kept) // hidden
    scale = groups / _sum_of_gates(layer)
    for part in (experts, shared):
        if part is not None and part.b2 is not None:
            part.b2.zero_()
    if shared is not None:
        _copy(dense, slice(0, kept), shared.w1, shared.b1, shared.w2)
    for e in range(len(experts.w1) if groups else 0):
        first = kept + e % groups * hidden
        b1 = None if experts.b1 is None else experts.b1[e]
        _copy(dense, slice(first, first + hidden), experts.w1[e], b1, experts.w2[e])
    experts.w2.mul_(scale)
    if dense.b2 is not None:  # added once, and not by a routed expert where there is a shared one
        once = experts.b2 if shared is None else shared.b2
        assert once is not None
        once.add_(dense.b2 if shared is not None else dense.b2 * scale / groups)


def _copy(dense: FeedForward, units: slice, w1: Tensor, b1: Tensor | None, w2: Tensor) -> None:
    """A part of the dense layer's hidden units; of swiglu's first matrix, of both halves."""
    H = len(dense.w2)
    w1.copy_(torch.cat([half[:, units] for half in dense.w1.split(H, dim=1)], dim=1))
    w2.copy_(dense.w2[units])
    if dense.b1 is not None and b1 is not None:
        b1.copy_(torch.cat([half[units] for half in dense.b1.split(H)]))


def _sum_of_gates(layer: MoELayer) -> float:
    """Of one token, with even gates."""
    router, k, E = layer.router, layer.k, layer.num_experts
    if isinstance(layer, SoftMoELayer) or isinstance(router, HashRouter) or router.renormalize:
        return 1.0
    return k / 2 if router.scores == "sigmoid" else k / E


def _check(layer: MoELayer, dense: FeedForward, hidden: int, kept: int, H: int) -> None:
    if layer.common:
        raise ValueError("experts in common with another modality have no dense layer to start from")
    for name in ("activation", "inner_norm"):
        ours, theirs = getattr(layer.experts, name), getattr(dense, name)
        if ours != theirs:
            raise ValueError(f"{name}: experts have {ours!r}, the dense layer {theirs!r}")
    if (layer.experts.b1 is None) != (dense.b1 is None):
        raise ValueError("bias: experts and the dense layer must both have one, or neither")
    if layer.width != dense.w2.shape[1]:
        raise ValueError(f"width: experts have {layer.width}, the dense layer {dense.w2.shape[1]}")
    if H % hidden or kept > H:
        raise ValueError(
            f"hidden units: expected experts of a size that divides the dense layer's {H}, and no more than those in "
            f"shared experts; got {hidden} in an expert and {kept} in shared ones"
        )
