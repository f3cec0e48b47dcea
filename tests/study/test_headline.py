"""The figure that a study was declared for."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_grid import WORLDS, plan_of_worlds
from tests.study.test_saturation import study
from vlmoe.study.declare import StudyError
from vlmoe.study.headline import headline_of
from vlmoe.study.saturation import saving_map

MAIN = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "headline.py"))["main"]


def report_of(headline: dict[str, Any] | None) -> dict[str, Any]:
    """Two seeds: the sparse model is down at the dense one's last loss after 110 and 121 of its 400 steps' FLOPs."""
    rows = study({50: 3.9, 100: 2.5}) + study({50: 3.9, 110: 2.5}, seed=1) + study({100: 4.0}, world="many")
    for row in rows:
        row["run"] = f"{row['model']}-{row['steps']}-seed{row['seed']}"
    return {
        "name": "saturation", "declared": {"headline": headline}, "runs": rows, "map": saving_map(rows), "recipe": {},
        "command": "vlmoe study saturation", "date": "2026-11-27", "machine": {"device_name": "a machine"},
    }  # fmt: skip


def test_it_is_the_mean_over_seeds_at_the_declared_length() -> None:
    found = headline_of(report_of({"model": "top1", "world": "few", "steps": None}))
    each = [400 / 110, 400 / 121]
    assert found["flops_saved"] == pytest.approx((each[0] * each[1]) ** 0.5)
    assert 0 < found["low"] < found["flops_saved"] < found["high"]
    assert found["bound"] == ""
    assert found["setting"]["steps"] == 400
    assert found["setting"]["tokens_per_parameter"] == 20
    assert found["setting"]["seeds"] == [0, 1]
    assert found["wall_clock"]["factor"] == pytest.approx(((800 / 300) * (800 / 330)) ** 0.5)
    assert found["runs"] == sorted(
        ["dense-few-400-seed0", "dense-few-400-seed1", "top1-few-50-seed0", "top1-few-100-seed0", "top1-few-50-seed1",
         "top1-few-110-seed1"]
    )  # fmt: skip
    assert found["command"] == "vlmoe study saturation"


def test_a_bound_is_called_one() -> None:
    found = headline_of(report_of({"model": "top1", "world": "few", "steps": 100}))
    assert (found["bound"], found["low"]) == ("at least", None)  # its shortest run is below that loss already


def test_there_is_none_before_all_its_runs_are_done() -> None:
    """A length or a seed that is still to come would change the figure."""
    for steps, pending, waits in ((None, 400, True), (100, 400, False), (100, 100, True)):
        report = report_of({"model": "top1", "world": "few", "steps": steps})
        (row,) = [r for r in report["runs"] if r["run"] == f"dense-few-{pending}-seed1"]
        row["status"] = "stopped"
        report["map"] = saving_map(report["runs"])
        if waits:
            with pytest.raises(StudyError, match=f"its runs are not done: dense-few-{pending}-seed1$"):
                headline_of(report)
        else:
            assert headline_of(report)["setting"]["steps"] == steps


@pytest.mark.parametrize(
    ("headline", "said"),
    [
        (None, "declares no 'headline'"),
        ({"model": "top1", "world": "few", "steps": 300}, "no finished runs for the headline: .* after 300 steps"),
        ({"model": "top1", "world": "many", "steps": None}, "no finished runs .* in the world many"),
    ],
)
def test_what_there_is_no_figure_for_is_told(headline: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        headline_of(report_of(headline))


def test_the_script_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of({"model": "top1", "world": "few", "steps": None})
    (tmp_path / "study.json").write_text(json.dumps(report))
    out = tmp_path / "headline.json"
    MAIN([str(tmp_path), "--json", str(out)])
    assert json.loads(out.read_text()) == headline_of(report)
    assert "FLOPs saved: 3.47" in capsys.readouterr().out
    (tmp_path / "study.json").write_text(json.dumps(report_of(None)))
    with pytest.raises(SystemExit, match="declares no 'headline'"):
        MAIN([str(tmp_path), "--json", str(out)])


def test_a_headline_names_a_model_of_the_study(tmp_path: Path) -> None:
    assert "fine" in WORLDS
    plan_of_worlds(tmp_path, "headline={model: fine, world: many}")
    with pytest.raises(StudyError, match=r"key 'headline' names 'fine' in the world ''.*fine in few"):
        plan_of_worlds(tmp_path, "headline={model: fine}")
    with pytest.raises(StudyError, match=r"unknown key 'headline\.size'"):
        plan_of_worlds(tmp_path, "headline={model: fine, size: 3}")
