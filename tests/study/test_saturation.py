"""Where sparsity pays: points, bounds, crossings and pictures, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from vlmoe.study.compare import AT_LEAST, AT_MOST, Factor, compute_saved, frontiers, summarise
from vlmoe.study.draw import draw_frontier
from vlmoe.study.draw_map import _alike, draw_map
from vlmoe.study.saturation import crossing, crossings, curve_of, map_sections, saving_map, told

DENSE = {100: 4.0, 200: 3.0, 400: 2.5}


def row(
    model: str, side: str, steps: int, loss: float, seed: int = 0, world: str = "few", **more: Any
) -> dict[str, Any]:
    kind = model
    return {
        "stage": "main", "status": "done", "model": f"{model}-{world}", "kind": kind, "side": side, "steps": steps,
        "twin": f"dense-{world}", "seed": seed, "loss": loss, "world": world, "concepts": 1024, "bits_needed": 10240.0,
        "tokens": 50.0 * steps, "params_active": 1000, "flops": float(steps), "seconds": 2.0 * steps,
        "flops_per_token": 1.0, "memory_bytes": None,
    } | more  # fmt: skip


def study(sparse: dict[int, float], seed: int = 0, world: str = "few", concepts: int = 1024) -> list[dict[str, Any]]:
    """Costs 10% more per step, half as much time again."""
    rows = [row("dense", "dense", s, loss, seed, world) for s, loss in DENSE.items()]
    rows += [
        row("top1", "sparse", s, loss, seed, world, flops=1.1 * s, seconds=3.0 * s, params_active=1100)
        for s, loss in sparse.items()
    ]
    return [r | {"concepts": concepts, "bits_needed": concepts * math.log2(concepts)} for r in rows]


def test_each_length_of_the_dense_model_is_a_point() -> None:
    """Sparse: 4.0 after 100 steps, 2.5 after 200; what is charged is 1.1 times as much a step."""
    points = saving_map(study({100: 4.0, 200: 2.5}))
    assert [p["steps"] for p in points] == [100, 200, 400]
    assert [p["tokens_per_parameter"] for p in points] == [5, 10, 20]
    between = 100 * 2 ** (math.log(4.0 / 3.0) / math.log(4.0 / 2.5))  # log-log: the steps at which it is down at 3.0
    for point, steps, sparse in zip(points, (100, 200, 400), (100, between, 200), strict=True):
        assert point["flops"]["factor"] == pytest.approx(steps / (1.1 * sparse))
        assert point["seconds"]["factor"] == pytest.approx(2 * steps / (3 * sparse))
        assert not point["flops"]["bound"]
    assert points[0]["bits_held"] == 2000
    assert points[0]["bits_ratio"] == pytest.approx(5.12)
    last = compute_saved(study({100: 4.0, 200: 2.5}))[0]["flops"]
    assert last == points[-1]["flops"]  # the same figure as in the table of compute saved


def test_what_a_curve_does_not_reach_is_a_bound() -> None:
    points = saving_map(study({100: 3.5, 200: 2.8}))
    assert [p["flops"]["bound"] for p in points] == [AT_LEAST, "", AT_MOST]
    assert points[0]["flops"]["factor"] == pytest.approx(100 / 110)
    assert points[2]["flops"]["factor"] == pytest.approx(400 / 220)
    assert curve_of(points, "tokens_per_parameter") == [(10, points[1]["flops"]["factor"])]


def test_seeds_are_paired_and_a_censored_one_leaves_no_interval() -> None:
    rows = study({100: 4.0, 200: 2.5}) + study({100: 4.0, 200: 2.6}, seed=1)
    points = saving_map(rows)
    seeds = {s: v["factor"] for s, v in points[1]["flops"]["seeds"].items()}
    expected = summarise({int(s): Factor(v) for s, v in seeds.items()})
    assert points[1]["flops"]["factor"] == pytest.approx(math.sqrt(seeds["0"] * seeds["1"]))
    assert points[1]["flops"]["low"] == pytest.approx(expected["low"])
    assert points[2]["flops"]["bound"] == AT_MOST
    assert points[2]["flops"]["low"] is None


@pytest.mark.parametrize(
    ("curve", "level", "at"),
    [
        ([(10, 0.5), (1000, 2.0)], 1.0, (100, False)),  # half-way in the logarithms
        ([(10, 1.5), (1000, 2.0)], 1.0, (10, True)),
        ([(10, 0.5), (1000, 0.9)], 1.0, None),
        ([(10, 0.5), (100, 2.0), (1000, 0.5), (10000, 2.0)], 1.0, (10**1.5, False)),
        ([], 1.0, None),
    ],
)
def test_where_a_curve_rises_to_a_level(
    curve: list[tuple[float, float]], level: float, at: tuple[float, bool] | None
) -> None:
    found = crossing(curve, level)
    assert (found is None) == (at is None)
    if found and at:
        assert found == (pytest.approx(at[0]), at[1])


def test_crossings_are_told_for_each_number_of_concepts() -> None:
    rows = study({100: 4.4, 200: 2.5}) + study({100: 3.9, 200: 3.2}, world="many", concepts=4096)
    said = [told(c) for c in crossings(saving_map(rows))]
    assert len(said) == 4
    assert said[0].startswith("top1 with 1,024 concepts passes the dense model at ")
    assert said[1] == "top1 with 1,024 concepts never passes 3.1 times."
    assert said[2] == "top1 with 4,096 concepts never passes the dense model."


def test_worlds_are_compared_within_themselves() -> None:
    """A dense model of another world is no rival, however low its loss."""
    rows = study({100: 4.0, 200: 2.5}) + study({100: 0.4, 200: 0.3}, world="easy", concepts=2)
    for r in rows:
        if r["world"] == "easy":
            r["loss"] /= 10
    best = {e["model"]: e["flops_best"]["factor"] for e in compute_saved(rows)}
    assert best["top1-few"] == pytest.approx(400 / 220)
    front = [point["model"] for point in frontiers(rows)["flops"]]
    assert {"dense-few", "top1-few"} & set(front)


def test_lengths_that_are_nearly_the_same_are_one_line() -> None:
    points = [{"tokens_per_parameter": x} for x in (100, 1000, 104, 210)]
    assert [[p["tokens_per_parameter"] for p in line] for line in _alike(points)] == [[100, 104], [210], [1000]]


@pytest.mark.filterwarnings("error")
def test_a_world_of_one_run_is_drawn(tmp_path: Path) -> None:
    rows = [*study({100: 4.4, 200: 2.8}), study({}, world="many")[0]]
    rows = [r | {"memory_bytes": 2**21} for r in rows]
    path = draw_frontier(rows, frontiers(rows), tmp_path)
    assert path is not None
    assert path.is_file()


@pytest.mark.filterwarnings("error")
def test_a_map_of_one_point_that_is_a_bound_is_drawn(tmp_path: Path) -> None:
    points = saving_map(study({100: 4.4, 200: 2.8}))[2:]
    assert [p["flops"]["bound"] for p in points] == [AT_MOST]
    (path,) = draw_map(points, tmp_path)
    assert path.is_file()


def test_the_map_is_drawn_for_one_world_and_for_several(tmp_path: Path) -> None:
    rows = study({100: 4.4, 200: 2.8}) + study({100: 3.9, 200: 2.0}, world="many", concepts=4096)
    heights = []
    for chosen in (rows[:6], rows):
        (path,) = draw_map(saving_map(chosen), tmp_path)
        assert path.name == "map-top1.png"
        content = path.read_bytes()
        heights.append(int.from_bytes(content[20:24], "big"))
    assert heights[1] > 1.8 * heights[0]  # over bits as well
    (section,) = map_sections(saving_map(rows))
    assert len(section.rows) == 6
    assert section.picture == "map-top1.png"


def test_reports_of_before_there_were_worlds_have_a_map_as_well() -> None:
    rows = study({100: 4.0, 200: 2.5})
    for r in rows:
        for key in ("world", "concepts", "bits_needed", "kind"):
            del r[key]
    points = saving_map(rows)
    assert [p["tokens_per_parameter"] for p in points] == [5, 10, 20]
    assert {p["kind"] for p in points} == {"top1-few"}
    assert told(crossings(points)[0]).startswith("top1-few passes the dense model at ")
