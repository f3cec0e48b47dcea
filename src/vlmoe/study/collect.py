"""The runs of a study as one tidy table: a row for each run, failed and left-out ones included."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmoe.study.grid import Plan, Run
from vlmoe.study.schedule import Job
from vlmoe.train.runlog import replace_text

Row = dict[str, Any]
# What a language model can hold, trained long enough, mixtures of experts somewhat less in all of their parameters:
# Allen-Zhu & Li 2024, "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws", arXiv 2404.05405
BITS_PER_PARAMETER = 2
CSV, PARQUET = "runs.csv", "runs.parquet"
COLUMNS = (
    "run", "stage", "model", "kind", "side", "twin", "world", "concepts", "bits_needed", "bits_held", "width", "depth",
    "experts", "k", "granularity", "shared", "expert_size", "placement", "layers", "expansion", "params_total",
    "params_per_token", "params_active", "seed", "steps", "began_at", "learning_rate", "expert_lr", "tokens",
    "tokens_per_parameter", "flops_per_token", "flops", "seconds", "flops_per_second", "memory_bytes",
    "memory_predicted", "resident_bytes", "repeated", "wait_share", "evaluation_seconds", "status", "error", "loss",
    "loss_words", "loss_patches", "loss_texts", "accuracy_words", "accuracy_blind",
)  # fmt: skip
WORDS = ("run", "stage", "model", "kind", "side", "twin", "world", "placement", "layers", "status", "error")
WHOLE = ("concepts", "width", "depth", "experts", "k", "granularity", "shared", "params_total", "params_per_token",
         "params_active", "seed", "steps", "began_at", "memory_bytes", "memory_predicted", "resident_bytes",
         "repeated")  # fmt: skip


def row_of(plan: Plan, run: Run, job: Job, rate: float | None, measured: dict[str, Any]) -> Row:
    """kind: the model's name but for its world's. tokens_per_parameter: over those (active) of its dense twin.
    bits_needed: to know the world's concepts; bits_held: what the dense twin can hold, `BITS_PER_PARAMETER`.
    params_active: per token, embeddings left out. began_at: the step at which it branched off a shorter run; its
    tokens, flops and seconds are those of all its steps. seconds: of training, evaluation and start-up left out.
    flops_per_token, flops: as charged, see `Account.charge`. memory_bytes: of tensors in a step, measured;
    memory_predicted: the same, computed. resident_bytes: the process's."""
    model = plan.model(run)
    cost = model.cost
    row: Row = dict.fromkeys(COLUMNS)
    twin = plan.models.get(model.twin, model)
    row |= {
        "run": run.id, "stage": run.stage, "model": model.name, "kind": model.kind, "side": model.side,
        "twin": model.twin, "world": model.world.name, "concepts": model.world.concepts,
        "bits_needed": model.world.bits_needed, "bits_held": BITS_PER_PARAMETER * twin.cost.sizes.params_active,
        "tokens_per_parameter": run.tokens / twin.cost.sizes.params_active,
        **{k: v for k, v in model.settings.items() if k in COLUMNS},
        "expansion": cost.sizes.expansion,
        "params_total": cost.sizes.params_total,
        "params_per_token": cost.sizes.params_per_token,
        "params_active": cost.sizes.params_active,
        "seed": run.seed, "steps": run.steps, "learning_rate": rate,
        "expert_lr": model.recipe.train.expert_lr if model.side == "sparse" else None,
        "tokens": run.tokens, "flops_per_token": cost.charge_per_token, "flops": run.flops,
        "memory_bytes": measured.get("memory"), "memory_predicted": cost.memory.peak,
        "status": job.status if job.status != "to do" else "not run",
    }  # fmt: skip
    if job.done:
        found = job.read()
        row |= {k: v for k, v in found.items() if k in COLUMNS or ":" in k}
        row["flops"] = run.flops * (1 + found["repeated"] / run.steps)
        row["flops_per_second"] = row["flops"] / found["seconds"]
    elif job.failed:
        row["error"] = job.read()["error"]
    return row


def finished(rows: Iterable[Row], stage: str = "main") -> list[Row]:
    """With a loss that is a number."""
    return [r for r in rows if r["stage"] == stage and r["status"] == "done" and r["loss"] is not None]


def groups(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows by the values of some columns (the value itself where it is one column)."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in keys)
        found.setdefault(key[0] if len(keys) == 1 else key, []).append(row)
    return found


def over_seeds(rows: Sequence[Row], column: str) -> tuple[float, float, float]:
    """Mean, least and most of a column."""
    values = [r[column] for r in rows if r.get(column) is not None]
    return (statistics.fmean(values), min(values), max(values)) if values else (float("nan"),) * 3


def write_table(rows: Sequence[Row], out: Path) -> None:
    """The table as CSV and as Parquet."""
    text = io.StringIO()
    names = [*COLUMNS, *extra_columns(rows)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row.get(name) for name in names} for row in rows)
    replace_text(out / CSV, text.getvalue())
    kinds = {name: pa.string() if name in WORDS else pa.int64() if name in WHOLE else pa.float64() for name in names}
    columns = {name: pa.array([_cast(row.get(name), name) for row in rows], type=kind) for name, kind in kinds.items()}
    temporary = out / (PARQUET + ".tmp")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(out / PARQUET)


def extra_columns(rows: Sequence[Row]) -> list[str]:
    """Downstream scores, "vqa.accuracy" and the like, and accuracies by word class, "seen:name", "text:name"."""
    return list(dict.fromkeys(k for row in rows for k in row if k not in COLUMNS))


def _cast(value: Any, name: str) -> Any:
    if value is None:
        return None
    return str(value) if name in WORDS else int(value) if name in WHOLE else float(value)
