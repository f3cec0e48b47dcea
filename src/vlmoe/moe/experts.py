"""Feed-forward layers: one dense, and E of them with stacked weights (E, in, out).

Shape suffixes: R rows in expert order · D width · H hidden · U = H, or 2H for swiglu · E experts · C slots per expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmoe.moe.backends import BACKENDS, RUN, slots_for
from vlmoe.moe.dispatch import Groups, Slots

ACTIVATIONS = ("gelu", "relu", "swiglu")
INIT_STD = 0.02

Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def activate(u: Tensor, activation: str, inner_norm: bool) -> Tensor:
    """From the first product's U columns to H hidden units.

    gelu is the exact one. swiglu multiplies silu of the first half with the second half. inner_norm is Magneto's
    sub-LN: a LayerNorm over the hidden units, here without scale and shift, which the linear layer that follows
    absorbs (its rows are scaled, its bias moved).
    """
    h = _SwiGLU.apply(u) if activation == "swiglu" else getattr(F, activation)(u)
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
        """(..., D) to (..., D), in x's dtype, to which the weights are cast; under autocast in its dtype."""
        w1, b1, w2, b2 = _cast((self.w1, self.b1, self.w2, self.b2), x.dtype)
        return F.linear(activate(F.linear(x, w1.t(), b1), self.activation, self.inner_norm), w2.t(), b2)


class Experts(nn.Module):
    """E feed-forward layers of one shape. `w1[e], b1[e], w2[e], b2[e]` are what a `FeedForward` holds.

    held: the experts that are computed here, whose rows `forward` is given: all of them. Other modules may read this
    and the options, but no parameter: when experts lie on several processes, only `forward` finds them whole.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        activation: str = "gelu",
        bias: bool = True,
        inner_norm: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(width, hidden, activation)
        if experts < 1:
            raise ValueError(f"experts: expected at least 1, got {experts}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a share from 0 to below 1, got {dropout}")
        self.num_experts = self.held = experts
        self.activation, self.inner_norm, self.dropout = activation, inner_norm, dropout
        self.backend = "grouped" if backend == "auto" else backend
        self.w1, self.b1, self.w2, self.b2 = _weights((experts,), width, hidden, activation, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert on its own like a dense layer: truncated normal weights of std 0.02, zero biases."""
        _reset(self)

    def slots(self) -> Slots | None:
        """How many rows each expert should get from a dispatcher."""
        return slots_for(self.backend)

    def weights(self) -> Weights:
        """w1, b1, w2, b2 of the experts held here, for `forward`."""
        return self.w1, self.b1, self.w2, self.b2

    def forward(self, x_RD: Tensor, groups: Groups) -> Tensor:
        """y_RD: each row through its expert, in x_RD's dtype, to which the weights are cast. Autocast must be off."""

        def act(u: Tensor) -> Tensor:
            h = activate(u, self.activation, self.inner_norm)
            return F.dropout(h, self.dropout) if self.training and self.dropout else h

        return RUN[self.backend](x_RD, groups, *_cast(self.weights(), x_RD.dtype), act)


class _SwiGLU(torch.autograd.Function):
    """silu(first half) * second half. Keeps only its input, and writes both halves of the gradient into one tensor,
    where plain autograd keeps silu as well and joins the halves by a copy."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        gate, up = u.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        gate, up = u.chunk(2, dim=-1)
        grad_u = torch.empty_like(u)
        grad_gate, grad_up = grad_u.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad_h * up, gate, grad_input=grad_gate)
        torch.mul(grad_h, F.silu(gate), out=grad_up)
        return grad_u


def check_sizes(width: int, hidden: int, activation: str) -> None:
    for name, value in (("width", width), ("hidden", hidden)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    w1, b1, w2, b2 = weights
    b1, b2 = (None if b is None else b.to(dtype) for b in (b1, b2))
    return w1.to(dtype), b1, w2.to(dtype), b2


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
