"""Ways to compute E feed-forward layers on rows in expert order. One signature, the same numbers.

`loop` is the oracle: one expert after the other, plain autograd. `padded` is one batched product over experts with
equally many rows each. `grouped` is torch's grouped product, and the loop where that does not serve. `slots_for` says
how many rows per expert a backend wants.

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

from vlmoe.moe.dispatch import Groups, Slots

ALIGNED = 16  # bytes, of which the rows of a matrix are a multiple where the grouped kernel is to take it

Activation = Callable[[Tensor], Tensor]
Backend = Callable[[Tensor, Groups, Tensor, Tensor | None, Tensor, Tensor | None, Activation], Tensor]


def run_loop(
    x_RD: Tensor, groups: Groups, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """Fillers at the end come out as zero."""
    sizes = groups.host_slots()
    parts = x_RD.split([*sizes, groups.rows - sum(sizes)])
    none = [None] * len(sizes)
    w1s, w2s = w1.unbind(), w2.unbind()
    b1s, b2s = none if b1 is None else b1.unbind(), none if b2 is None else b2.unbind()
    y = [F.linear(act(F.linear(x, w1s[e].t(), b1s[e])), w2s[e].t(), b2s[e]) for e, x in enumerate(parts[:-1])]
    return torch.cat([*y, torch.zeros_like(parts[-1])])


def run_padded(
    x_RD: Tensor, groups: Groups, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    x_ECD = x_RD.view(len(w1), groups.rows // len(w1), x_RD.shape[1])
    u_ECU = torch.bmm(x_ECD, w1) if b1 is None else torch.baddbmm(b1[:, None], x_ECD, w1)
    h_ECH = act(u_ECU)
    y_ECD = torch.bmm(h_ECH, w2) if b2 is None else torch.baddbmm(b2[:, None], h_ECH, w2)
    return y_ECD.flatten(0, 1)


def run_grouped(
    x_RD: Tensor, groups: Groups, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    if not has_kernel((w1, w2), x_RD.dtype):
        return run_loop(x_RD, groups, w1, b1, w2, b2, act)
    ends_E = _ends(groups)
    return _grouped_linear(act(_grouped_linear(x_RD, w1, b1, ends_E)), w2, b2, ends_E)


RUN: dict[str, Backend] = {"loop": run_loop, "padded": run_padded, "grouped": run_grouped}
BACKENDS = ("auto", *RUN)


def slots_for(backend: str) -> Slots | None:
    """What to give a dispatcher for this backend."""
    return (lambda need: [max(need)] * len(need)) if backend == "padded" else None


def has_kernel(weights: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether torch's grouped product serves these weights: on a CPU, and on an Ampere GPU or newer, with rows that are
    multiples of 16 bytes as it demands."""
    device = weights[0].device
    return (
        (device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)))
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(n * dtype.itemsize % ALIGNED == 0 for w in weights for n in w.shape[1:])
    )


def _ends(groups: Groups) -> Tensor:
    """The row after each expert's last. Fillers at the end go through the last expert: a kernel leaves rows past its
    last offset uninitialised, and those might hold nan. Their gradient is zero, so the expert's is right."""
    ends_E = groups.count_E.cumsum(0).to(torch.int32)
    ends_E[-1] = groups.rows
    return ends_E


def _grouped_linear(x_RI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, ends_E: Tensor) -> Tensor:
    y_RO = F.grouped_mm(x_RI, w_EIO, offs=ends_E)
    return y_RO if b_EO is None else _AddBias.apply(y_RO, b_EO, ends_E)


class _AddBias(torch.autograd.Function):
    """y + b, each row with its expert's bias. The bias's gradient is a grouped product with ones, which adds up in
    float32 and rounds once, in the same order every time; that of an index adds row by row, in the rows' dtype."""

    @staticmethod
    def forward(ctx: Any, y_RO: Tensor, b_EO: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        rows_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        return y_RO + b_EO.repeat_interleave(rows_E, dim=0, output_size=len(y_RO))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (ends_E,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad_RO, None, None
        ones_R = grad_RO.new_ones(len(grad_RO), ALIGNED // grad_RO.itemsize)
        grad_EO = F.grouped_mm(ones_R.t(), grad_RO.contiguous(), offs=ends_E)[:, 0]
        return grad_RO, grad_EO, None
