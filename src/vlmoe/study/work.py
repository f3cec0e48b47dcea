"""What a study under way knows, and its jobs: tokenizers, a few timed steps, trainings, fine-tunings."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmoe.config import Recipe, read_json
from vlmoe.config import to_mapping as recipe_mapping
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.model.flops import Shape
from vlmoe.study.declare import StudyError
from vlmoe.study.grid import Model, Plan, Run, carried_rate, recipe_of
from vlmoe.study.schedule import Job, Meter
from vlmoe.train import checkpoint
from vlmoe.train.branch import began_at
from vlmoe.train.pretrain import TOKENIZERS, prepare_text_tokenizer
from vlmoe.train.runlog import CHECKPOINTS

TIMED_STEPS = 8  # of every model, before anything is trained
OVERHEAD = 12.0  # seconds that a run's process takes besides training, until runs say better


@dataclass
class Work:
    """A study under way. shapes: of each world's batches under `seed`, which say what a token of each model costs, for
    all seeds alike. rates: side -> the sweep's best. notes: what a reader must know."""

    plan: Plan
    out: Path
    jobs_at_a_time: int
    console: Console
    meter: Meter
    shapes: dict[str, list[list[Shape]]]
    seed: int
    retry: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tokenizers(self, world: str, seed: int) -> Path:
        return tokenizers(self.out, world, seed)

    def folder(self, run: Run) -> Path:
        return self.out / ("sweep" if run.stage == "sweep" else "runs") / run.id

    def measured(self, model: Model) -> dict[str, Any]:
        job = Job(model.name, self.out / "measure" / model.name)
        return job.read() if job.done else {}


def seeded(base: Recipe, seed: int) -> Recipe:
    """The recipe with this seed and no folder of its own."""
    recipe = copy.deepcopy(base)
    recipe.seed, recipe.run.dir = seed, ""
    return recipe


def tokenizers(out: Path, world: str, seed: int) -> Path:
    """Their folder; world: "" where the study declares none."""
    return out / TOKENIZERS / world / f"seed-{seed}"


def text_tokenizer(base: Recipe, folder: Path, seed: int, console: Console) -> TextTokenizer:
    """That of one seed, trained where it is not there yet."""
    return prepare_text_tokenizer(seeded(base, seed), folder, console)


def tokenizer_jobs(work: Work) -> list[Job]:
    """One for each seed and world. A recipe that names a trained visual tokenizer, or takes stored codes, is quick
    here."""
    needed = dict.fromkeys((work.plan.model(run).world.name, run.seed) for run in work.plan.runs)
    return [
        Job(
            f"tokenizers{'-' + world if world else ''}-seed{seed}",
            work.tokenizers(world, seed),
            {"kind": "tokenizers", "recipe": recipe_mapping(seeded(work.plan.bases[world], seed))},
        )
        for world, seed in needed
    ]


def measure_jobs(work: Work) -> list[Job]:
    """Run as many at a time as the study's runs, so that they see the same company. Of models that have runs, with the
    tokenizers of their first."""
    jobs = []
    first: dict[str, Run] = {}
    for run in work.plan.runs:
        first.setdefault(work.plan.model(run).name, run)
    for run in first.values():
        model = work.plan.model(run)
        spec = {
            "kind": "measure", "steps": TIMED_STEPS, "recipe": recipe_mapping(seeded(model.recipe, run.seed)),
            "tokenizers": str(work.tokenizers(model.world.name, run.seed)),
        }  # fmt: skip
        jobs.append(Job(model.name, work.out / "measure" / model.name, spec))
    return jobs


def duplicates_jobs(work: Work) -> dict[str, Job]:
    """One for each world: the longest run's data under one seed against what is held out. None where runs see no
    pairs."""
    jobs = {}
    for world, base in work.plan.bases.items():
        steps = max((r.steps for r in work.plan.runs if work.plan.model(r).world.name == world), default=0)
        if base.data.batch.pair and steps:
            name = f"{world}-{steps}" if world else str(steps)
            spec = {"kind": "duplicates", "steps": steps, "recipe": recipe_mapping(seeded(base, work.seed))}
            jobs[world] = Job(f"duplicates-{name}", work.out / "duplicates" / name, spec, steps=steps)
    return jobs


def duplicates_of(work: Work) -> dict[str, Any]:
    """What they found, by world: `splits` as of `seen_in_training`, under `seed` after `steps`."""
    found = {}
    for world, job in duplicates_jobs(work).items():
        if job.done and job.spec is not None:
            splits = {split: shares for split, shares in job.read().items() if isinstance(shares, dict)}
            found[world] = {"seed": work.seed, "steps": job.spec["steps"], "splits": splits}
    return found


