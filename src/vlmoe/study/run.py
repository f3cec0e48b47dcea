"""A study from its declaration to its report: tokenizers, a few timed steps of every model, the sweep, the runs, the
downstream tasks. Everything that is done stays in the folder and is not done again.
"""

from __future__ import annotations

import datetime
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from vlmoe.config import to_mapping as recipe_mapping
from vlmoe.model.device import pick_device
from vlmoe.model.sizes import short
from vlmoe.study import extend
from vlmoe.study.collect import Row, row_of
from vlmoe.study.declare import Study, StudyError, to_mapping
from vlmoe.study.grid import Model, Plan, Run, count, make_plan
from vlmoe.study.measure import data_shapes, mean_shapes
from vlmoe.study.plan import duration, read_report
from vlmoe.study.recount import CHARGE, recount
from vlmoe.study.schedule import LOG, Job, Meter, expected_seconds, run_jobs
from vlmoe.study.work import (
    Work,
    downstream_jobs,
    drop_branched,
    duplicates_jobs,
    duplicates_of,
    job_of,
    measure_jobs,
    rate_of,
    text_tokenizer,
    tokenizer_jobs,
    tokenizers,
)
from vlmoe.train.given import check_given
from vlmoe.train.runlog import lock_run, machine, replace_text

DECLARED = "study.yaml"


