"""Bring tokens into expert order, and back.

A `Plan` says which row of the buffer holds which choice of which token. Every expert has its rows in one piece, in the
order of experts; a backend may ask for more rows than an expert needs, and the rest are fillers. Both directions are
gathers, forward and backward: a choice has at most one row.

Shape suffixes: N tokens · K chosen experts of a token · A = N*K choices · D width · E experts · R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmoe.moe.routing import Routing

PRIORITIES = ("batch", "arrival", "first_batch", "first_arrival")

Slots = Callable[[list[int]], list[int]]  # how many rows each expert gets, from how many it needs


@dataclass(frozen=True)
class Plan:
    """token_of_row_R: whose token a row holds. choice_of_row_R: which of the A choices. used_R: False at fillers, which
    hold some token but are never read; None when there are no fillers. row_of_choice_NK: a choice's row; any where it
    has none. kept_NK: False for padding and choices dropped for capacity; None when all are kept.
    count_E: rows each expert needs. slots: rows each expert has, on the host; None on a GPU when they are `count_E`,
    which need not travel to the host then, and fillers stand at the end.
    """

    token_of_row_R: Tensor
    choice_of_row_R: Tensor
    used_R: Tensor | None
    row_of_choice_NK: Tensor
    kept_NK: Tensor | None
    count_E: Tensor
    slots: list[int] | None

    @property
    def rows(self) -> int:
        return len(self.token_of_row_R)

    def split(self, experts: int) -> tuple[Plan, Plan]:
        """The rows of the first `experts` experts and those of the rest, each to be computed by its own stack. What
        `combine` needs stays with the whole plan."""
        start = sum(self.host_slots()[:experts])
        first, rest = (slice(None, start), slice(None, experts)), (slice(start, None), slice(experts, None))
        return self._piece(*first), self._piece(*rest)

    def _piece(self, rows: slice, experts: slice) -> Plan:
        return Plan(
            self.token_of_row_R[rows],
            self.choice_of_row_R[rows],
            None if self.used_R is None else self.used_R[rows],
            self.row_of_choice_NK,
            self.kept_NK,
            self.count_E[experts],
            None if self.slots is None else self.slots[experts],
        )

    def host_slots(self) -> list[int]:
        """Rows of each expert as numbers; waits for the device when they are not yet on the host."""
        return self.count_E.tolist() if self.slots is None else self.slots


def plan_dispatch(
    routing: Routing,
    mask_N: Tensor | None = None,
    *,
    capacity_factor: float | None = None,
    priority: str = "batch",
    slots: Slots | None = None,
) -> Plan:
    """Give every choice that is kept a row.

    Each expert takes at most ceil(capacity_factor * K * real tokens / E) choices; None takes all. priority, of those
    that want a place: "batch" the choices of largest gate, "arrival" those of the first tokens, whose second choices
    may then displace later tokens' first ones. "first_batch" and "first_arrival" place all first choices, then all
    second ones and so on (GShard, V-MoE): within them the tokens of largest gate, which is V-MoE's batch priority
    routing, or the first tokens, its vanilla one.
    slots: how many rows an expert gets, at least as many as it needs; None for exactly as many.
    Everything follows from integer outputs of `argmax`, `topk` and `sort`, so that a recomputation can replay it.
    """
    index_NK = routing.expert_index_NK
    (N, K), E = index_NK.shape, routing.logits_NE.shape[1]
    key_A = index_NK.reshape(-1)
    real_NK = routing.chosen_NK
    if mask_N is not None:
        token_NK = mask_N[:, None].expand(N, K)
        real_NK = token_NK if real_NK is None else real_NK & token_NK
    if real_NK is not None:  # padding belongs to expert E, which does not exist: it sorts last and is never counted
        key_A = torch.where(real_NK.reshape(-1), key_A, E)
    ahead_A = None if capacity_factor is None else _in_turn(routing.gate_NK.detach(), priority)
    order_A, count_E = _sort_by_expert(key_A, E, ahead_A)
    kept_A = None if real_NK is None else key_A < E
    if capacity_factor is not None:
        real = N if mask_N is None else mask_N.sum()
        capacity = _capacity(capacity_factor * K / E, real)
        rank_A = _rank_in_expert(key_A, order_A, count_E)
        kept_A = (rank_A < capacity) & (key_A < E)
        order_A, count_E = _sort_by_expert(torch.where(kept_A, key_A, E), E, None)
    return _lay_out(order_A, count_E, kept_A, (N, K), slots)


def _capacity(share: float, real: int | Tensor) -> int | Tensor:
    """Choices an expert may take: a number where the count of tokens is one, a tensor where only the device knows it.
    The small term keeps 1.1 * 10 from rounding up to 12."""
    if isinstance(real, int):
        return math.ceil(real * share - 1e-6)
    return torch.ceil(real.double() * share - 1e-6).to(torch.int64)


def _in_turn(gate_NK: Tensor, priority: str) -> Tensor | None:
    """The choices, those that get a place first first; None: as they come."""
    (N, K), device = gate_NK.shape, gate_NK.device
    if priority == "arrival" or (priority == "first_arrival" and K == 1):
        return None
    if priority == "batch":
        return gate_NK.reshape(-1).argsort(descending=True, stable=True)
    if priority == "first_batch":
        token_N = gate_NK.amax(dim=1).argsort(descending=True, stable=True)
    else:
        token_N = torch.arange(N, device=device)
    return (token_N * K + torch.arange(K, device=device)[:, None]).reshape(-1)


def _sort_by_expert(key_A: Tensor, E: int, ahead_A: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choices in expert order, within an expert as in `ahead_A` or else as they came; and how many each expert has."""
    count_E = key_A.new_zeros(E + 1).scatter_add_(0, key_A, torch.ones_like(key_A))[:E]
    if ahead_A is None:
        return key_A.argsort(stable=True), count_E
    return ahead_A[key_A[ahead_A].argsort(stable=True)], count_E


