"""A sparse layer that starts as a dense one: sparse upcycling (Komatsuzaki et al. 2023), also into small experts by
virtual groups (He et al. 2024) and into shared ones.

Shape suffixes: D width · H hidden units · E experts · G pieces of one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vlmoe.moe.experts import FeedForward
from vlmoe.moe.layer import MoELayer
from vlmoe.moe.soft import SoftMoELayer

EXACT = 1e-4  # relative difference in float32 up to which two layers compute the same
TOKENS = 1024  # drawn where none are given

Passes = Sequence[tuple[Tensor, Tensor | None]]  # what a layer is given: tokens (..., D) and their mask, or None


@torch.no_grad()
def upcycle(layer: MoELayer, dense: FeedForward, inputs: Passes | None = None, *, allow_inexact: bool = False) -> float:
    """Fill the experts with what `dense` has learned, and measure how far the layer's output is from that of `dense`.

    The dense layer's hidden units are cut into groups of an expert's size. Shared experts take the first groups; of the
    G that are left, experts 0 to G-1 take one each, and so do the next G, and so on: each such run is a copy of the
    dense layer. The pieces of a copy get one router row, so that the k best experts are whole copies where G divides k
    and E. The second matrix is scaled so that pieces and gates together give the dense output in the mean over
    `inputs`. With G = 0, where shared experts hold everything, routed ones start with a second matrix of zeros.

    The output is that of `dense` where shared experts hold everything, or where G divides k and E and the gates of a
    token sum to one (`renormalize`, or the hash router). Else it cannot be: gates that are not renormalised differ from
    token to token, expert choice leaves out tokens, `inner_norm` sees a part's own units, soft mixing mixes tokens.
    That holds in evaluation without dropped tokens. In training the router's noise differs between the pieces of a
    copy, so with G > 1 close copies may be mixed, and a capacity drops tokens.

    inputs: what the layer will see, pass by pass; without any: standard normal tokens, as a LayerNorm gives.
    Returns |y - dense| / |dense| over all real tokens, in evaluation.

    Raises:
        ValueError: the layers do not fit (`check_upcycle`). Or the difference is above 1e-4 without `allow_inexact`;
            the layer is filled nevertheless.
    """
    check_upcycle(layer, dense)
    experts, shared = layer.experts, layer.shared
    hidden, H = experts.w2.shape[1], dense.w2.shape[0]
    kept = 0 if shared is None else shared.w2.shape[0]
    groups = (H - kept) // hidden
    if not inputs:
        x = torch.randn(TOKENS, layer.width, generator=torch.Generator().manual_seed(0))
        inputs = [(x.to(dense.w2), None)]
    if groups:
        _share_rows(layer, groups)
    scale = groups / _sum_of_gates(layer, inputs)
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
    found = difference(layer, dense, inputs)
    if not found <= EXACT and not allow_inexact:
        raise ValueError(
            f"the sparse layer's output would differ from the dense one's by {found:.2g} of its size, and only up to "
            f"{EXACT:g} counts as the same; the same are renormalised gates where k ({layer.k}) is a multiple of the "
            f"pieces that make up the dense layer ({groups}), or shared experts as large as it"
        )
    return found


@torch.no_grad()
def difference(layer: MoELayer, dense: FeedForward, inputs: Passes, *, training: bool = False) -> float:
    """|layer(x) - dense(x)| / |dense(x)| over all real tokens; `training`: with the layer's noise and capacity there,
    drawn from the default generator."""
    apart, size = 0.0, 0.0
    with _mode(layer, training):
        for x, mask in inputs:
            wanted = dense(x)
            if mask is not None:
                wanted = wanted.masked_fill(~mask[..., None], 0)
            apart += (layer(x, mask)[0] - wanted).double().square().sum().item()
            size += wanted.double().square().sum().item()
    return (apart / size) ** 0.5 if size else 0.0


def check_upcycle(layer: MoELayer, dense: FeedForward) -> None:
    """Raises:
    ValueError: width, activation, bias or inner_norm differ; experts do not divide the dense layer's hidden units,
        or shared ones have more; the layer has experts in common with another.
    """
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
    hidden, H = layer.experts.w2.shape[1], dense.w2.shape[0]
    kept = 0 if layer.shared is None else layer.shared.w2.shape[0]
    if H % hidden or kept > H:
        raise ValueError(
            f"hidden units: expected experts of a size that divides the dense layer's {H}, and no more than those in "
            f"shared experts; got {hidden} in an expert and {kept} in shared ones"
        )


def _share_rows(layer: MoELayer, groups: int) -> None:
    """One router row for the pieces of a copy: that of its first piece. A soft router has a row for each slot."""
    rows = layer.router.weight.view(layer.num_experts, -1)
    rows.copy_(rows[torch.arange(layer.num_experts, device=rows.device) // groups * groups])


def _sum_of_gates(layer: MoELayer, inputs: Passes) -> float:
    """Of one token, in the mean over real tokens."""
    if isinstance(layer, SoftMoELayer):
        return 1.0
    gates, tokens = 0.0, 0
    with _mode(layer, False):
        for x, mask in inputs:
            mask_N = None if mask is None else mask.reshape(-1)
            gate_NK = layer.router(x.reshape(-1, layer.width), mask_N).gate_NK
            real_NK = gate_NK if mask_N is None else gate_NK[mask_N]
            gates, tokens = gates + real_NK.double().sum().item(), tokens + len(real_NK)
    return gates / tokens


@contextmanager
def _mode(layer: MoELayer, training: bool) -> Iterator[None]:
    before = layer.training
    layer.train(training)
    try:
        yield
    finally:
        layer.train(before)


def _copy(dense: FeedForward, units: slice, w1: Tensor, b1: Tensor | None, w2: Tensor) -> None:
    """A part of the dense layer's hidden units; of swiglu's first matrix, of both halves."""
    H = len(dense.w2)
    w1.copy_(torch.cat([half[:, units] for half in dense.w1.split(H, dim=1)], dim=1))
    w2.copy_(dense.w2[units])
    if dense.b1 is not None and b1 is not None:
        b1.copy_(torch.cat([half[units] for half in dense.b1.split(H)]))
