"""Feed-forward layers: one dense, and E of them with stacked weights (E, in, out), in three ways of computing.

Shape suffixes: R rows in expert order · D width · H hidden · U = H, or 2H for swiglu · E experts · C slots per expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.moe.dispatch import Plan

ACTIVATIONS = ("gelu", "relu", "swiglu")
BACKENDS = ("auto", "loop", "padded", "grouped")
INIT_STD = 0.02


def activate(u: Tensor, activation: str, inner_norm: bool) -> Tensor:
    """From the first product's U columns to H hidden units.

    gelu is the exact one. swiglu multiplies silu of the first half with the second half. inner_norm is Magneto's
    sub-LN: a LayerNorm over the hidden units, here without scale and shift, which the linear layer that follows
    absorbs (its rows are scaled, its bias moved).
    """
    if activation == "swiglu":
        gate, up = u.chunk(2, dim=-1)
        h = F.silu(gate) * up
    else:
        h = F.gelu(u) if activation == "gelu" else F.relu(u)
    return F.layer_norm(h, h.shape[-1:]).to(u.dtype) if inner_norm else h


class FeedForward(nn.Module):
    """The dense feed-forward layer: w2(activation(w1 x)), weights stored (in, out) like one slice of `Experts`."""

    def __init__(
        self, width: int, hidden: int, activation: str = "gelu", bias: bool = True, inner_norm: bool = False
    ) -> None:
        super().__init__()
        check_sizes(width, hidden, activation)
        self.activation, self.inner_norm = activation, inner_norm
        self.w1, self.b1, self.w2, self.b2 = _weights((), width, hidden, activation, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of std 0.02, zero biases."""
        _reset(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        u = F.linear(x, self.w1.t(), self.b1)
        return F.linear(activate(u, self.activation, self.inner_norm), self.w2.t(), self.b2)


class Experts(nn.Module):
    """E feed-forward layers of one shape. `w1[e], b1[e], w2[e], b2[e]` are what a `FeedForward` holds."""

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        activation: str = "gelu",
        bias: bool = True,
        inner_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(width, hidden, activation)
        if experts < 1:
            raise ValueError(f"experts: expected at least 1, got {experts}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        self.activation, self.inner_norm, self.backend = activation, inner_norm, backend
        self.w1, self.b1, self.w2, self.b2 = _weights((experts,), width, hidden, activation, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert on its own like a dense layer: truncated normal weights of std 0.02, zero biases."""
        _reset(self)

    def pick_backend(self, dtype: torch.dtype) -> str:
        """The backend that serves tensors of this dtype on the weights' device."""
        if self.backend != "auto":
            return self.backend
        if self.w1.device.type == "cuda":
            return "grouped" if can_group(self.w1, dtype) and can_group(self.w2, dtype) else "padded"
        return "padded"

    def forward(self, x_RD: Tensor, plan: Plan, backend: str) -> Tensor:
        """y_RD: each row through its expert, in x_RD's dtype. backend must fit the plan's layout: "padded" needs slots,
        the others segments. Autocast must be off: the weights are cast to x_RD's dtype here."""
        w1, b1, w2, b2 = (None if p is None else p.to(x_RD.dtype) for p in (self.w1, self.b1, self.w2, self.b2))
        assert w1 is not None
        assert w2 is not None

        def act(u: Tensor) -> Tensor:
            return activate(u, self.activation, self.inner_norm)

        return _RUN[backend](x_RD, plan, w1, b1, w2, b2, act)


Activation = Callable[[Tensor], Tensor]


def run_loop(
    x_RD: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """One expert after the other, plain autograd: what the others are tested against."""
    parts, start = [], 0
    for e, size in enumerate(plan.host_sizes()):
        x = x_RD[start : start + size]
        h = act(F.linear(x, w1[e].t(), None if b1 is None else b1[e]))
        parts.append(F.linear(h, w2[e].t(), None if b2 is None else b2[e]))
        start += size
    return torch.cat([*parts, x_RD[start:] * 0])


def run_padded(
    x_RD: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """One batched product over experts with equally many rows each."""
    x_ECD = x_RD.view(w1.shape[0], -1, x_RD.shape[1]) if plan.rows else x_RD.view(w1.shape[0], 0, x_RD.shape[1])
    u_ECU = torch.bmm(x_ECD, w1) if b1 is None else torch.baddbmm(b1[:, None], x_ECD, w1)
    h_ECH = act(u_ECU)
    y_ECD = torch.bmm(h_ECH, w2) if b2 is None else torch.baddbmm(b2[:, None], h_ECH, w2)
    return y_ECD.flatten(0, 1)


def run_grouped(
    x_RD: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """torch's grouped product over segments of any length. Fillers at the end go through the last expert: the kernel
    leaves rows past its last offset uninitialised, and those might hold nan."""
    ends_E = plan.count_E.cumsum(0).to(torch.int32)
    ends_E[-1] = plan.rows
    rows_R = torch.arange(plan.rows, device=x_RD.device, dtype=torch.int32)
    expert_of_row_R = torch.searchsorted(ends_E, rows_R, right=True)
    u_RU = F.grouped_mm(x_RD, w1, offs=ends_E)
    if b1 is not None:
        u_RU = u_RU + b1.index_select(0, expert_of_row_R)
    y_RD = F.grouped_mm(act(u_RU), w2, offs=ends_E)
    return y_RD if b2 is None else y_RD + b2.index_select(0, expert_of_row_R)


_RUN = {"loop": run_loop, "padded": run_padded, "grouped": run_grouped}


def can_group(w_EIO: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product takes these weights: strides must be multiples of 16 bytes, the GPU Ampere or
    newer."""
    if w_EIO.device.type == "cuda" and torch.cuda.get_device_capability(w_EIO.device) < (8, 0):
        return False
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        n * dtype.itemsize % 16 == 0 for n in w_EIO.shape[1:]
    )


def check_sizes(width: int, hidden: int, activation: str) -> None:
    for name, value in (("width", width), ("hidden", hidden)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _weights(
    stack: tuple[int, ...], width: int, hidden: int, activation: str, bias: bool
) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter, nn.Parameter | None]:
    up = 2 * hidden if activation == "swiglu" else hidden
    return (
        nn.Parameter(torch.empty(*stack, width, up)),
        nn.Parameter(torch.empty(*stack, up)) if bias else None,
        nn.Parameter(torch.empty(*stack, hidden, width)),
        nn.Parameter(torch.empty(*stack, width)) if bias else None,
    )


@torch.no_grad()
def _reset(layer: FeedForward | Experts) -> None:
    for weight in (layer.w1, layer.w2):
        nn.init.trunc_normal_(weight, std=INIT_STD)
    for bias in (layer.b1, layer.b2):
        if bias is not None:
            nn.init.zeros_(bias)