def _rank_in_expert(key_A: Tensor, order_A: Tensor, count_E: Tensor) -> Tensor:
    """How many choices of the same expert come before each choice."""
    start_E1 = torch.cat([count_E.new_zeros(1), count_E.cumsum(0)])
    place_A = torch.arange(len(order_A), device=order_A.device)
    return torch.empty_like(order_A).scatter_(0, order_A, place_A) - start_E1[key_A]


def _lay_out(
    order_A: Tensor, count_E: Tensor, kept_A: Tensor | None, shape: tuple[int, int], slots: Slots | None
) -> Plan:
    """Rows for choices that `order_A` lists by expert, those without a row last."""
    (N, K), device = shape, order_A.device
    kept_NK = None if kept_A is None else kept_A.view(N, K)
    if slots is None and not _on_host(device):  # how many choices are kept is only known on the device
        used_R = None if kept_A is None else kept_A[order_A]
        row_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(N * K, device=device))
        return Plan(order_A // K, order_A, used_R, row_A.view(N, K), kept_NK, count_E, None)
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
    return Plan(choice_of_row_R // K, choice_of_row_R, used_R, row_of_choice_A.view(N, K), kept_NK, count_E, given)


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu"


def dispatch(x_ND: Tensor, plan: Plan) -> Tensor:
    """x_RD: each row's token."""
    return _Dispatch.apply(x_ND, plan)


def combine(y_RD: Tensor, gate_NK: Tensor, plan: Plan) -> Tensor:
    """y_ND: the sum of each token's kept rows, weighted by their gates; zero for a token without any."""
    return _Combine.apply(y_RD, gate_NK, plan)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.token_of_row_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _rows_of_tokens(grad_RD, ctx.plan, None), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gate_NK: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_RD, gate_NK)
        return _rows_of_tokens(y_RD, plan, gate_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, gate_NK = ctx.saved_tensors
        plan: Plan = ctx.plan
        grad_RD = grad_ND.index_select(0, plan.token_of_row_R)
        slope_R = (grad_RD * y_RD).sum(dim=-1, dtype=gate_NK.dtype)
        gate_R = gate_NK.reshape(-1)[plan.choice_of_row_R] if plan.rows else gate_NK.new_zeros(0)
        if plan.used_R is not None:
            gate_R = gate_R.masked_fill(~plan.used_R, 0)
        grad_gate_NK = slope_R[plan.row_of_choice_NK] if plan.rows else torch.zeros_like(gate_NK)
        if plan.kept_NK is not None:
            grad_gate_NK = grad_gate_NK.masked_fill(~plan.kept_NK, 0)
        return grad_RD.mul_(gate_R[:, None]).to(y_RD.dtype), grad_gate_NK, None


def _rows_of_tokens(rows_RD: Tensor, plan: Plan, gate_NK: Tensor | None) -> Tensor:
    """The (weighted) sum of each token's rows, in the rows' dtype; products and sums in the gates'."""
    N, K = plan.row_of_choice_NK.shape
    if plan.rows == 0:
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