def study(
    declared: Study, out: Path, *, dry_run: bool = False, retry: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Do what is left of a study and write its report. Returns the report; None after a dry run.

    dry_run: show the list of runs and the time they will take, and stop there; for that the tokenizers are trained and
    a few steps of every model timed. retry: do failed runs again.

    Raises:
        UserError: the study cannot be done as declared, or the folder holds another study's runs.
        SystemExit: 128 + signal, when it was told to stop; the same command goes on.
    """
    console = console or Console()
    earlier = recount(read_report(Path(declared.extends))) if declared.extends else None  # missing: nothing is begun
    plan = make_plan(declared)
    for base in plan.bases.values():
        check_given(base, out)
    with lock_run(out):
        shapes, seed = {}, extend.counted_seed(earlier) if earlier else declared.seeds[0]
        for world, base in plan.bases.items():
            folder = tokenizers(out, world, seed)
            shapes[world] = data_shapes(base, text_tokenizer(base, folder, seed, console))
        count(plan, shapes)
        if earlier is not None:
            extend.check(earlier, declared_part(plan))
            plan.runs = extend.left_to_do(plan, earlier)
        work = Work(plan, out, declared.jobs, console, Meter(out, declared.budget), shapes, seed, retry)
        shared, timed = tokenizer_jobs(work), measure_jobs(work)
        sweep, main = ([r for r in plan.runs if r.stage == stage] for stage in ("sweep", "main"))
        for job in [*shared, *timed, *(job_of(work, r) for r in (sweep or main))]:
            job.check()
        replace_text(out / DECLARED, OmegaConf.to_yaml(OmegaConf.create(to_mapping(declared))))
        _run(work, shared, "tokenizers")
        for job in shared:  # nothing goes without them
            if not job.done:
                why = f"{job.read()['error']} (--retry tries again)" if job.failed else "the budget is used up"
                raise StudyError(f"{job.id}: {why}; see {job.folder / LOG}")
        _run(work, timed, "timing a few steps of every model")
        show_runs(work)
        if dry_run:
            return None
        known = extend.searched_steps(earlier)
        searches = [job for world, job in duplicates_jobs(work).items() if job.steps > known.get(world, 0)]
        _run(work, searches, "looking for held-out samples in training")
        if sweep:
            _run(work, [job_of(work, r) for r in sweep], "learning rates")
            _choose_rates(work)
        if all(rate is not None for rate in (rate_of(work, r) for r in main)):
            _run(work, [job_of(work, r) for r in main], "runs")
            _run(work, downstream_jobs(work), "downstream tasks")
        return _report(work, earlier)


def declared_part(plan: Plan) -> dict[str, Any]:
    """The part of the report that is known before anything runs. recipe: the study's own, in its first world."""
    study, base = plan.study, next(iter(plan.bases.values()))
    return {
        "name": study.name, "about": study.about, "declared": to_mapping(study), "base": study.recipe,
        "recipe": recipe_mapping(base), "models": {m.name: _about(m) for m in plan.models.values()},
        "recipes": {world: recipe_mapping(recipe) for world, recipe in plan.bases.items()},
        "ablation_models": plan.ablation,
    }  # fmt: skip


def _report(work: Work, earlier: dict[str, Any] | None) -> dict[str, Any]:
    from vlmoe.study.report import write_report  # matplotlib is slow to import

    rows = rows_of(work)
    declared, base = work.plan.study, next(iter(work.plan.bases.values()))
    sweep = {
        side: {
            "best": rate,
            "width": work.plan.sweep[side].settings["width"],
            "width_power": declared.sweep.width_power,
        }
        for side, rate in work.rates.items()
    }
    about = declared_part(work.plan) | {
        "sweep": sweep, "notes": work.notes,
        "duplicates": duplicates_of(work), "counted_seed": work.seed, "padding": _padding(work),
        "shapes": mean_shapes([batch for s in work.shapes.values() for batch in s]),
        "hours_used": work.meter.seconds / 3600, "jobs": work.jobs_at_a_time,
        "machine": machine(pick_device(base.train.device)) | {"threads": 1}, "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["vlmoe", *sys.argv[1:]]), "charge": CHARGE, "runs": rows,
    }  # fmt: skip
    if earlier is not None:
        about = extend.join(earlier, about)
    return write_report(about, work.out, work.console)


def _about(model: Model) -> dict[str, Any]:
    return {
        "side": model.side, "kind": model.kind, "world": model.world.name, "twin": model.twin,
        "settings": model.settings, "steps": model.steps, "seeds": model.seeds,
        **{part: recipe_mapping(model.recipe)[part] for part in ("model", "train")},
        "flops_per_token": model.cost.charge_per_token,
        "flops_computed_per_token": model.cost.flops_per_token,
        "memory_predicted": model.cost.memory.peak, "params_total": model.cost.sizes.params_total,
        "params_per_token": model.cost.sizes.params_per_token,
    }  # fmt: skip


def _padding(work: Work) -> float:
    """Share of the positions that are padding, in all worlds."""
    flat = [(s, work.plan.bases[world].model) for world, shapes in work.shapes.items() for b in shapes for s in b]
    return 1 - sum(s.tokens(model) for s, model in flat) / sum(s.positions(model) for s, model in flat)


def _run(work: Work, jobs: list[Job], what: str) -> None:
    for job in jobs:
        job.check()
    todo = [job for job in jobs if not job.done and (work.retry or not job.failed)]
    if not todo:
        return
    work.console.print(f"{what}: {len(todo)} of {len(jobs)} to do", highlight=False)
    began, done = time.monotonic(), 0

    def say(event: str, left: list[Job]) -> None:
        nonlocal done
        if not event:
            return
        done += 1
        drop_branched(work)
        rest = expected_seconds(left, work.jobs_at_a_time)
        took = f"{duration(time.monotonic() - began)} gone, about {duration(rest)} left"
        work.console.print(
            f"  [{done}/{len(todo)}] {event}{_loss_of(jobs, event)}; {took}", highlight=False, markup=False
        )

    number = run_jobs(jobs, work.jobs_at_a_time, work.meter, say, work.retry)
    if number is not None:
        work.console.print("stopped; the same command goes on from here", highlight=False)
        raise SystemExit(128 + number)
    left_out = [job for job in jobs if not job.done and not job.failed]
    if left_out:
        work.notes.append(f"{what}: {len(left_out)} of {len(jobs)} not done, the budget is used up")
        work.console.print(f"  budget: {len(left_out)} left out", highlight=False)


def _loss_of(jobs: Sequence[Job], event: str) -> str:
    job = next((j for j in jobs if event.startswith(f"{j.id}:")), None)
    if job is None or not job.done:
        return f" ({job.read()['error']})" if job is not None and job.failed else ""
    loss = job.read().get("loss")
    return f", loss {loss:.4f}" if isinstance(loss, float) else ""


def _choose_rates(work: Work) -> None:
    """Of each side the rate of least held-out loss, mean over seeds."""
    for side in work.plan.sweep:
        losses: dict[float, list[float]] = {}
        for run in work.plan.runs:
            job = job_of(work, run)
            if run.stage == "sweep" and run.side == side and job.done and run.rate is not None:
                losses.setdefault(run.rate, []).append(job.read()["loss"])
        tried = work.plan.study.sweep
        whole = {rate: statistics.fmean(v) for rate, v in losses.items() if len(v) == len(tried.seeds)}
        if not whole:
            work.notes.append(f"no learning rate of the sweep is finished for the {side} models: none of them was run")
            continue
        work.rates[side] = best = min(whole, key=lambda rate: whole[rate])
        listed = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(whole.items()))
        text = f"learning rate of {side} models: {best:g} of {listed}"
        if len(whole) > 1 and best in (min(tried.rates), max(tried.rates)):
            text += "; the best lies at the edge of what was tried"
        work.notes.append(text)
        work.console.print(f"  {text}", highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------- rows
def rows_of(work: Work) -> list[Row]:
    """The table, with downstream scores in the rows of the runs they start from."""
    rows = []
    for run in work.plan.runs:
        job = job_of(work, run)
        rows.append(row_of(work.plan, run, job, rate_of(work, run), work.measured(work.plan.model(run))))
    by_id = {row["run"]: row for row in rows}
    for job in downstream_jobs(work):
        task, _, run_id = job.id.partition("-")
        if job.done:
            found = job.read()
            by_id[run_id][f"{task}.{found['metric']}"] = found["score"]
    return rows


def show_runs(work: Work) -> None:
    """The list of runs with what each will cost, a line for each model and length, and the whole's time against the
    budget."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns
    for column in ("model", "steps", "seeds", "tok/par", "FLOPs", "x dense", "memory", "each", "status"):
        table.add_column(column, justify="left" if column in ("model", "status") else "right", no_wrap=True)
    jobs = [job_of(work, run) for run in work.plan.runs]
    lines: dict[tuple[str, int], list[tuple[Run, Job]]] = {}
    for run, job in zip(work.plan.runs, jobs, strict=True):
        name = run.model if run.stage == "main" else f"sweep {run.side} {run.rate:g}"
        lines.setdefault((name, run.steps), []).append((run, job))
    for (name, steps), members in lines.items():
        run, job = members[0]
        model = work.plan.model(run)
        twin = work.plan.models.get(model.twin)
        ratio = f"{model.cost.charge_per_token / twin.cost.charge_per_token:.3f}" if twin else ""
        memory = work.measured(model).get("memory", model.cost.memory.peak)
        counts = Counter(job.status for _, job in members)
        saturation = short(run.tokens / (twin or model).cost.sizes.params_active)
        table.add_row(
            name, f"{steps:,}", " ".join(str(r.seed) for r, _ in members), saturation, short(run.flops), ratio,
            f"{memory / 2**20:.3g}M", duration(job.seconds), ", ".join(f"{n} {s}" for s, n in counts.items()),
        )  # fmt: skip
    work.console.print(table)
    total, todo = sum(job.flops for job in jobs), [j for j in jobs if j.status in ("to do", "stopped")]
    seconds = expected_seconds(jobs, work.jobs_at_a_time)
    tasks = work.plan.study.downstream
    after = f"; then {', '.join(tasks.tasks)} for {', '.join(tasks.models)}, not in this time" if tasks.tasks else ""
    work.console.print(
        f"{len(jobs)} runs, {len(todo)} to do, {short(total)} FLOPs in all; about {duration(seconds)} with "
        f"{work.jobs_at_a_time} at a time{after}", highlight=False,
    )  # fmt: skip
    if any(job.began_at for job in jobs):
        apart = short(sum(run.flops for run in work.plan.runs))
        work.console.print(
            f"Lengths of a model are branches of one training: from nothing, as the table counts them, they would take "
            f"{apart} FLOPs", highlight=False,
        )  # fmt: skip
    budget = work.plan.study.budget
    if budget.hours is not None:
        over = "; what does not fit is left out" if seconds > work.meter.left else ""
        work.console.print(f"Budget: {budget.hours:g} h, {duration(work.meter.seconds)} used{over}", highlight=False)
    if budget.flops is not None:
        over = "; what does not fit is left out" if total > budget.flops else ""
        work.console.print(f"Budget: {short(budget.flops)} FLOPs{over}", highlight=False)
