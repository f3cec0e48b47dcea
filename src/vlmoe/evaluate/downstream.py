"""Scores of a fine-tuned run on its task's splits: official metrics with intervals, beside what guessing scores."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vlmoe.config import UserError
from vlmoe.data.downstream.files import OWN
from vlmoe.data.downstream.loader import EvalData, count_of, open_split, splits_of
from vlmoe.evaluate.report import SCORES, tagged
from vlmoe.metrics import Score
from vlmoe.model.device import pick_device
from vlmoe.tasks.answer import Answered, answer_all
from vlmoe.tasks.export import Finetuned, load_finetuned
from vlmoe.tasks.finite import NotFinite
from vlmoe.tasks.registry import collate_of

MOST_SHOWN = 40  # values of a factor; more are in eval.json alone
UNITS = {"CIDEr": 1.0, "BLEU-4": 1.0}  # already as papers quote them; everything else is a share, shown in percent


def evaluate_task(
    run: Path,
    task: str | None = None,
    *,
    device: str = "auto",
    splits: list[str] | None = None,
    samples: int | None = None,
    batch: int | None = None,
    workers: int | None = None,
    progress: bool = False,
    trained: Finetuned | None = None,
    tag: str = "",
) -> dict[str, Any]:
    """Score a fine-tuned run; writes eval.json into its folder, with `tag` before the dot, and returns the report.

    task: if given, what the run must be fine-tuned for. splits: of its data; None: all. samples: of each split, at
    most; None: the recipe's. The numbers do not depend on `batch` and `workers`, unless experts have a capacity in
    evaluation. trained: a model of the run on `device`; None: the one at its end.

    Raises UserError: another task, no such split, unusable files, answers of nan or infinity.
    """
    where = pick_device(device, "--device")
    trained = trained or load_finetuned(run, task, where)
    recipe = trained.recipe
    if task is not None and recipe.task != task:
        raise UserError(f"{trained.path}: is fine-tuned for {recipe.task}, not for {task}")
    known = splits_of(recipe)
    for split in splits or ():
        if split not in known:
            raise UserError(f"no split '{split}' for {recipe.task}: there are {', '.join(known)}")
    report: dict[str, Any] = {
        "task": recipe.task, "main": type(trained.model).main, "data": recipe.data.type, "splits": {},
    }  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress, transient=True) as bar:
        for split in splits or known:
            row = bar.add_task(f"{recipe.task} {split}", total=None)
            report["splits"][split] = _evaluate_split(
                trained, split, where, samples, batch or recipe.eval.batch,
                recipe.data.workers if workers is None else workers,
                lambda done, total, row=row: bar.update(row, completed=done, total=total),
            )  # fmt: skip
    _count_in_training(report["splits"], trained)
    scores = tagged(run / SCORES, tag)
    temporary = scores.with_name(scores.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(scores)
    return report


def _evaluate_split(
    trained: Finetuned, split: str, device: torch.device, samples: int | None, batch: int, workers: int, tick: Any
) -> dict[str, Any]:
    recipe, model = trained.recipe, trained.model
    examples = open_split(recipe, split, trained.labels or None)
    count = min(len(examples), samples or count_of(recipe, examples, split))
    collate = collate_of(recipe, trained.labels, trained.text_tokenizer)
    data = EvalData(examples, collate, count, batch)
    try:
        seen = answer_all(model, data, device, workers, lambda done: tick(done, count))
        swapped = None
        if model.swaps and recipe.data.blind == "none" and count > 1:
            swapped = answer_all(model, replace(data, swapped=model.swaps), device, workers)
    except NotFinite as error:
        raise UserError(f"split {split}: {error}") from None
    report: dict[str, Any] = {
        "examples": len(seen.examples),
        "counts": model.counts(seen.examples),
        "skipped": [{"key": key, "reason": reason} for key, reason in seen.skipped],
        "scores": _plain(seen.scores(model)),
        "guess": _plain(model.guess(seen.examples)),
    }
    if swapped is not None:
        report["swapped"] = {"part": model.swaps, "scores": _plain(swapped.scores(model))}
    factors = sorted({name for e in seen.examples for name in e.factors})
    report["by"] = {name: _by(seen, trained, name) for name in factors}
    return report


def _count_in_training(splits: dict[str, Any], trained: Finetuned) -> None:
    """Add to each group of one's own files how many training examples are of it: 0 tells one that was held out. Left
    out where the training file is not there any more, or knows no groups."""
    recipe = trained.recipe
    own = recipe.data.type == "files" and recipe.data.train.file.lower().endswith(OWN)
    if not own or not any(split["by"] for split in splits.values()):
        return
    try:
        examples = open_split(recipe, "train", trained.labels or None)
    except UserError:
        return
    known = [examples.truth(i).factors for i in range(len(examples))]
    for split in splits.values():
        for name, values in split["by"].items():
            counts = Counter(factors[name] for factors in known if name in factors)
            for value, found in values.items() if counts else ():
                found["training_examples"] = counts[value]


def _by(seen: Answered, trained: Finetuned, factor: str) -> dict[str, Any]:
    groups = {
        value: [e for e in seen.examples if e.factors.get(factor) == value]
        for value in sorted({e.factors.get(factor, "") for e in seen.examples})
    }
    return {
        value: {"scores": _plain(scores), "guess": _plain(trained.model.guess(groups[value]))}
        for value, scores in seen.scores_by(trained.model, factor).items()
    }


def _plain(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: score.as_dict() for name, score in scores.items()}


# ---------------------------------------------------------------------------------------------------------- for people
def print_task_report(report: dict[str, Any], run: Path, console: Console | None = None, tag: str = "") -> None:
    """The report as tables. tag: as of `evaluate_task`."""
    console = console or Console()
    main, splits = report["main"], report["splits"]
    names = list(dict.fromkeys(n for split in splits.values() for n in split["scores"]))
    swapped = next((s["swapped"]["part"] for s in splits.values() if "swapped" in s), None)
    table = Table(title=f"{report['task']}: {run} [95% interval]", title_justify="left")
    table.add_column("", no_wrap=True)
    for split in splits:
        table.add_column(split, justify="right")
    table.add_row("examples", *(str(row["examples"]) for row in splits.values()))
    for name in names:
        table.add_row(name, *(shown(name, row["scores"].get(name), digits=0) for row in splits.values()))
    if any(row["guess"] for row in splits.values()):
        guesses = (shown(main, row["guess"].get(main), interval=False) for row in splits.values())
        table.add_row("best guess", *guesses)
    if swapped:
        others = (row.get("swapped", {}).get("scores", {}).get(main) for row in splits.values())
        table.add_row(f"another's {swapped}", *(shown(main, score, interval=False) for score in others))
    table.caption = f"best guess and another's: {main}" if len(names) > 1 else None
    console.print(table)
    for number, (split, row) in enumerate(splits.items()):
        for factor, values in row["by"].items():
            if 1 < len(values) <= MOST_SHOWN and (number == 0 or report.get("data") == "files"):
                console.print(_table_by(f"{split}, by {factor}", factor, values, main))
    for split, found in report["splits"].items():
        if found.get("counts"):
            said = ", ".join(f"{n:,} {what}" for what, n in found["counts"].items())
            console.print(f"{split}: {said}", highlight=False, markup=False)
        if found["skipped"]:
            bad = found["skipped"][0]
            console.print(
                f"{split}: {len(found['skipped'])} examples could not be read and are not scored; the first, "
                f"{bad['key']}: {bad['reason']}", highlight=False, markup=False,
            )  # fmt: skip
    console.print(f"all scores: {tagged(run / SCORES, tag)}", highlight=False, markup=False)


def _table_by(title: str, factor: str, values: dict[str, Any], main: str) -> Table:
    """Scores of the examples of each value of a factor."""
    table = Table(title=title, title_justify="left")
    in_training = any("training_examples" in found for found in values.values())
    for column in (factor, "examples", main, "best guess", *(["in training"] if in_training else [])):
        table.add_column(column, justify="left" if column == factor else "right")
    for value, found in values.items():
        score = found["scores"].get(main)
        guess = shown(main, found["guess"].get(main), interval=False)
        trained = [f"{found['training_examples']:,}" if found["training_examples"] else "none"] if in_training else []
        table.add_row(value, str(score["n"]) if score else "-", shown(main, score), guess, *trained)
    return table


def shown(name: str, score: dict[str, Any] | None, interval: bool = True, digits: int = 1) -> str:
    """'71.3 [70.1, 72.4]'; shares in percent. digits: of the interval's ends, behind the point."""
    if score is None or score["n"] == 0:
        return "-"
    unit = UNITS.get(name, 100.0)
    text = f"{unit * score['value']:.1f}"
    if interval and score["interval"] is not None:
        low, high = score["interval"]
        text += f" [{unit * low:.{digits}f}, {unit * high:.{digits}f}]"
    return text
