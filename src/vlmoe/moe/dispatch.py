"""Bring tokens into expert order, and back.

A `Dispatcher` is how the layer reaches its experts: it takes tokens to the experts that are computed here and brings
back what these make of them. `LocalDispatcher` is the one for experts that are all here.

A `Plan` says which row of the buffer holds which choice of which token. Every expert has its rows in one piece, in the
order of experts; a backend may ask for more rows than an expert needs, and the rest are fillers. Both directions are
gathers, forward and backward: a choice has at most one row.

Shape suffixes: N tokens · K chosen experts of a token · A = N*K choices · D width · E experts · R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmoe.moe.capacity import expert_keys, sort_by_expert
from vlmoe.moe.routing import Routing

Slots = Callable[[list[int]], list[int]]  # how many rows each expert gets, from how many it needs


@dataclass(frozen=True)
class Groups:
    """How rows belong to experts: those of each in one piece, in the order of experts.

    count_E: rows each expert needs. slots: rows each expert has, on the host; None on a GPU when they are `count_E`,
    which need not travel to the host then. rows: of all; those after the last expert's are fillers.
    """

    count_E: Tensor
    slots: list[int] | None
    rows: int

    def host_slots(self) -> list[int]:
        """Rows of each expert as numbers; waits for the device when they are not yet on the host."""
        return self.count_E.tolist() if self.slots is None else self.slots

    def split(self, experts: int) -> tuple[Groups, Groups]:
        """The rows of the first `experts` experts and those of the rest, each to be computed by its own stack."""
        slots = self.host_slots()
        start = sum(slots[:experts])
        return (
            Groups(self.count_E[:experts], slots[:experts], start),
            Groups(self.count_E[experts:], slots[experts:], self.rows - start),
        )


class Dispatcher(Protocol):
    """Between the tokens here and experts anywhere. The ticket is what it needs to find the way back.

    slots: how many rows the experts want (`Experts.slots`). Tensors keep their dtype, and have gradients both ways.
    """

    def dispatch(
        self, x_ND: Tensor, routing: Routing, kept_NK: Tensor | None, slots: Slots | None
    ) -> tuple[Tensor, Groups, Any]:
        """x_RD, a row for each kept choice of one of the experts that are computed here, their groups and a ticket.
        kept_NK: see `keep_choices`."""
        ...

    def combine(self, y_RD: Tensor, gate_NK: Tensor, ticket: Any) -> Tensor:
        """y_ND: the sum of each token's kept rows, weighted by their gates; zero for a token without any."""
        ...

    def send(self, x_RD: Tensor, groups: Groups, slots: Slots | None) -> tuple[Tensor, Groups, Any]:
        """For who makes rows instead of choosing tokens: rows in the order of all experts, to those computed here."""
        ...

    def fetch(self, y_RD: Tensor, ticket: Any) -> Tensor:
        """The way back of `send`: a row for each one sent."""
        ...


class LocalDispatcher:
    """For experts that are all here: tokens change their order, rows in order stay where they are."""

    def dispatch(
        self, x_ND: Tensor, routing: Routing, kept_NK: Tensor | None, slots: Slots | None
    ) -> tuple[Tensor, Groups, Plan]:
        plan = lay_out(routing.expert_index_NK, kept_NK, routing.logits_NE.shape[1], slots)
        return permute(x_ND, plan), plan.groups, plan

    def combine(self, y_RD: Tensor, gate_NK: Tensor, ticket: Plan) -> Tensor:
        return unpermute(y_RD, gate_NK, ticket)

    def send(self, x_RD: Tensor, groups: Groups, slots: Slots | None) -> tuple[Tensor, Groups, None]:
        return x_RD, groups, None

    def fetch(self, y_RD: Tensor, ticket: None) -> Tensor:
        return y_RD


@dataclass(frozen=True)
class Plan:
    """token_of_row_R: whose token a row holds. choice_of_row_R: which of the A choices. used_R: False at fillers, which
    hold some token but are never read; None when there are no fillers. row_of_choice_NK: a choice's row; any where it
    has none. kept_NK: False at choices without a row; None when all have one."""

    token_of_row_R: Tensor
    choice_of_row_R: Tensor
    used_R: Tensor | None
    row_of_choice_NK: Tensor
    kept_NK: Tensor | None
    groups: Groups


