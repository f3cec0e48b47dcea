"""Who gets which row, who is dropped, and the way there and back."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe.moe.capacity import keep_choices
from vlmoe.moe.dispatch import Groups, LocalDispatcher, Plan, Slots, lay_out, permute, unpermute
from vlmoe.moe.routing import Routing, route


def chosen(index: list[list[int]], gate: list[list[float]], experts: int) -> Routing:
    index_NK, gate_NK = torch.tensor(index), torch.tensor(gate)
    probs_NE = torch.zeros(len(index), experts)
    return Routing(index_NK, gate_NK, probs_NE, probs_NE, probs_NE, 0.0)


def plan_of(
    routing: Routing,
    mask: torch.Tensor | None = None,
    capacity_factor: float | None = None,
    priority: str = "batch",
    slots: Slots | None = None,
) -> Plan:
    kept_NK = keep_choices(routing, mask, capacity_factor, priority)
    return lay_out(routing.expert_index_NK, kept_NK, routing.logits_NE.shape[1], slots)


GATES = [[0.4], [0.9], [0.6], [0.8], [0.5], [0.7]]
ALL_TO_ONE = chosen([[1]] * 6, GATES, 2)


@pytest.mark.parametrize(
    ("priority", "kept"),
    [("batch", [False, True, False, True, False, True]), ("arrival", [True, True, True, False, False, False])],
)
def test_priority_decides_who_is_kept(priority: str, kept: list[bool]) -> None:
    # capacity ceil(1.0 * 1 * 6 / 2) = 3
    plan = plan_of(ALL_TO_ONE, capacity_factor=1.0, priority=priority)
    assert plan.kept_NK is not None
    assert plan.kept_NK[:, 0].tolist() == kept
    assert plan.groups.count_E.tolist() == [0, 3]


@pytest.mark.parametrize(("factor", "capacity"), [(0.1, 1), (1.0, 3), (1.01, 4), (2 / 3, 2), (5.0, 6)])
def test_capacity_rounds_up(factor: float, capacity: int) -> None:
    assert plan_of(ALL_TO_ONE, capacity_factor=factor).groups.count_E.tolist() == [0, capacity]


def test_padding_takes_no_capacity() -> None:
    # Four real tokens: capacity 2. The largest gate of all is padding.
    mask = torch.tensor([True, False, True, True, True, False])
    plan = plan_of(ALL_TO_ONE, mask, capacity_factor=1.0)
    assert plan.kept_NK is not None
    assert plan.kept_NK[:, 0].tolist() == [False, False, True, True, False, False]


def test_second_choices_count() -> None:
    # Capacity ceil(1 * 2 * 3 / 3) = 2: expert 0 is chosen three times, its smallest gate (.3) goes.
    routing = chosen([[0, 1], [2, 0], [0, 2]], [[0.6, 0.4], [0.7, 0.3], [0.5, 0.4]], 3)
    plan = plan_of(routing, capacity_factor=1.0)
    assert plan.kept_NK is not None
    assert plan.kept_NK.tolist() == [[True, True], [True, False], [True, True]]


@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        ("batch", ["1", "2", "", "1", "1"]),
        ("arrival", ["12", "12", "", "", ""]),
        ("first_arrival", ["1", "1", "1", "1", ""]),
        ("first_batch", ["1", "", "1", "1", "1"]),
    ],
)
def test_first_choices_may_come_first(priority: str, kept: list[str]) -> None:
    """Each expert has two places: ceil(.4 * 2 * 5 / 2). kept: which of each token's choices."""
    index = [[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]]
    gate = [[0.5, 0.4], [0.55, 0.45], [0.42, 0.3], [0.9, 0.1], [0.6, 0.05]]
    plan = plan_of(chosen(index, gate, 2), capacity_factor=0.4, priority=priority)
    assert plan.kept_NK is not None and plan.groups.count_E.tolist() == [2, 2]
    assert ["1" * first + "2" * second for first, second in plan.kept_NK.tolist()] == kept


def vmoe_kept(index: list[list[int]], gate: list[list[float]], experts: int, capacity: int, batch: bool) -> list[Any]:
    """V-MoE's Top-Experts-Per-Item routing, choice by choice."""
    order = sorted(range(len(index)), key=lambda n: -gate[n][0]) if batch else range(len(index))
    filled, kept = [0] * experts, [[False] * len(index[0]) for _ in index]
    for j in range(len(index[0])):
        for n in order:
            kept[n][j] = filled[index[n][j]] < capacity
            filled[index[n][j]] += 1
    return kept


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0])
def test_first_choices_first_is_what_vmoe_does(k: int, factor: float) -> None:
    torch.manual_seed(k)
    routing = route(2 * torch.randn(30, 5), k)
    index, gate = routing.expert_index_NK.tolist(), routing.gate_NK.tolist()
    capacity = math.ceil(factor * k * 30 / 5)
    for priority, batch in (("first_batch", True), ("first_arrival", False)):
        plan = plan_of(routing, capacity_factor=factor, priority=priority)
        assert plan.kept_NK is not None
        assert plan.kept_NK.tolist() == vmoe_kept(index, gate, 5, capacity, batch)


