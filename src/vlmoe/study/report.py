"""A study's report: runs.csv and runs.parquet, study.json, study.md, study.html and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmoe.model.sizes import short
from vlmoe.study import compare, draw, law
from vlmoe.study.collect import CSV, PARQUET, Row, extra_columns, finished, groups, over_seeds, write_table
from vlmoe.study.declare import StudyError
from vlmoe.study.draw_map import draw_map
from vlmoe.study.headline import HEADLINE, headline_of
from vlmoe.study.page import Section, to_html, to_markdown
from vlmoe.study.plan import REPORT, undetermined
from vlmoe.study.saturation import crossings, map_sections, saving_map, told
from vlmoe.study.saved import BEST, saved_section, times, verdict
from vlmoe.study.scores import splits_section, texts_section, words_section
from vlmoe.train.runlog import replace_text

MARKDOWN, PAGE = "study.md", "study.html"
PARTS = ("loss_words", "loss_patches", "loss_texts")
LOSSES = ("loss", *PARTS, "accuracy_words")
NAMES = {
    "loss": "loss", "loss_words": "words", "loss_patches": "patches", "loss_texts": "texts",
    "accuracy_words": "words right, %",
}  # fmt: skip
ROWS = {"dense": "dense", "text": "T-MoE", "vision": "V-MoE", "both": "both"}


def write_report(about: dict[str, Any], out: Path, console: Console | None = None) -> dict[str, Any]:
    """Analyse the runs, write all files and print what came out. about: what `vlmoe.study.run` knows."""
    rows: list[Row] = about["runs"]
    scores = [c for c in extra_columns(rows) if "." in c]
    report = about | {
        "saved": compare.compute_saved(rows),
        "frontier": compare.frontiers(rows),
        "ablation": compare.ablation(rows, about["ablation_models"], [*LOSSES, *scores]),
        "law": _law(rows, out),
        "map": saving_map(rows),
    }
    report["crossings"] = crossings(report["map"])
    draw.draw_frontier(rows, report["frontier"], out)
    draw.draw_saved(report["saved"], out)
    draw_map(report["map"], out)
    write_table(rows, out)
    if report["declared"].get("headline"):
        _write_headline(report, out)
    replace_text(out / REPORT, json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    sections = [s for s in sections_of(report, scores) if s is not None]
    title = f"{about['name']}: sparse against dense at equal compute"
    replace_text(out / MARKDOWN, to_markdown(title, sections))
    replace_text(out / PAGE, to_html(title, sections, out))
    if console is not None:
        for line in headline(report):
            console.print(line, highlight=False)
        console.print(f"{out / PAGE}  ({MARKDOWN}, {CSV}, {PARQUET}, {REPORT} and pictures beside it)", highlight=False)
    return report


def _write_headline(report: dict[str, Any], out: Path) -> None:
    """The declared figure; none while its runs are not done."""
    try:
        found = headline_of(report)
    except StudyError as error:
        report["notes"] = [*report["notes"], str(error)]
        return
    replace_text(out / HEADLINE, json.dumps(_finite(found), indent=1, allow_nan=False) + "\n")


def _law(rows: Sequence[Row], out: Path) -> dict[str, Any] | None:
    """The law, and how it predicts runs held out of the fit; why there is none where runs are too few or of several
    worlds."""
    if len({compare.world_of(row) for row in rows}) > 1:
        return {"none": "a law is of one world, and these runs are of several"}
    try:
        fitted = law.fit(rows)
    except StudyError as error:
        return {"none": str(error)}
    checked = law.check(rows, fitted.form)
    runs = finished(rows)
    draw.draw_law(runs, fitted.predict(runs), checked, out)
    return fitted.as_dict() | {"held_out": checked}


def _finite(value: Any) -> Any:
    """For JSON: a number that is none becomes null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------------------- in words
