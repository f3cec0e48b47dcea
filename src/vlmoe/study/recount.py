"""Reports of before padding was charged to all layers alike: dense layers were charged for it, routed experts were
not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmoe.config import from_mapping
from vlmoe.model.flops import Shape, flops
from vlmoe.study.collect import Row
from vlmoe.study.declare import StudyError

CHARGE = "padding to all layers alike"  # a report's key "charge"; reports of before have none
SETTINGS = ("side", "width", "depth", "experts", "k", "granularity", "shared", "expert_size", "placement", "layers")
COUNTED = ("flops_per_token", "flops", "flops_per_second")  # of a row


def recount(report: dict[str, Any]) -> dict[str, Any]:
    """The report with FLOPs as `Account.charge` counts them; itself where it has them.

    What padding adds is linear in the number of padded tokens, so the mean shapes that a report keeps give it exactly.
    Raises StudyError where the report has no shapes, or a run of a model that it does not describe.
    """
    if report.get("charge") == CHARGE:
        return report
    if "shapes" not in report:
        raise StudyError(
            "the study's report does not say how long its texts were, as those of an earlier version: the study's "
            "command writes it anew, finished runs stay"
        )
    models, factors = {}, {}
    for name, model in report["models"].items():
        computed = model["flops_per_token"]
        factors[name] = 1 + _padding_per_token(report, model["model"]) / computed
        models[name] = model | {
            "flops_computed_per_token": computed, "flops_per_token": factors[name] * computed,
        }  # fmt: skip
    runs = []
    for row in report["runs"]:
        factor = factors[_model_of(row, report["runs"], models)]
        runs.append(row | {k: factor * row[k] for k in COUNTED if row.get(k) is not None})
    return report | {"models": models, "runs": runs, "charge": CHARGE}


def _padding_per_token(report: dict[str, Any], model: dict[str, Any]) -> float:
    """FLOPs per token that routed experts are charged for padding."""
    recipe = from_mapping(report["recipe"] | {"model": model}, origin="the study's report")
    added = tokens = 0.0
    for mean in report["shapes"]:
        shape = Shape(**mean)
        added += flops(recipe.model, shape.charged()).total - flops(recipe.model, shape).total
        tokens += shape.tokens(recipe.model)
    return added / tokens


def _model_of(row: Row, rows: Sequence[Row], models: dict[str, Any]) -> str:
    """The name under which the report describes a run's model. A run of the search for learning rates has a name of its
    own; its model is one of the comparison."""
    if row["model"] in models:
        return row["model"]
    for other in rows:
        if other["model"] in models and all(other[k] == row[k] for k in SETTINGS):
            return other["model"]
    raise StudyError(f"{row['run']}: the study's report does not describe its model, so its FLOPs cannot be recounted")
