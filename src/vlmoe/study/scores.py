"""What runs know, in tables: what they recall and what they have made of it, and which words are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmoe.evaluate.names import SHOWS
from vlmoe.study.collect import Row, extra_columns, finished, groups, over_seeds
from vlmoe.study.page import Section

EVALUATION = 0.05  # share of a run's time that scoring may take before the report says so


def splits_section(report: dict[str, Any]) -> Section | None:
    """Each held-out split apart: recall, and what was never in training."""
    done = finished(report["runs"])
    splits = [s for s in SHOWS if any(r.get(f"{s}:loss") is not None for r in done)]
    if not splits:
        return None
    head = ["model", "steps", "seeds"]
    for split in splits:
        head += [f"{split}: loss", f"{split}: names, %"]
    body = []
    for (model, steps), runs in groups(done, "model", "steps").items():
        cells = []
        for split in splits:
            cells += [_mean(runs, f"{split}:loss", "{:.3f}", 1), _names(runs, split)]
        body.append([model, f"{steps:,}", str(len(runs)), *cells])
    text = "Held-out pairs; means over seeds. " + "; ".join(f"*{s}*: {SHOWS[s]}" for s in splits) + "."
    if any(r.get(f"{s}:names") is not None for s in splits for r in done):
        text += (
            " Names: the whole name of a thing hidden and nothing else, right in every token; with the image / without."
        )
    text += "".join(f"\n\n{line}" for line in [*_duplicates(report), *_evaluation(done)])
    return Section("Recall and generalisation", text, head, body)


def _names(runs: Sequence[Row], split: str) -> str:
    cells = [_mean(runs, f"{split}:{key}", "{:.1f}", 100) for key in ("names", "names_blind")]
    return " / ".join(cells) if cells != ["-", "-"] else "-"


def _mean(runs: Sequence[Row], column: str, form: str, scale: float) -> str:
    known = [r for r in runs if r.get(column) is not None]
    return form.format(scale * over_seeds(known, column)[0]) if known else "-"


def _duplicates(report: dict[str, Any]) -> list[str]:
    """What of the splits is in training after all."""
    lines = []
    for world, found in report.get("duplicates", {}).items():
        shares = [
            f"{split} {of['pairs']:.1%} (picture alone {of['pictures']:.1%}, caption alone {of['captions']:.1%})"
            for split, of in found["splits"].items()
        ]
        where = f"In the world {world}, of" if world else "Of"
        lines.append(
            f"{where} the held-out pairs that are scored, so many occur in training, picture and caption together "
            f"({found['steps']:,} steps, seed {found['seed']}): {'; '.join(shares)}."
        )
    return lines


def _evaluation(done: Sequence[Row]) -> list[str]:
    shares = [
        r["evaluation_seconds"] / (r["seconds"] + r["evaluation_seconds"]) for r in done if r.get("evaluation_seconds")
    ]
    if not shares or max(shares) < EVALUATION:
        return []
    return [f"Scoring took up to {max(shares):.0%} of a run's time: take fewer held-out samples (eval.samples)."]


def words_section(report: dict[str, Any]) -> Section | None:
    """Which words are learned: equal losses can hide that a class of words is not learned by anyone."""
    text = (
        "Hidden words of held-out captions filled in rightly, %, with the image / without it, by class of word; "
        "each model's longest runs, mean over seeds."
    )
    return _by_class(report, "Words by class", text, ("seen:", "blind:"))


def texts_section(report: dict[str, Any]) -> Section | None:
    text = "Hidden words of held-out texts without pictures filled in rightly, %; as above."
    return _by_class(report, "Words of texts by class", text, ("text:",))


def _by_class(report: dict[str, Any], title: str, text: str, views: tuple[str, ...]) -> Section | None:
    done = finished(report["runs"])
    words = [c.removeprefix(views[0]) for c in extra_columns(done) if c.startswith(views[0])]
    longest = {model: max(r["steps"] for r in runs) for model, runs in groups(done, "model").items()}
    rows = [
        r for r in done if r["steps"] == longest[r["model"]] and any(r.get(views[0] + w) is not None for w in words)
    ]
    if not rows:
        return None
    body = []
    for (model, steps), runs in groups(rows, "model", "steps").items():
        cells = [" / ".join(f"{100 * over_seeds(runs, view + word)[0]:.0f}" for view in views) for word in words]
        body.append([model, f"{steps:,}", str(len(runs)), *cells])
    return Section(title, text, ["model", "steps", "seeds", *words], body)