def headline(report: dict[str, Any]) -> list[str]:
    """What came out, in a few sentences; first, of the sparse models with most seeds and lengths, the one that saves
    most FLOPs, if it can be one whose mean is more than an upper bound."""
    known = [e for e in report["saved"] if e["flops"]]
    lines = []
    if known:
        best = max(known, key=_standing)
        lines.append(
            f"Compute saved by {best['model']} at the final loss of {best['twin']}: {times(best['flops'])} times in "
            f"FLOPs, {times(best['seconds'])} times on the clock. Below 1 it needs more. {verdict(best['flops'])}"
        )
        if best["flops_best"]:
            lines.append(
                "Against the best dense model of any size and length, at its own final loss: "
                f"{times(best['flops_best'], BEST)} times in FLOPs, {times(best['seconds_best'], BEST)} times on the "
                "clock."
            )
    lines += [told(c) for c in report.get("crossings", []) if c["world"] or c["concepts"]]
    status = {s: sum(r["status"] == s for r in report["runs"]) for s in ("done", "failed", "stopped", "not run")}
    lines.append("Runs: " + ", ".join(f"{n} {s}" for s, n in status.items() if n) + ".")
    return lines


def _standing(entry: dict[str, Any]) -> tuple[int, int, bool, float]:
    found = entry["flops"]
    return len(found["seeds"]), entry["lengths"], found["bound"] != compare.AT_MOST, found["factor"] or 0.0


def sections_of(report: dict[str, Any], scores: Sequence[str]) -> list[Section | None]:
    text = "\n\n".join(x for x in (report["about"].strip(), " ".join(headline(report))) if x)
    return [
        Section("", text),
        Section("Loss against compute, time and memory", FRONTIER_TEXT, picture=draw.FRONTIER),
        saved_section(report),
        *map_sections(report["map"]),
        _models_section(report),
        splits_section(report),
        words_section(report),
        texts_section(report),
        _ablation_section(report, scores),
        _downstream_section(report, scores),
        _law_section(report),
        _notes_section(report),
        _failed_section(report),
        Section("How it was counted", counted(report)),
    ]


FRONTIER_TEXT = (
    "Each point is the end of finished runs of one length: the mean over seeds, with the least and the most. Lines "
    "join the lengths of a model; the grey band is the frontier, what nothing beats in both. Memory: each model's "
    "longest runs."
)


def _models_section(report: dict[str, Any]) -> Section | None:
    done = finished(report["runs"])
    if not done:
        return None
    parts = [m for m in PARTS if any(r.get(m) is not None for r in done)]
    head = ["model", "parameters", "per token", "FLOPs per token", "x dense", "memory", "FLOPs/s", "steps", "seeds"]
    head.append("loss")
    head += [NAMES[part] for part in parts]
    body = []
    for (model, steps), runs in groups(done, "model", "steps").items():
        about = report["models"][model]
        mean, least, most = over_seeds(runs, "loss")
        spread = f" [{least:.3f}, {most:.3f}]" if len(runs) > 1 else ""
        memory = runs[0]["memory_bytes"] or runs[0]["memory_predicted"]
        body.append([
            model, short(about["params_total"]), short(about["params_per_token"]), short(about["flops_per_token"]),
            f"{over_twin(report['models'], model):.3f}", f"{memory / 2**20:.3g} MiB",
            short(over_seeds(runs, "flops_per_second")[0]), f"{steps:,}", str(len(runs)),
            f"{mean:.3f}{spread}", *(_mean(runs, part) for part in parts),
        ])  # fmt: skip
    text = (
        "Held-out loss in nats, mean [least, most] over seeds: of hidden words plus of hidden patches. *x dense*: "
        "FLOPs per token over those of the dense model that it is compared with."
    )
    if "loss_texts" in parts:
        text += " Texts: of hidden words in texts without pictures, which the loss leaves out."
    return Section("Models and lengths", text, head, body)


def over_twin(models: dict[str, Any], name: str) -> float:
    """FLOPs per token of a model over those of the dense one that it is compared with."""
    return models[name]["flops_per_token"] / models[models[name]["twin"]]["flops_per_token"]


def _mean(runs: Sequence[Row], measure: str) -> str:
    return f"{over_seeds(runs, measure)[0]:.3f}" if all(r.get(measure) is not None for r in runs) else "-"


