"""A study that goes on where another ended: longer runs, more seeds, other models, in one report with what is there."""

from __future__ import annotations

from typing import Any

from vlmoe.config import flat, with_later_keys
from vlmoe.study.collect import finished
from vlmoe.study.declare import StudyError
from vlmoe.study.grid import Plan, Run

FREE = ("name", "about", "run.dir", "train.lr", "train.steps")  # of the recipe; rows say their learning rate and steps


def check(earlier: dict[str, Any], about: dict[str, Any]) -> None:
    """Whether the report of the study that this one extends can stand in one table with its own.

    about: what of this one's report is known before anything runs, see `vlmoe.study.run`. Raises StudyError that names
    the first key that differs.
    """
    where = about["declared"]["extends"]
    for key in ("equal", "expert_power", "decay_share"):
        _same(f"key '{key}'", earlier["declared"].get(key), about["declared"][key], where)
    then, now = _recipes(earlier), _recipes(about)
    for world in then.keys() & now.keys():
        _same_keys(f"recipe of {world}" if world else "recipe", then[world], now[world], where)
    for name in earlier["models"].keys() & about["models"].keys():
        then, now = (report["models"][name] for report in (earlier, about))
        for part in ("model", "train"):
            if part in then:  # reports of before there was a choice of training for each model
                _same_keys(f"model {name}", {part: then[part]}, {part: now[part]}, where)


def counted_seed(earlier: dict[str, Any]) -> int:
    """The seed whose batches say what a token of each model costs, see `vlmoe.study.run`: another's would charge one
    model two prices."""
    return earlier.get("counted_seed", earlier["declared"]["seeds"][0])


def searched_steps(earlier: dict[str, Any] | None) -> dict[str, int]:
    """Of each world, how many steps' data the earlier study has compared with what is held out."""
    return {world: found["steps"] for world, found in ((earlier or {}).get("duplicates") or {}).items()}


def left_to_do(plan: Plan, earlier: dict[str, Any]) -> list[Run]:
    """Of a study's runs those that the report it extends does not hold, with their learning rate. Runs that tasks start
    from are among them: a report has no weights."""
    there = {row["run"]: row["learning_rate"] for row in finished(earlier["runs"])}
    needed = plan.fine_tuned
    return [r for r in plan.runs if r.model in needed or r.rate is None or there.get(r.id) != r.rate]


def join(earlier: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """The report of both: the earlier study's finished runs, but for those that this one has, too, and what it says of
    its models and its search for learning rates."""
    ours = {row["run"] for row in about["runs"]}
    runs = [r for stage in ("sweep", "main") for r in finished(earlier["runs"], stage) if r["run"] not in ours]
    models = earlier["models"] | about["models"]
    kept = {r["model"] for r in runs if r["stage"] == "main"}
    note = (
        f"{len(runs)} runs are those of {about['declared']['extends']}: `{earlier['command']}`, "
        f"{earlier['machine']['device_name']}, torch {earlier['torch']}, {earlier['date']}; "
        f"{earlier['hours_used']:.1f} h"
    )
    return about | {
        "runs": runs + about["runs"],
        "models": {name: m for name, m in models.items() if name in kept or name in about["models"]},
        "sweep": about["sweep"] or earlier["sweep"],
        "duplicates": _longer(earlier.get("duplicates") or {}, about["duplicates"]),
        "notes": [*earlier["notes"], note, *about["notes"]],
    }


def _longer(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Of each world what was found after more steps."""
    return {world: max((d[world] for d in (then, now) if world in d), key=lambda f: f["steps"]) for world in then | now}


def _recipes(report: dict[str, Any]) -> dict[str, Any]:
    """The study's own recipe in each of its worlds."""
    return report.get("recipes") or {"": report["recipe"]}


def _same_keys(what: str, then: Any, now: Any, where: str) -> None:
    after = flat(now)
    before = with_later_keys(flat(then), after)
    for key in sorted(before.keys() | after.keys()):
        if key not in FREE:
            _same(f"{what}, key '{key}'", before.get(key), after.get(key), where)


def _same(what: str, then: Any, now: Any, where: str) -> None:
    if then != now:
        raise StudyError(f"extends {where}: {what} is {then!r} there and {now!r} here: its runs cannot be compared")