def rate_of(work: Work, run: Run) -> float | None:
    """A run's learning rate; None while the sweep that decides it is not done."""
    if run.rate is not None:
        return run.rate
    return carried_rate(work.plan, work.plan.model(run), work.rates) if run.side in work.rates else None


def job_of(work: Work, run: Run) -> Job:
    """What trains a run, how long that will take and what it costs: from where it branches off."""
    folder, rate = work.folder(run), rate_of(work, run)
    begun = _begun(work, run)
    trunk = None if begun else trunk_of(work, run)
    start = checkpoint_of(work, trunk) if trunk else None
    spec = None
    if rate is not None:
        shared = work.tokenizers(work.plan.model(run).world.name, run.seed)
        recipe = recipe_of(work.plan, run, rate, str(folder), str(shared), str(start or ""))
        spec = {"kind": "train", "recipe": recipe_mapping(recipe)}
    began = began_at(folder) if run.decay_steps and begun else trunk.branching if trunk else 0
    seconds = work.measured(work.plan.model(run)).get("seconds", 0.0) * (run.steps - began) + _overhead(work)
    flops = run.flops * (1 - began / run.steps)
    return Job(run.id, folder, spec, seconds=seconds, flops=flops, steps=run.steps, began_at=began, start=start)


def checkpoint_of(work: Work, run: Run) -> Path:
    """Where a run keeps the end of its constant phase."""
    return work.folder(run) / CHECKPOINTS / f"step-{run.branching}"


def trunk_of(work: Work, run: Run) -> Run | None:
    """The longest shorter run of the same model and seed that has kept the end of its constant phase, or will; None
    where this one is trained from nothing."""
    shorter = [r for r in _lengths(work.plan, run) if r.steps < run.steps]
    return next((r for r in reversed(shorter) if checkpoint_of(work, r).is_dir() or not _done(work, r)), None)


def drop_branched(work: Work) -> None:
    """Delete the checkpoints that runs kept for longer ones which have begun. That of the longest run stays, for longer
    ones still."""
    for run in work.plan.runs:
        longer = next((r for r in _lengths(work.plan, run) if r.steps > run.steps), None)
        kept = checkpoint_of(work, run)
        if longer and kept.is_dir() and _done(work, run) and _begun(work, longer):
            checkpoint.remove(kept)


def _lengths(plan: Plan, run: Run) -> list[Run]:
    """The runs that are branches of one training with this one, it included, shortest first."""
    if run.stage != "main" or not run.decay_steps:
        return []
    same = [r for r in plan.runs if r.stage == "main" and (r.model, r.seed) == (run.model, run.seed)]
    return sorted(same, key=lambda r: r.steps)


def _done(work: Work, run: Run) -> bool:
    return Job(run.id, work.folder(run)).done


def _begun(work: Work, run: Run) -> bool:
    return _done(work, run) or bool(checkpoint.steps_in(work.folder(run) / CHECKPOINTS))


def _overhead(work: Work) -> float:
    """Seconds of a run's process that are no training; of finished runs, where there are any."""
    found = []
    for run in work.plan.runs:
        file = work.folder(run) / "result.json"
        if file.is_file():
            result = read_json(file, nan=True)
            found.append(max(0.0, result["process_seconds"] - result.get("launch_seconds", result["seconds"])))
    return statistics.median(found) if found else OVERHEAD


def downstream_jobs(work: Work) -> list[Job]:
    """Fine-tuning of the chosen models' longest finished runs, on every task and seed."""
    declared, jobs = work.plan.study.downstream, []
    for name in work.plan.fine_tuned:
        if name not in work.plan.models:
            known = ", ".join(work.plan.models)
            raise StudyError(f"key 'downstream.models': no model '{name}' in this study; there are {known}")
        for run in longest(work.plan, name):
            start = job_of(work, run)
            for task in declared.tasks if start.done else []:
                folder = work.out / "downstream" / f"{task}-{run.id}"
                spec = {
                    "kind": "finetune", "task": task, "recipe": declared.recipe, "init": str(start.folder),
                    "overrides": [*declared.set, f"seed={run.seed}"],
                }  # fmt: skip
                jobs.append(Job(folder.name, folder, spec, seconds=start.seconds))
    return jobs


def longest(plan: Plan, model: str) -> list[Run]:
    """A model's runs of most steps, one for each seed."""
    runs = [r for r in plan.runs if r.stage == "main" and r.model == model]
    most = max((r.steps for r in runs), default=0)
    return [r for r in runs if r.steps == most]