def lay_out(index_NK: Tensor, kept_NK: Tensor | None, experts: int, slots: Slots | None = None) -> Plan:
    """Give every choice that is kept a row; those of an expert stand as their tokens do.

    slots: how many rows an expert gets, at least as many as it needs; None for exactly as many.
    Everything follows from the integer output of one `sort`, so that a recomputation can replay it.
    """
    (N, K), device = index_NK.shape, index_NK.device
    order_A, count_E = sort_by_expert(expert_keys(index_NK, kept_NK, experts), experts)
    if slots is None and not _on_host(device):  # how many choices are kept is only known on the device
        used_R = None if kept_NK is None else kept_NK.reshape(-1)[order_A]
        row_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(N * K, device=device))
        groups = Groups(count_E, None, N * K)
        return Plan(order_A // K, order_A, used_R, row_A.view(N, K), kept_NK, groups)
    need = count_E.tolist()
    given = need if slots is None else slots(need)
    used, rows = sum(need), sum(given)
    order_A = order_A[:used]
    row_A = torch.arange(used, device=device)
    if rows > used:  # each expert's rows move up by the fillers before it
        fillers_E = torch.tensor(given).cumsum(0) - torch.tensor(need).cumsum(0)
        shift_E = torch.cat([fillers_E.new_zeros(1), fillers_E[:-1]]).to(device)
        row_A = row_A + shift_E.repeat_interleave(count_E, output_size=used)
    choice_of_row_R = order_A if rows == used else order_A.new_zeros(rows).scatter_(0, row_A, order_A)
    used_R = None if rows == used else torch.zeros(rows, dtype=torch.bool, device=device).index_fill_(0, row_A, True)
    row_of_choice_A = order_A.new_zeros(N * K).scatter_(0, order_A, row_A)
    groups = Groups(count_E, given, rows)
    return Plan(choice_of_row_R // K, choice_of_row_R, used_R, row_of_choice_A.view(N, K), kept_NK, groups)


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu"


def permute(x_ND: Tensor, plan: Plan) -> Tensor:
    """x_RD: each row's token."""
    return _Permute.apply(x_ND, plan)


def unpermute(y_RD: Tensor, gate_NK: Tensor | None, plan: Plan) -> Tensor:
    """y_ND: the sum of each token's kept rows, weighted by their gates, if any; zero for a token without any."""
    return _Unpermute.apply(y_RD, gate_NK, plan)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.token_of_row_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _rows_of_tokens(grad_RD, ctx.plan, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gate_NK: Tensor | None, plan: Plan) -> Tensor:
        ctx.plan, ctx.weighted = plan, gate_NK is not None
        if gate_NK is not None:
            ctx.save_for_backward(y_RD, gate_NK)
        return _rows_of_tokens(y_RD, plan, gate_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor | None, None]:
        plan: Plan = ctx.plan
        grad_RD = grad_ND.index_select(0, plan.token_of_row_R)
        if not ctx.weighted:
            return grad_RD if plan.used_R is None else grad_RD.masked_fill_(~plan.used_R[:, None], 0), None, None
        y_RD, gate_NK = ctx.saved_tensors
        rows = plan.groups.rows
        slope_R = (grad_RD * y_RD).sum(dim=-1, dtype=gate_NK.dtype)
        gate_R = gate_NK.reshape(-1)[plan.choice_of_row_R] if rows else gate_NK.new_zeros(0)
        if plan.used_R is not None:
            gate_R = gate_R.masked_fill(~plan.used_R, 0)
        grad_gate_NK = slope_R[plan.row_of_choice_NK] if rows else torch.zeros_like(gate_NK)
        if plan.kept_NK is not None:
            grad_gate_NK = grad_gate_NK.masked_fill(~plan.kept_NK, 0)
        return grad_RD.mul_(gate_R[:, None]).to(y_RD.dtype), grad_gate_NK, None


def _rows_of_tokens(rows_RD: Tensor, plan: Plan, gate_NK: Tensor | None) -> Tensor:
    """The (weighted) sum of each token's rows, in the rows' dtype; products and sums in the gates'."""
    N, K = plan.row_of_choice_NK.shape
    if plan.groups.rows == 0:
        return rows_RD.new_zeros(N, rows_RD.shape[1])
    if plan.kept_NK is not None and gate_NK is None:
        gate_NK = torch.ones_like(plan.kept_NK, dtype=rows_RD.dtype)
    if plan.kept_NK is not None and gate_NK is not None:
        gate_NK = gate_NK.masked_fill(~plan.kept_NK, 0)
    total_ND = rows_RD.index_select(0, plan.row_of_choice_NK[:, 0])
    if gate_NK is not None:
        total_ND = total_ND * gate_NK[:, 0, None]
    for j in range(1, K):
        rows_ND = rows_RD.index_select(0, plan.row_of_choice_NK[:, j])
        total_ND = (
            total_ND + rows_ND
            if gate_NK is None
            else torch.addcmul(total_ND, rows_ND.to(total_ND.dtype), gate_NK[:, j, None])
        )
    return total_ND.to(rows_RD.dtype)
