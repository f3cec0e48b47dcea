"""The one figure of a study: compute saved in the setting that its declaration named before it ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmoe.study.collect import Row, finished
from vlmoe.study.compare import world_of
from vlmoe.study.declare import StudyError

HEADLINE = "headline.json"


def headline_of(report: dict[str, Any]) -> dict[str, Any]:
    """flops_saved, low, high: geometric mean over seeds and its 95% interval, None where a seed gives but a bound;
    bound: then in which direction the mean is known. wall_clock: the same for seconds. setting: as declared, with what
    it comes to. command: of the study. runs: those that the figure rests on.

    Raises StudyError: the study declares no headline, or its runs are not done.
    """
    declared = report["declared"].get("headline")
    if not declared:
        raise StudyError("the study declares no 'headline': name the model, world and length before it runs")
    points = [p for p in report["map"] if p["kind"] == declared["model"] and p["world"] == declared["world"]]
    points = [p for p in points if declared["steps"] in (None, p["steps"])]
    if missing := _missing(report["runs"], declared):
        raise StudyError(f"no headline yet, its runs are not done: {', '.join(missing)}")
    if not points:
        raise StudyError(
            f"no finished runs for the headline: {declared['model']} against the dense model of its size"
            + (f" in the world {declared['world']}" if declared["world"] else "")
            + (f" after {declared['steps']:,} steps" if declared["steps"] else "")
        )
    point = max(points, key=lambda p: p["steps"])
    found, clock = point["flops"], point["seconds"]
    done = [r for r in finished(report["runs"]) if world_of(r) == point["world"] and str(r["seed"]) in found["seeds"]]
    used = [r for r in done if r["model"] == point["model"]]
    used += [r for r in done if r["model"] == point["twin"] and r["steps"] == point["steps"]]
    about = ("twin", "concepts", "steps", "tokens_per_parameter", "bits_ratio", "loss")
    return {
        "flops_saved": found["factor"], "low": found["low"], "high": found["high"], "bound": found["bound"],
        "wall_clock": {key: clock[key] for key in ("factor", "low", "high", "bound")},
        "setting": {
            "study": report["name"], "model": point["kind"], "world": point["world"],
            **{key: point[key] for key in about}, "seeds": [int(seed) for seed in found["seeds"]],
        },
        "command": report["command"], "date": report["date"], "machine": report["machine"]["device_name"],
        "runs": sorted(r["run"] for r in used),
    }  # fmt: skip


def _missing(rows: Sequence[Row], declared: dict[str, Any]) -> list[str]:
    """Of the runs that the figure rests on those that are not finished: of the model, and of its dense twin up to the
    declared length, all seeds."""
    main = [r for r in rows if r["stage"] == "main" and world_of(r) == declared["world"]]
    ours = [r for r in main if r["side"] == "sparse" and r["kind"] == declared["model"]]
    twins = {r["twin"] for r in ours}
    theirs = [r for r in main if r["model"] in twins and r["steps"] <= (declared["steps"] or r["steps"])]
    done = {r["run"] for r in finished(rows)}
    return [r["run"] for r in [*ours, *theirs] if r["run"] not in done]
