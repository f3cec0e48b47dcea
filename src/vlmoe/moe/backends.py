"""Ways to compute E feed-forward layers on rows in expert order. One signature, the same numbers.

`loop` is the oracle: one expert after the other, plain autograd. `padded` is one batched product over experts with
equally many rows each. `grouped` is torch's grouped kernel on a GPU; elsewhere, batched products over neighbours of
similar load. `slots_for` says how many rows per expert a backend wants.

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

from vlmoe.moe.dispatch import Plan, Slots
from vlmoe.moe.memory import empty_large

ALIGNED = 16  # columns of a matrix that the grouped kernel takes in every dtype

Activation = Callable[[Tensor], Tensor]
Backend = Callable[[Tensor, Plan, Tensor, Tensor | None, Tensor, Tensor | None, Activation], Tensor]


def run_loop(
    x_RD: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """Fillers at the end come out as zero."""
    sizes = plan.host_slots()
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
    linear = _kernel_linear if plan.slots is None and has_kernel((w1, w2), x_RD.dtype) else _batched_linear
    return linear(act(linear(x_RD, w1, b1, plan)), w2, b2, plan)


RUN: dict[str, Backend] = {"loop": run_loop, "padded": run_padded, "grouped": run_grouped}
BACKENDS = ("auto", *RUN)


def slots_for(backend: str, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Slots | None:
    """What to give `plan_dispatch` for this backend, these weights and products in this dtype."""
    if backend == "padded":
        return lambda need: [max(need)] * len(need)
    if backend == "loop" or has_kernel(weights, dtype):
        return None
    return lambda need: [slots for first, last, slots in similar_loads(need) for _ in range(first, last)]


def similar_loads(need: list[int], waste: float = 0.15) -> list[tuple[int, int, int]]:
    """Cut the experts into runs (first, last + 1, rows each) of similar load, so that giving each expert as many rows
    as the largest of its run adds at most the share `waste`.

    One batched product of a few experts is as fast as a dense one of as many rows; one product per expert is not,
    because all threads meet after each.
    """
    runs, first, largest, total = [], 0, 0, 0
    for e, rows in enumerate(need):
        if e > first and max(largest, rows) * (e + 1 - first) > (1 + waste) * (total + rows):
            runs.append((first, e, largest))
            first, largest, total = e, 0, 0
        largest, total = max(largest, rows), total + rows
    return [*runs, (first, len(need), largest)]


def has_kernel(weights: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether torch's grouped kernel serves these weights well: on an Ampere GPU or newer, with strides that are
    multiples of 16 bytes as it demands. On a CPU `_batched_linear` serves."""
    device = weights[0].device
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(n * dtype.itemsize % 16 == 0 for w in weights for n in w.shape[1:])
    )


def _kernel_linear(x_RI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, plan: Plan) -> Tensor:
    """Fillers at the end go through the last expert: the kernel leaves rows past its last offset uninitialised, and
    those might hold nan. Their gradient is zero, so the expert's is right."""
    ends_E = plan.count_E.cumsum(0).to(torch.int32)
    ends_E[-1] = plan.rows
    y_RO = F.grouped_mm(x_RI, w_EIO, offs=ends_E)
    if b_EO is None:
        return y_RO
    return _AddBias.apply(y_RO, b_EO, ends_E)


class _AddBias(torch.autograd.Function):
    """y + b, each row with its expert's bias. The bias's gradient is a grouped product with ones, which adds up in
    float32 and rounds once, in the same order every time; that of an index adds row by row, in the rows' dtype."""

    @staticmethod
    def forward(ctx: Any, y_RO: Tensor, b_EO: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        rows_R = torch.arange(len(y_RO), device=y_RO.device, dtype=torch.int32)
        return y_RO + b_EO.index_select(0, torch.searchsorted(ends_E, rows_R, right=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (ends_E,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad_RO, None, None
        ones_R = grad_RO.new_ones(len(grad_RO), ALIGNED)
        grad_EO = F.grouped_mm(ones_R.t(), grad_RO.contiguous(), offs=ends_E)[:, 0]
        return grad_RO, grad_EO, None


def _batched_linear(x_RI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, plan: Plan) -> Tensor:
    return _BatchedLinear.apply(x_RI, w_EIO, b_EO, _runs(plan.host_slots()))


def _runs(slots: list[int]) -> list[tuple[slice, slice, tuple[int, int, int]]]:
    """Runs of equal slots: (experts, rows, shape of the rows as a batch)."""
    runs, first, row = [], 0, 0
    for e in range(1, len(slots) + 1):
        if e == len(slots) or slots[e] != slots[first]:
            stop = row + (e - first) * slots[first]
            runs.append((slice(first, e), slice(row, stop), (e - first, slots[first], -1)))
            first, row = e, stop
    return runs


class _BatchedLinear(torch.autograd.Function):
    """y = x w + b, run by run. Every product writes into its place in one tensor; autograd over slices would copy rows
    and build the weight's gradient once per run."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, runs: list[Any]) -> Tensor:
        ctx.save_for_backward(x_RI, w_EIO)
        ctx.runs = runs
        y_RO = x_RI.new_empty(len(x_RI), w_EIO.shape[2])
        for experts, rows, shape in runs:
            if rows.start == rows.stop:
                continue
            x, w, y = x_RI[rows].view(shape), w_EIO[experts], y_RO[rows].view(shape)
            if b_EO is None:
                torch.bmm(x, w, out=y)
            else:
                torch.baddbmm(b_EO[experts, None], x, w, out=y)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_RI, w_EIO = ctx.saved_tensors
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        grad_RO = grad_RO.contiguous()
        grad_x_RI = torch.empty_like(x_RI) if need_x else None
        grad_w_EIO = empty_large(w_EIO) if need_w else None
        grad_b_EO = w_EIO.new_zeros(len(w_EIO), w_EIO.shape[2]) if need_b else None
        for experts, rows, shape in ctx.runs:
            if rows.start == rows.stop:
                if grad_w_EIO is not None:
                    grad_w_EIO[experts].zero_()
                continue
            grad = grad_RO[rows].view(shape)
            if grad_x_RI is not None:
                torch.bmm(grad, w_EIO[experts].mT, out=grad_x_RI[rows].view(shape))
            if grad_w_EIO is not None:
                torch.bmm(x_RI[rows].view(shape).mT, grad, out=grad_w_EIO[experts])
            if grad_b_EO is not None:
                torch.sum(grad, dim=1, out=grad_b_EO[experts])
        return grad_x_RI, grad_w_EIO, grad_b_EO, None