def test_combine_by_hand() -> None:
    routing = chosen([[0, 1], [1, 0]], [[0.75, 0.25], [0.5, 0.5]], 2)
    plan = plan_of(routing)
    x = torch.tensor([[1.0], [10.0]])
    rows = permute(x, plan)
    assert rows[:, 0].tolist() == [1, 10, 1, 10]
    y = rows * torch.tensor([[2.0], [2.0], [3.0], [3.0]])  # expert 0 doubles, expert 1 triples
    assert unpermute(y, routing.gate_NK, plan)[:, 0].tolist() == [0.75 * 2 + 0.25 * 3, 0.5 * 30 + 0.5 * 20]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_plan_holds_for_any_shape(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, experts))
    tokens = data.draw(st.integers(0, 20))
    factor = data.draw(st.none() | st.floats(0.1, 3))
    priority = data.draw(st.sampled_from(["batch", "arrival"]))
    extra = data.draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    routing = route(torch.randn(tokens, experts), k)
    mask = torch.rand(tokens) > 0.3 if data.draw(st.booleans()) else None
    plan = plan_of(
        routing,
        mask,
        capacity_factor=factor,
        priority=priority,
        slots=lambda need: [n + e for n, e in zip(need, extra, strict=True)],
    )
    real = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    kept = torch.ones(tokens, k, dtype=torch.bool) if plan.kept_NK is None else plan.kept_NK
    assert not kept[~real].any()
    starts = torch.tensor([0, *plan.groups.host_slots()]).cumsum(0)
    rows_used = []
    for e in range(experts):
        takes = routing.expert_index_NK == e
        assert plan.groups.count_E[e] == (kept & takes).sum()
        for n, j in (kept & takes).nonzero().tolist():  # every kept choice has a row of its expert with its token
            row = int(plan.row_of_choice_NK[n, j])
            assert starts[e] <= row < starts[e + 1]
            assert plan.token_of_row_R[row] == n
            assert plan.choice_of_row_R[row] == n * k + j
            rows_used.append(row)
        waiting = takes & real[:, None]
        dropped = waiting & ~kept
        if factor is None:
            assert not dropped.any()
        elif dropped.any():
            if priority == "batch":
                assert routing.gate_NK[waiting & kept].min() >= routing.gate_NK[dropped].max()
            else:
                assert (waiting & kept).nonzero()[:, 0].max() < dropped.nonzero()[:, 0].min()
            full = -(-factor * k * int(real.sum()) // experts)
            assert (
                abs(int(plan.groups.count_E[e]) - full) <= 1e-9
                or abs(factor * k * int(real.sum()) / experts % 1) < 1e-5
            )
    assert len(set(rows_used)) == len(rows_used)
    if plan.used_R is not None:
        assert sorted(rows_used) == plan.used_R.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [None, 0.8])
@pytest.mark.parametrize("fillers", [0, 2])
def test_gradients_of_dispatch_and_combine(k: int, factor: float | None, fillers: int) -> None:
    torch.manual_seed(0)
    routing = route(torch.randn(7, 3, dtype=torch.float64), k)
    mask = torch.tensor([True] * 6 + [False])
    plan = plan_of(routing, mask, capacity_factor=factor, slots=lambda need: [n + fillers for n in need])
    scale = torch.rand(plan.groups.rows, 1, dtype=torch.float64) + 0.5

    def there_and_back(x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return unpermute(permute(x, plan) * scale, gate, plan)

    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    gate = routing.gate_NK.clone().requires_grad_()
    assert torch.autograd.gradcheck(there_and_back, (x, gate))
    assert torch.autograd.gradcheck(there_and_back, (x,))
    torch.testing.assert_close(there_and_back(x), there_and_back(x, torch.ones_like(gate)))


def test_rows_in_order_stay_where_they_are() -> None:
    routing, dispatcher = route(torch.randn(9, 3), 2), LocalDispatcher()
    x_RD, groups, _ = dispatcher.dispatch(torch.randn(9, 4), routing, None, None)
    sent, same, ticket = dispatcher.send(x_RD, groups, None)
    assert sent is x_RD and same == groups
    assert dispatcher.fetch(sent, ticket) is x_RD


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6), first=st.integers(0, 6), fillers=st.integers(0, 2))
def test_groups_of_two_stacks(sizes: list[int], first: int, fillers: int) -> None:
    """Rows of a first stack of experts and of the rest; fillers at the end are the rest's."""
    groups = Groups(torch.tensor(sizes), None, sum(sizes) + fillers)
    own, others = groups.split(first)
    assert own.host_slots() + others.host_slots() == sizes and own.count_E.tolist() == sizes[:first]
    assert own.rows == sum(sizes[:first]) and own.rows + others.rows == groups.rows
