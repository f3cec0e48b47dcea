"""Which choices find a place with their expert.

Shape suffixes: N tokens · K chosen experts of a token · A = N*K choices · E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmoe.moe.routing import Routing

PRIORITIES = ("batch", "arrival", "first_batch", "first_arrival")


def keep_choices(
    routing: Routing, mask_N: Tensor | None = None, capacity_factor: float | None = None, priority: str = "batch"
) -> Tensor | None:
    """kept_NK: False at padding, where a token has fewer than K experts, and where the expert is full; None when all
    choices are kept.

    Each expert takes at most ceil(capacity_factor * K * real tokens / E) choices; None takes all. priority, of those
    that want a place: "batch" the choices of largest gate, "arrival" those of the first tokens, whose second choices
    may then displace later tokens' first ones. "first_batch" and "first_arrival" place all first choices, then all
    second ones and so on (GShard, V-MoE): within them the tokens of largest gate, which is V-MoE's batch priority
    routing, or the first tokens, its vanilla one.
    Everything follows from integer outputs of `argmax`, `topk` and `sort`, so that a recomputation can replay it.
    """
    index_NK = routing.expert_index_NK
    (N, K), E = index_NK.shape, routing.logits_NE.shape[1]
    real_NK = routing.chosen_NK
    if mask_N is not None:
        token_NK = mask_N[:, None].expand(N, K)
        real_NK = token_NK if real_NK is None else real_NK & token_NK
    if capacity_factor is None:
        return real_NK
    key_A = expert_keys(index_NK, real_NK, E)
    order_A, count_E = sort_by_expert(key_A, E, _in_turn(routing.gate_NK.detach(), priority))
    real = N if mask_N is None else mask_N.sum()
    capacity = _capacity(capacity_factor * K / E, real)
    return ((_rank_in_expert(key_A, order_A, count_E) < capacity) & (key_A < E)).view(N, K)


def expert_keys(index_NK: Tensor, kept_NK: Tensor | None, experts: int) -> Tensor:
    """key_A: the expert of each choice. What is not kept belongs to expert E, which does not exist: it sorts last and
    is never counted."""
    key_A = index_NK.reshape(-1)
    return key_A if kept_NK is None else torch.where(kept_NK.reshape(-1), key_A, experts)


def sort_by_expert(key_A: Tensor, experts: int, ahead_A: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choices in expert order, within an expert as in `ahead_A` or else as they came; and how many each expert has."""
    count_E = key_A.new_zeros(experts + 1).scatter_add_(0, key_A, torch.ones_like(key_A))[:experts]
    if ahead_A is None:
        return key_A.argsort(stable=True), count_E
    return ahead_A[key_A[ahead_A].argsort(stable=True)], count_E


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


def _rank_in_expert(key_A: Tensor, order_A: Tensor, count_E: Tensor) -> Tensor:
    """How many choices of the same expert come before each choice."""
    start_E1 = torch.cat([count_E.new_zeros(1), count_E.cumsum(0)])
    place_A = torch.arange(len(order_A), device=order_A.device)
    return torch.empty_like(order_A).scatter_(0, order_A, place_A) - start_E1[key_A]
