"""Ways to compute E feed-forward layers on rows in expert order. One signature, the same numbers.

`loop` is the oracle: one expert after the other, plain autograd. `padded` is one batched product over experts with
equally many rows. `grouped` takes segments of any length: torch's grouped kernel on a GPU, one product per expert
written straight into place elsewhere.

Shape suffixes: R rows in expert order · I, O width of a product's input and output · D width · H hidden · U = H, or 2H
for swiglu · E experts · C slots per expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmoe.moe.dispatch import Plan

Activation = Callable[[Tensor], Tensor]
Backend = Callable[[Tensor, Plan, Tensor, Tensor | None, Tensor, Tensor | None, Activation], Tensor]


def run_loop(
    x_RD: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """Fillers at the end come out as zero."""
    sizes = plan.host_sizes()
    parts = x_RD.split([*sizes, plan.rows - sum(sizes)])
    none = [None] * len(sizes)
    w1s, w2s = w1.unbind(), w2.unbind()
    b1s, b2s = none if b1 is None else b1.unbind(), none if b2 is None else b2.unbind()
    y = [F.linear(act(F.linear(x, w1s[e].t(), b1s[e])), w2s[e].t(), b2s[e]) for e, x in enumerate(parts[:-1])]
    return torch.cat([*y, torch.zeros_like(parts[-1])])


def run_padded(
    x_RD: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    x_ECD = x_RD.view(len(w1), plan.rows // len(w1), x_RD.shape[1])
    u_ECU = torch.bmm(x_ECD, w1) if b1 is None else torch.baddbmm(b1[:, None], x_ECD, w1)
    h_ECH = act(u_ECU)
    y_ECD = torch.bmm(h_ECH, w2) if b2 is None else torch.baddbmm(b2[:, None], h_ECH, w2)
    return y_ECD.flatten(0, 1)


def run_grouped(
    x_RD: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    linear = _kernel_linear if can_group(w1) and can_group(w2) else _segment_linear
    return linear(act(linear(x_RD, w1, b1, plan)), w2, b2, plan)


RUN: dict[str, Backend] = {"loop": run_loop, "padded": run_padded, "grouped": run_grouped}


def can_group(w_EIO: Tensor) -> bool:
    """Whether torch's grouped kernel is the better choice: on an Ampere GPU or newer, for strides that are multiples of
    16 bytes as it demands. On CPU it is as slow as a loop that copies."""
    return (
        w_EIO.device.type == "cuda"
        and torch.cuda.get_device_capability(w_EIO.device) >= (8, 0)
        and w_EIO.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(n * w_EIO.element_size() % 16 == 0 for n in w_EIO.shape[1:])
    )


def _kernel_linear(x_RI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, plan: Plan) -> Tensor:
    """Fillers at the end go through the last expert: the kernel leaves rows past its last offset uninitialised, and
    those might hold nan. Their gradient is zero, so the expert's is right."""
    ends_E = plan.count_E.cumsum(0).to(torch.int32)
    ends_E[-1] = plan.rows
    y_RO = F.grouped_mm(x_RI, w_EIO, offs=ends_E)
    if b_EO is None:
        return y_RO
    rows_R = torch.arange(plan.rows, device=x_RI.device, dtype=torch.int32)
    return y_RO + b_EO.index_select(0, torch.searchsorted(ends_E, rows_R, right=True))


def _segment_linear(x_RI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, plan: Plan) -> Tensor:
    return _SegmentLinear.apply(x_RI, w_EIO, b_EO, plan.host_sizes())


class _SegmentLinear(torch.autograd.Function):
    """y[segment e] = x[segment e] @ w[e] + b[e]. Each product writes into its place in one tensor; autograd
    over slices would copy rows and build the weight's gradient E times over. Rows past the last segment become zero."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, w_EIO)
        ctx.sizes, ctx.bias = sizes, b_EO is not None
        y_RO = x_RI.new_empty(len(x_RI), w_EIO.shape[2])
        for e, rows in _segments(sizes):
            if b_EO is None:
                torch.mm(x_RI[rows], w_EIO[e], out=y_RO[rows])
            else:
                torch.addmm(b_EO[e], x_RI[rows], w_EIO[e], out=y_RO[rows])
        y_RO[sum(sizes) :] = 0
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_RI, w_EIO = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        grad_RO = grad_RO.contiguous()
        grad_x_RI = torch.empty_like(x_RI) if need_x else None
        grad_w_EIO = torch.empty_like(w_EIO) if need_w else None
        grad_b_EO = w_EIO.new_zeros(len(w_EIO), w_EIO.shape[2]) if need_b else None
        for e, rows in _segments(sizes):
            if grad_x_RI is not None:
                torch.mm(grad_RO[rows], w_EIO[e].t(), out=grad_x_RI[rows])
            if grad_w_EIO is not None:
                torch.mm(x_RI[rows].t(), grad_RO[rows], out=grad_w_EIO[e])
            if grad_b_EO is not None:
                torch.sum(grad_RO[rows], dim=0, out=grad_b_EO[e])
        if grad_w_EIO is not None:
            for e in (e for e, size in enumerate(sizes) if size == 0):
                grad_w_EIO[e].zero_()
        if grad_x_RI is not None:
            grad_x_RI[sum(sizes) :] = 0
        return grad_x_RI, grad_w_EIO, grad_b_EO, None


def _segments(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    found, start = [], 0
    for e, size in enumerate(sizes):
        if size:
            found.append((e, slice(start, start + size)))
        start += size
    return found