def _ablation_section(report: dict[str, Any], scores: Sequence[str]) -> Section | None:
    if not report["ablation"]:
        return None
    measures = [m for m in [*LOSSES, *scores] if all(m in e["measures"] for e in report["ablation"])]
    head = ["", "model", "parameters", "FLOPs per token", *(NAMES.get(m, m) for m in measures), "loss against dense"]
    body = []
    for e in report["ablation"]:
        cells = [_interval(e["measures"][m], m) for m in measures]
        difference = e["measures"]["loss"]["difference"]
        body.append([
            ROWS[e["row"]], e["model"], short(e["params_total"]), short(e["flops_per_token"]), *cells,
            _interval(difference, "loss", sign=True) if difference else "",
        ])  # fmt: skip
    first = report["ablation"][0]
    equal = "as many steps" if report["declared"]["equal"] == "steps" else "equal FLOPs"
    text = (
        f"Experts for neither, text, vision and both, after {first['steps']:,} steps of the dense model and {equal} "
        f"for the others; mean and 95% interval over {len(first['seeds'])} seed{'s' * (len(first['seeds']) > 1)}, "
        "differences paired by seed."
    )
    return Section("Where the experts are: the paper's ablation", text, head, body)


def _downstream_section(report: dict[str, Any], scores: Sequence[str]) -> Section | None:
    rows = [r for r in finished(report["runs"]) if any(r.get(s) is not None for s in scores)]
    if not rows:
        return None
    body = []
    for (model, steps), runs in groups(rows, "model", "steps").items():
        cells = []
        for score in scores:
            values = [r[score] for r in runs if r.get(score) is not None]
            cells.append(_interval(compare.mean_interval(values), score) if values else "-")
        body.append([model, f"{steps:,}", str(len(runs)), f"{over_seeds(runs, 'loss')[0]:.3f}", *cells])
    text = "Fine-tuned from the longest runs of chosen models, all alike. Mean and 95% interval over seeds."
    return Section("Downstream", text, ["model", "steps", "seeds", "loss", *scores], body)


def _interval(found: dict[str, Any], measure: str, sign: bool = False) -> str:
    scale = 1.0 if measure.startswith("loss") or measure.endswith("CIDEr") else 100.0
    digits = 3 if measure.startswith("loss") else 1
    form = f"{'+' if sign else ''}.{digits}f"
    text = f"{found['mean'] * scale:{form}}"
    if found["low"] is None:
        return text
    return f"{text} ± {scale * (found['high'] - found['low']) / 2:.{digits}f}"


def _law_section(report: dict[str, Any]) -> Section | None:
    found = report["law"]
    if "none" in found:
        return Section("Scaling law", f"None: {found['none']}.")
    checked = found["held_out"]
    text = (
        f"`{found['formula']}`, with N parameters per token (embeddings left out), E the expansion (all feed-forward "
        f"parameters over those of a token) and D tokens. Fitted to {found['runs']} runs; scatter "
        f"{found['scatter']:.2%}. Refits draw whole configurations, a model and length with all its seeds."
    )
    if checked:
        text += (
            f" Without the {len(checked['runs'])} runs of most FLOPs (all of a size and length, dense and sparse) it "
            f"predicts them with a mean error of {checked['mean_error']:.2%}; {checked['inside']:.0%} of them lie in "
            "their 95% interval."
        )
    if at := undetermined(found):
        text += f" {at}"
    if checked and checked["at_bound"]:
        text += f" In the fit without the held-out runs {', '.join(checked['at_bound'])} ended on a bound."
    head = ["parameter", "value", "95% over refits", "on a bound of the fit"]
    body = [
        [name, f"{found['parameters'].get(name.removeprefix('log_'), math.nan):.4g}",
         "[" + ", ".join(f"{math.exp(v) if name.startswith('log_') else v:.4g}" for v in ends) + "]",
         ", ".join([*["value"] * (name in found["at_bound"]),
                    *(f"{end} end" for end in found["intervals_at_bound"].get(name, []))])]
        for name, ends in found["intervals"].items()
    ]  # fmt: skip
    body = [[row[0].removeprefix("log_"), *row[1:]] for row in body]
    return Section("Scaling law", text, head, body, draw.LAW)


