"""Compute saved, frontiers and the ablation, on runs made by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from vlmoe.study.compare import (
    AT_LEAST,
    AT_MOST,
    UNKNOWN,
    Factor,
    ablation,
    compute_saved,
    cost_at,
    frontier,
    frontiers,
    mean_interval,
    saved,
    saved_against_best,
    summarise,
)
from vlmoe.study.draw import draw_saved
from vlmoe.study.saved import by_seed, times, verdict


def row(model: str, steps: int, loss: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
    found = {
        "run": f"{model}-{steps}-{seed}", "stage": "main", "model": model, "twin": "dense", "seed": seed,
        "side": "dense" if model.startswith("dense") else "sparse", "steps": steps, "flops": 1e9 * steps,
        "seconds": 0.1 * steps, "memory_bytes": 1000, "loss": loss, "status": "done" if loss else "failed",
        "params_total": 10, "params_per_token": 5, "flops_per_token": 1e6,
    }  # fmt: skip
    return found | more


def power(scale: float) -> list[tuple[float, float]]:
    """A curve of loss = scale * cost ^ -0.5, straight in logarithms."""
    return [(c, scale * c**-0.5) for c in (100.0, 200.0, 400.0)]


def test_cost_at_a_loss_is_interpolated_in_logarithms() -> None:
    found = cost_at(power(1.0), 1.0 * 300**-0.5)
    assert found is not None
    assert found.value == pytest.approx(300)
    assert not found.bound
    at_once = cost_at(power(1.0), 0.2)
    assert at_once is not None
    assert (at_once.value, at_once.bound) == (100, AT_MOST)
    assert cost_at(power(1.0), 0.01) is None
    bump = [(1.0, 4.0), (2.0, 2.0), (4.0, 3.0), (8.0, 1.0)]  # the first time that it is down there
    assert cost_at(bump, 2.0).value == pytest.approx(2.0)  # type: ignore[union-attr]


def test_saved_is_the_ratio_of_costs_at_equal_loss() -> None:
    twice = saved(power(2**-0.5), power(1.0))  # half the cost everywhere
    assert twice.value == pytest.approx(2)
    assert not twice.bound
    # theirs ends at 0.05; ours is below that at its first run already, or never
    assert saved(power(0.1), power(1.0)).bound == AT_LEAST
    never = saved(power(2.0), power(1.0))
    assert never.bound == AT_MOST
    assert never.value == pytest.approx(1.0)


def test_against_the_best_of_all_dense_models() -> None:
    small, large = [(100.0, 1.0), (400.0, 0.9)], [(200.0, 0.8), (800.0, 0.5)]
    ours = [(50.0, 0.9), (100.0, 0.65)]
    assert frontier(small + large) == [(100.0, 1.0), (200.0, 0.8), (800.0, 0.5)]
    found = saved_against_best(ours, small + large)
    share = math.log(0.8 / 0.65) / math.log(0.8 / 0.5)
    assert found.value == pytest.approx(200 * 4**share / 100)
    assert saved_against_best([(100.0, 0.4)], small + large).bound == AT_LEAST
    worse = saved_against_best([(1000.0, 2.0)], small + large)
    assert (worse.value, worse.bound) == (0.1, AT_MOST)


def test_saved_over_seeds_is_paired_and_failed_runs_are_left_out() -> None:
    rows = []
    for seed, level in ((0, 1.0), (1, 1.1), (2, 0.9)):  # a seed moves both sides alike: paired, that cancels
        for steps in (100, 200, 400):
            rows.append(row("dense", steps, level * steps**-0.5, seed))
            rows.append(row("moe", steps, level * (1.5 * steps) ** -0.5, seed, seconds=0.2 * steps))
    rows += [row("moe", 800, None, 0), row("broken", 100, None)]
    (found,) = compute_saved(rows)
    assert found["model"] == "moe"
    assert found["flops"]["factor"] == pytest.approx(1.5)
    assert found["flops"]["low"] == pytest.approx(1.5, abs=1e-6)
    assert found["seconds"]["factor"] == pytest.approx(0.75)  # twice as slow a step
    assert found["flops"]["bound"] == ""
    assert found["flops_best"]["bound"] == AT_LEAST  # our longest is better than any dense run
    assert found["lengths"] == 3


def test_student_interval_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert mean_interval([1.0])["low"] is None


def test_frontier_over_means() -> None:
    rows = [row("dense", 100, 1.0), row("dense", 100, 1.2, 1), row("moe", 100, 1.0), row("moe", 50, 1.3)]
    front = frontiers(rows)["flops"]
    assert [(f["model"], f["steps"]) for f in front] == [("moe", 50), ("moe", 100)]


def test_ablation_takes_runs_of_equal_compute() -> None:
    models = {"dense": "dense", "text": "t", "vision": "v", "both": "b"}
    rows = [row("dense", steps, 1.0 / steps, seed) for steps in (10, 20) for seed in (0, 1)]
    for name, gain in (("t", 0.9), ("v", 0.8), ("b", 0.7)):
        rows += [row(name, 20, gain / 20, seed) for seed in (0, 1)]
    found = ablation(rows, models, ["loss", "nothing"])
    assert [e["row"] for e in found] == ["dense", "text", "vision", "both"]
    assert all(e["steps"] == 20 and e["seeds"] == [0, 1] for e in found)
    assert found[3]["measures"]["loss"]["mean"] == pytest.approx(0.035)
    assert found[3]["measures"]["loss"]["difference"]["mean"] == pytest.approx(-0.015)
    assert found[0]["measures"]["loss"]["difference"] is None
    assert "nothing" not in found[0]["measures"]
    # of equal total compute: other steps, the same FLOPs
    rows = [r for r in rows if r["model"] != "b"] + [row("b", 13, 0.01, s, flops=2.05e10) for s in (0, 1)]
    assert [e["steps"] for e in ablation(rows, models, ["loss"])] == [20, 20, 20, 13]
    assert ablation([r for r in rows if r["model"] != "t"], models, ["loss"]) == []


def test_a_seed_that_never_reaches_the_dense_loss_is_censored() -> None:
    """Three seeds, of which two are lost: a run of 400 steps that costs 1.25 times as much as the dense one's 400 says
    that less than 1 / 1.25 is saved, no more. The third needs 300 steps for what the dense model needs 400 for."""
    rows = []
    for seed, level in ((0, 1.2), (1, 1.2), (2, (300 / 400) ** 0.5)):
        for steps in (100, 200, 400):
            rows.append(row("dense", steps, steps**-0.5, seed))
            rows.append(row("moe", steps, level * steps**-0.5, seed, flops=1.25e9 * steps, flops_per_token=1.25e6))
    (found,) = compute_saved(rows)
    flops = found["flops"]
    assert {s: f["bound"] for s, f in flops["seeds"].items()} == {"0": AT_MOST, "1": AT_MOST, "2": ""}
    assert flops["seeds"]["0"]["factor"] == flops["seeds"]["1"]["factor"] == pytest.approx(0.8)
    assert flops["seeds"]["2"]["factor"] == pytest.approx(400 / (1.25 * 300))
    assert flops["factor"] == pytest.approx((0.8 * 0.8 * 400 / 375) ** (1 / 3))
    assert (flops["bound"], flops["censored"], flops["low"], flops["high"]) == (AT_MOST, 2, None, None)
    assert found["flops_ratio"] == 1.25
    assert times(flops) == "≤ 0.881 (not reached in 2 of 3 seeds)"  # 0.8805
    assert by_seed(flops) == "≤ 0.800, ≤ 0.800, 1.07"
    assert "no gain is shown" in verdict(flops)
    clock = found["seconds"]  # the same seeds are lost on the clock
    assert (clock["bound"], clock["censored"], clock["low"]) == (AT_MOST, 2, None)


def test_a_seed_below_the_dense_loss_from_its_first_run_on_is_a_lower_bound() -> None:
    found = summarise({0: Factor(2.0), 1: Factor(4.5, AT_LEAST)})
    assert (found["factor"], found["bound"], found["low"]) == (pytest.approx(3.0), AT_LEAST, None)
    assert times(found) == "≥ 3.000 (reached by its first run in 1 of 2 seeds)"
    assert "no interval" in verdict(found)


def test_bounds_in_both_directions_are_no_mean() -> None:
    found = summarise({0: Factor(2.0, AT_MOST), 1: Factor(4.0, AT_LEAST), 2: Factor(1.0)})
    assert (found["factor"], found["bound"], found["censored"]) == (None, UNKNOWN, 2)
    assert times(found) == "unknown (not reached in 1 of 3 seeds, reached by its first run in 1 of 3 seeds)"
    assert "no gain is shown" in verdict(found)


def test_what_a_measured_factor_shows() -> None:
    assert "no gain is shown" in verdict(summarise({0: Factor(1.3), 1: Factor(1.0), 2: Factor(1.1)}))
    assert "no gain is shown" in verdict(summarise({0: Factor(1.3)}))
    assert verdict(summarise({0: Factor(1.3), 1: Factor(1.31)})).startswith("A gain")
    assert verdict(summarise({0: Factor(0.7), 1: Factor(0.71)})).startswith("A loss")


def test_a_bound_is_drawn_without_an_interval(tmp_path: Path) -> None:
    entry = {"model": "moe", "flops": summarise({0: Factor(1.2), 1: Factor(0.9, AT_MOST)})}
    entry["seconds"] = summarise({0: Factor(0.5, AT_MOST), 1: Factor(2.0, AT_LEAST)})  # nothing to draw
    drawn = draw_saved([entry], tmp_path)
    assert drawn is not None
    assert drawn.read_bytes().startswith(b"\x89PNG")
