"""Held-out evaluation of a run: scores as JSON, a table for people, completions as text and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vlmoe.data.batch import Batch
from vlmoe.data.loader import held_out, held_out_size
from vlmoe.data.sources import held_out_splits
from vlmoe.evaluate.completions import Completion, complete, draw
from vlmoe.evaluate.names import SHOWS, asked_classes
from vlmoe.evaluate.pretrained import evaluate_masked
from vlmoe.model.device import pick_device
from vlmoe.tasks.export import Pretrained, load_pretrained

WIDE = 15  # points between the ends of an accuracy's interval above which it tells little
SCORES, PICTURE = "eval.json", "completions.png"


def evaluate_run(
    run: Path, device: str = "auto", samples: int | None = None, trained: Pretrained | None = None, tag: str = ""
) -> dict[str, Any]:
    """Score a run on every held-out split of its data.

    trained: a model of the run on `device`; None: the one at its end. Writes eval.json and completions.png into the
    run's folder, with `tag` before the dot, and returns the report.
    """
    where = pick_device(device, "--device")
    trained = trained or load_pretrained(run, where)
    recipe = trained.recipe
    count = samples or recipe.eval.samples

    def batches_of(split: str, kind: str) -> Iterable[Batch]:
        available = min(count, held_out_size(recipe, split, kind))
        for start in range(0, available, recipe.eval.batch):
            size = min(recipe.eval.batch, available - start)
            batch = held_out(recipe, trained.text_tokenizer, split, kind, start, size, factors=True)
            yield batch.to(where)

    kinds = [kind for kind in ("pair", "image", "text") if getattr(recipe.data.batch, kind)]
    mask_id, asked = trained.text_tokenizer.mask_id, asked_classes(recipe.data.masking)
    report = evaluate_masked(trained.model, batches_of, held_out_splits(recipe), kinds, mask_id, asked)
    report["samples_per_split"] = count  # at most: a split of files may hold fewer
    if "pair" in kinds and recipe.eval.pictures:
        shown = _completions(trained, recipe.eval.pictures, where)
        draw(shown, tagged(run / PICTURE, tag), run.resolve().name)
        report["completions"] = [
            {"key": c.key} | {view: c.line(view) for view in ("shown", "truth", "seen", "blind")} for c in shown
        ]
    report["warnings"] = wide_intervals(report)
    scores = tagged(run / SCORES, tag)
    temporary = scores.with_name(scores.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(scores)
    return report


def wide_intervals(report: dict[str, Any]) -> list[str]:
    """Which splits have an accuracy whose interval is wider than `WIDE` points, in words."""
    found = []
    for split, scores in report["splits"].items():
        looked = {"text of pairs": scores.get("text", {}).get("seen"), "names": scores.get("names", {}).get("seen")}
        looked |= {"text alone": scores.get("text_alone"), "patches": scores.get("image") or scores.get("image_alone")}
        wide = [
            f"{name} {_share(score)}"
            for name, score in looked.items()
            if score and not 100 * (score["interval"][1] - score["interval"][0]) <= WIDE
        ]
        if wide:
            found.append(
                f"{split}: too few held-out samples to tell much by, the interval is wider than {WIDE} points: "
                f"{', '.join(wide)}; score more (eval.samples) or hold out more (held_out of data.sources)"
            )
    return found


def tagged(path: Path, tag: str) -> Path:
    return path.with_stem(path.stem + tag)


def _completions(trained: Pretrained, count: int, device: torch.device) -> list[Completion]:
    batch = held_out(trained.recipe, trained.text_tokenizer, "val", "pair", 0, max(count, 2)).to(device)
    return complete(trained.model, trained.text_tokenizer, batch, count)


def print_report(report: dict[str, Any], run: Path, console: Console | None = None, tag: str = "") -> None:
    """The report as tables and sentences, with the places of the files. tag: as of `evaluate_run`."""
    console = console or Console()
    console.print(f"{run}: scores on held-out data", highlight=False, markup=False)
    pairs = any("text" in scores for scores in report["splits"].values())
    if any("names" in scores for scores in report["splits"].values()):
        console.print(_names_table(report))
    if pairs:
        console.print(_text_table(report))
    if any("image" in scores or "image_alone" in scores for scores in report["splits"].values()):
        console.print(_image_table(report))
    if any("text_alone" in scores for scores in report["splits"].values()):
        console.print(_text_alone_table(report))
    if pairs:
        first = next(iter(report["splits"].values()))["text"]
        if first["by_word_class"]:
            console.print(_class_table(first["by_word_class"]))
    if report["experts"]:
        console.print(_expert_table(report["experts"]))
    for warning in report.get("warnings", []):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    for item in report.get("completions", []):
        console.print(f"\n[bold]{item['key']}[/bold]", highlight=False)
        for label, view in (("shown", "shown"), ("with the image", "seen"), ("without", "blind"), ("truth", "truth")):
            console.print(f"  {label:>14}  {item[view]}", markup=False, highlight=False)
    console.print("\nFiles:")
    for name, what in (
        (tagged(Path(PICTURE), tag).name, "the completions beside their pictures"),
        ("curves.png", "losses over training"),
        ("routing.png", "load of every expert"),
        (tagged(Path(SCORES), tag).name, "all scores"),
        ("metrics.jsonl", "every logged step (TensorBoard events in tensorboard/)"),
        ("model", "weights, config and tokenizers: vlmoe.load(folder)"),
    ):
        if (run / name).exists():
            console.print(f"  {run / name}  {what}", markup=False, highlight=False)


def _share(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _names_table(report: dict[str, Any]) -> Table:
    title = "Names from sight: the whole name hidden, nothing else; right in % [95% interval]"
    table = Table(title=title, title_justify="left")
    for column in ("split", "what it shows", "with the image", "without", "another's image", "chance"):
        table.add_column(column, justify="left" if column in {"split", "what it shows"} else "right")
    for split, scores in report["splits"].items():
        if names := scores.get("names"):
            shares = (_share(names[v]) for v in ("seen", "blind", "swapped"))
            table.add_row(split, SHOWS.get(split, ""), *shares, f"{100 * names['chance']:.1f}")
    return table


def _text_table(report: dict[str, Any]) -> Table:
    table = Table(title="Held-out hidden text of pairs, accuracy in % [95% interval]", title_justify="left")
    for column in ("split", "with the image", "without", "another's image", "gap, points"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, scores in report["splits"].items():
        text = scores["text"]
        table.add_row(split, *(_share(text[v]) for v in ("seen", "blind", "swapped")), f"{text['gap']:.1f}")
    return table


def _image_table(report: dict[str, Any]) -> Table:
    table = Table(title="Codes of hidden patches, accuracy in % [95% interval]", title_justify="left")
    for column in ("split", "image with its text", "image alone", "most frequent code", "pixels explained"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, scores in report["splits"].items():
        pair, alone = scores.get("image"), scores.get("image_alone")
        majority = (pair or alone or {}).get("majority")
        table.add_row(
            split,
            _share(pair) if pair else "-",
            _share(alone) if alone else "-",
            f"{100 * majority:.1f}" if majority is not None else "-",
            f"{100 * scores['restored']['explained']:.1f}" if "restored" in scores else "-",
        )
    return table


def _text_alone_table(report: dict[str, Any]) -> Table:
    table = Table(title="Hidden text of texts alone, accuracy in % [95% interval]", title_justify="left")
    for column in ("split", "accuracy", "most frequent token", "loss, nats"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, scores in report["splits"].items():
        text = scores["text_alone"]
        table.add_row(split, _share(text), f"{100 * text['majority']:.1f}", f"{text['loss']:.3f}")
    return table


def _class_table(classes: dict[str, Any]) -> Table:
    table = Table(title="By word class, first split, accuracy in %", title_justify="left")
    for column in ("word class", "with the image", "without", "another's image", "predictions"):
        table.add_column(column, justify="left" if column == "word class" else "right")
    for name, row in classes.items():
        table.add_row(name, *(f"{100 * row[v]:.1f}" for v in ("seen", "blind", "swapped")), str(row["predictions"]))
    return table


def _expert_table(experts: dict[str, Any]) -> Table:
    table = Table(title="Experts: share of the tokens in %, held out", title_justify="left")
    table.add_column("block/modality")
    table.add_column("share of each expert")
    table.add_column("largest/mean", justify="right")
    table.add_column("idle", justify="right")
    for name, row in experts.items():
        shares = " ".join(f"{100 * s:.0f}" for s in row["share"])
        table.add_row(name, shares, f"{row['max_over_mean']:.2f}", str(row["idle"]))
    return table