def _notes_section(report: dict[str, Any]) -> Section | None:
    sweep = [r for r in report["runs"] if r["stage"] == "sweep"]
    if not sweep and not report["notes"]:
        return None
    body = [
        [side, f"{rate:g}", f"{over_seeds(runs, 'loss')[0]:.4f}"]
        for (side, rate), runs in groups(finished(sweep, "sweep"), "side", "learning_rate").items()
    ]
    text = "\n\n".join(f"{note[0].upper()}{note[1:]}." for note in report["notes"])
    if report["sweep"]:
        rule = next(iter(report["sweep"].values()))
        text += (
            f"\n\nCarried to other widths as rate x (width / {rule['width']}) ^ {rule['width_power']:g}; the same for "
            "all lengths and depths."
        )
    return Section("Learning rates and notes", text, ["side", "learning rate", "loss"], body)


def _failed_section(report: dict[str, Any]) -> Section | None:
    rows = [r for r in report["runs"] if r["status"] != "done"]
    if not rows:
        return None
    body = [[r["run"], r["status"], r["error"] or ""] for r in rows]
    return Section("Runs that are not in the figures", "", ["run", "status", "why"], body)


def counted(report: dict[str, Any]) -> str:
    """What every number rests on."""
    declared, where = report["declared"], report["machine"]
    equal = {
        "per_token": "sparse and dense models of a size cost the same FLOPs per token within "
        f"{declared['tolerance']:.0%} and train for the same steps",
        "total": "every model trains for as many steps as give the reference's total FLOPs",
        "steps": "all models train for the same steps, whatever they cost",
    }[declared["equal"]]
    return (
        f"Equal compute: {equal}.{_ratios(report)} All runs of a seed see the same data in the same order and share "
        "their tokenizers. FLOPs are those of training, forward and backward, heads, router and dispatch and the "
        f"visual tokenizer's targets included. Padding is {report['padding']:.1%} of the positions. It is not counted "
        "among the tokens, and every layer of both sides is charged for it alike: attention, dense layers, shared "
        "experts and routers compute it; routed experts skip it and are charged as if they did not, for a dense layer "
        f"could skip it as well.{_computed(report)} Steps done again after a roll-back cost again. Wall clock is "
        f"that of training alone, {report['jobs']} runs at a time with one thread each, so runs slow each other down "
        "alike. Memory is what tensors of a step hold, measured. Losses are of hidden words and hidden patches of "
        "held-out pairs. A run in the middle, under a learning rate that still falls, is not a run of that length, so "
        f"only finished runs count.\n\n{where['device_name']}, torch {report['torch']}, {report['date']}; "
        f"{report['hours_used']:.1f} h. `{report['command']}`"
    )


def _ratios(report: dict[str, Any]) -> str:
    """Each pair's ratio, and which are not equal as declared."""
    models = report["models"]
    ratios = {name: over_twin(models, name) for name, m in models.items() if m["side"] == "sparse"}
    if not ratios:
        return ""
    ends = sorted({f"{min(ratios.values()):.3f}", f"{max(ratios.values()):.3f}"})
    text = f" Sparse over dense, FLOPs per token: {' to '.join(ends)}."
    if report["declared"]["equal"] != "per_token":
        return text
    tolerance = report["declared"]["tolerance"]
    beyond = [f"{name} ({ratio:.3f})" for name, ratio in ratios.items() if abs(ratio - 1) > tolerance]
    return text + (f" Not equal within {tolerance:.0%}: {', '.join(beyond)}." if beyond else "")


def _computed(report: dict[str, Any]) -> str:
    """How much of the charge is for what is not computed."""
    shares = [1 - m["flops_computed_per_token"] / m["flops_per_token"] for m in report["models"].values()]
    return f" What they skip is up to {max(shares):.1%} of a model's FLOPs." if max(shares) > 0 else ""
