"""What to train with given FLOPs and memory: candidates of a study's kinds of model, judged by its scaling law.

Candidates scale the study's recipe: widths in steps of its heads' width, depth in proportion, dense or with experts as
the study's best sparse model has them. Experts stay within what the study tried; parameters and tokens may go beyond,
which is then said.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmoe.config import Recipe, RecipeError, UserError, flat, load_recipe, override, read_json, to_mapping
from vlmoe.config.validation import validate
from vlmoe.model.accounting import KINDS, account, gib
from vlmoe.model.flops import Shape
from vlmoe.model.flops import flops as model_flops
from vlmoe.model.memory import Sharding
from vlmoe.model.sizes import short, sizes
from vlmoe.study.collect import Row, finished
from vlmoe.study.declare import StudyError
from vlmoe.study.grid import expert_lr
from vlmoe.study.law import AXES, fit
from vlmoe.study.recount import recount
from vlmoe.study.speed import Speeds

REPORT = "study.json"
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
WIDER = 1.12  # from one width to the next, at least
FEWEST = 100  # steps that a run must have
CLOSE = 1.01  # losses within 1% of the best count as equal to it
FASTER = 0.95  # share of the time that is worth a line


@dataclass
class Candidate:
    """One configuration with its price and promise. row: what the law sees. outside: see `Fit.outside`. why: what it is
    an alternative for."""

    name: str
    recipe: Recipe
    row: Row
    steps: int
    memory: int
    seconds: float
    loss: float = 0.0
    low: float = 0.0
    high: float = 0.0
    outside: dict[str, float] = field(default_factory=dict)
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        m = self.recipe.model
        fields = {k: v for k, v in asdict(self).items() if k not in ("recipe", "row")}
        fields |= {k: self.row[k] for k in ("params_total", "params_per_token", "expansion", "tokens", "flops")}
        return fields | {"width": m.width, "depth": m.depth, "learning_rate": self.recipe.train.lr}


def overrides_of(recipe: Recipe, base: Recipe) -> list[str]:
    """What turns `base` into `recipe`, as `key=value`."""
    ours, theirs = (flat(to_mapping(r)) for r in (recipe, base))
    own = ("name", "about", "run.dir")
    return [f"{key}={json.dumps(v)}" for key, v in ours.items() if v != theirs.get(key) and key not in own]


def parse_size(text: str, what: str) -> float:
    """'80GB' -> 8e10, '64GiB' -> 2**36, '1e18' -> 1e18. Raises StudyError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgtp]?i?)b?\s*", text.lower())
    if not match or match[2] not in UNITS or not float(match[1]) > 0:
        raise StudyError(f"{what} got {text!r}, wanted a number above 0, for memory with a unit, as 80GB or 64GiB")
    return float(match[1]) * UNITS[match[2]]


def read_report(path: Path) -> dict[str, Any]:
    """A study's folder or its JSON. Raises StudyError."""
    if not path.exists():
        raise StudyError(f"{path}: no such file or folder; wanted a study's, as `vlmoe study STUDY` makes")
    file = path / REPORT if path.is_dir() else path
    try:
        found = read_json(file, nan=True)
    except FileNotFoundError:
        raise StudyError(f"{file}: no such file; `vlmoe study STUDY` makes a study's {REPORT}") from None
    except (OSError, UserError) as error:
        raise StudyError(f"{file}: cannot be read as a study's {REPORT}: {error}") from None
    if not isinstance(found, dict) or not {"runs", "recipe", "machine"} <= set(found):
        raise StudyError(f"{file}: is no study's {REPORT}: expected the keys runs, recipe and machine")
    return found


def make_plan(
    report: dict[str, Any],
    flops: float,
    memory: float,
    overrides: Sequence[str] = (),
    devices: int = 1,
    shard: bool = False,
    flops_per_second: float | None = None,
    refits: int = 200,
) -> dict[str, Any]:
    """The configuration of least predicted loss that `flops` pay for and that fits `memory` bytes on a device, with
    alternatives.

    overrides: of the study's recipe (batch, precision, recomputation). flops_per_second: what a device sustains in
    training dense models; None: what the study measured, which holds for its machine.

    Raises StudyError: too few runs for a law, a report of an earlier version, or nothing fits.
    """
    report = recount(report)
    rows: list[Row] = report["runs"]
    law = fit(rows, refits=refits)
    base = override(report["recipe"], overrides, "the study's recipe")
    speeds = Speeds(rows, flops_per_second)
    template = _template(rows, report["models"])
    power = report.get("declared", {}).get("expert_power", 0.0)  # studies before there was one had one rate
    found: list[Candidate] = []
    tight: list[int] = []
    limit = max(r["expansion"] for r in finished(rows)) * 1.001
    shapes = _shapes(report["shapes"], base)
    for recipe in _recipes(base, template, flops / devices, shapes):
        candidate = _price(recipe, shapes, flops, Sharding(devices, shard), speeds, limit)
        if candidate is None:
            continue
        sparse = candidate.row["expansion"] > 1
        recipe.train.lr = _learning_rate(report, recipe, sparse)
        recipe.train.expert_lr = expert_lr(recipe.model.vision, power) if sparse else 1.0
        tight.append(candidate.memory)
        if candidate.memory <= memory:
            found.append(candidate)
    if not found:
        need = f"the smallest candidate needs {gib(min(tight))} on a device" if tight else f"{FEWEST} steps cost more"
        raise StudyError(
            f"nothing fits {short(flops)} FLOPs and {gib(memory)} on each device: {need}; "
            "a smaller data.batch, model.recompute=true or --shard make room"
        )
    for candidate, guess in zip(found, law.predict([c.row for c in found]), strict=True):
        candidate.loss, candidate.low, candidate.high = guess["loss"], guess["low"], guess["high"]
        candidate.outside = law.outside(candidate.row)
    found.sort(key=lambda c: c.loss)
    where = report["machine"].get("device_name")
    return {
        "flops": flops, "memory": memory, "devices": devices, "candidates": len(found),
        "too_large": len(tight) - len(found), "law": law.as_dict(),
        "speed_from": "given for dense models" if flops_per_second else f"one thread of {where}",
        "recommended": found[0].as_dict(),
        "alternatives": [c.as_dict() for c in _alternatives(found)],
        "base": report["base"], "overrides": overrides_of(found[0].recipe, load_recipe(report["base"])),
    }  # fmt: skip


def _learning_rate(report: dict[str, Any], recipe: Recipe, sparse: bool) -> float:
    """The study's best for that side, carried to this width by the study's rule; without a sweep the recipe's."""
    sweep = (report.get("sweep") or {}).get("sparse" if sparse else "dense")
    if not sweep:
        return recipe.train.lr
    return sweep["best"] * (recipe.model.width / sweep["width"]) ** sweep["width_power"]


def _template(rows: Sequence[Row], models: dict[str, Any]) -> dict[str, Any] | None:
    """The model section of the sparse model of lowest loss, at the study's longest training."""
    sparse = [r for r in finished(rows) if r["side"] == "sparse"]
    if not sparse:
        return None
    tokens = max(r["tokens"] for r in sparse)
    best = min((r for r in sparse if r["tokens"] > 0.9 * tokens), key=lambda r: r["loss"])
    return models[best["model"]]["model"]


def _recipes(base: Recipe, template: dict[str, Any] | None, flops: float, shapes: list[Shape]) -> list[Recipe]:
    """Dense and sparse models of growing width, depth in proportion, as long as `flops` pay for a dense one."""
    m = base.model
    head, aspect, fused = m.width // m.heads, m.width / m.depth, m.vl_ffn / m.depth
    found: list[Recipe] = []
    last = 0.0
    for heads in range(2, 512):
        width = head * heads
        if width < WIDER * last:
            continue
        last = width
        for experts in [0, *([2**i for i in range(1, 11)] if template else [])]:
            recipe = copy.deepcopy(base)
            c = recipe.model
            c.width, c.heads, c.depth = width, heads, max(2, round(width / aspect))
            c.vl_ffn = min(c.depth, max(min(m.vl_ffn, 1), round(fused * c.depth)))  # none only where the study had none
            for name in ("vision", "text"):
                side, like = getattr(c, name), (template or {}).get(name, {})
                if not experts or like["sparse"] == "none":
                    side.sparse = "none"
                    continue
                side.sparse, side.experts = like["sparse"], experts
                side.granularity, side.shared_experts = like["granularity"], like["shared_experts"]
                side.expert_size, side.router.k = like["expert_size"], like["router"]["k"]
                side.router = type(side.router)(**like["router"])
            try:
                validate(recipe)
            except RecipeError:  # a pattern or a size that this width or depth does not allow
                continue
            if not experts and FEWEST * _step_flops(recipe, shapes) > flops:
                return found
            found.append(recipe)
    return found


def _shapes(measured: Sequence[dict[str, Any]], base: Recipe) -> list[Shape]:
    """The batches that the recipe's data will give, by those of the study; of a kind that it had not, with texts of
    full length."""
    of_kind = {shape["kind"]: shape for shape in measured}
    found = []
    for kind in KINDS:
        samples = getattr(base.data.batch, kind)
        if samples and kind in of_kind:
            had = of_kind[kind]
            sums = {k: round(had[k] * samples / had["samples"]) for k in ("real", "words", "patches")}
            text = min(round(had["text"]), base.model.max_text)  # an override may cut what the study had
            sums["real"] = min(sums["real"], samples * text)
            found.append(Shape(kind, samples, text, **sums))
        elif samples:
            found.append(Shape.full(base.model, base.data.masking, kind, samples))
    return found


def _step_flops(recipe: Recipe, shapes: Sequence[Shape]) -> float:
    cost = sum(model_flops(recipe.model, shape.charged(), recipe.data.visual_tokenizer).total for shape in shapes)
    return cost * recipe.train.accumulate


def _price(
    recipe: Recipe, shapes: list[Shape], flops: float, sharding: Sharding, speeds: Speeds, limit: float
) -> Candidate | None:
    """None where the model has more experts than the study tried, or too few steps are paid for."""
    if sizes(recipe.model).expansion > limit:
        return None
    cost = account(recipe, shapes, sharding)
    steps = int(flops / (cost.charge.total * sharding.devices))
    if steps < FEWEST:
        return None
    memory = account(recipe, sharding=sharding).memory.peak  # some batch has a text of full length
    recipe.train.steps = steps
    m, s = recipe.model, cost.sizes
    sparse = s.expansion > 1
    experts = max((side.experts * side.granularity for side in (m.vision, m.text) if side.sparse != "none"), default=0)
    name = f"dense, {m.depth} blocks of width {m.width}"
    if sparse:
        name = f"{experts} experts a layer, {m.depth} blocks of width {m.width}"
    spent = steps * cost.charge.total * sharding.devices
    row: Row = {
        "params_active": s.params_active, "expansion": s.expansion,
        "tokens": float(steps * cost.tokens * sharding.devices), "flops": spent, "params_total": s.params_total,
        "params_per_token": s.params_per_token,
    }  # fmt: skip
    seconds = spent / sharding.devices / speeds.of("sparse" if sparse else "dense", row["params_active"])
    return Candidate(name, recipe, row, steps, memory, seconds)


def _alternatives(found: list[Candidate]) -> list[Candidate]:
    """Beside the first: the best of the other side, the smallest, fastest and next best in size of those about as
    good."""
    first = found[0]
    chosen: list[Candidate] = []

    def take(why: str, candidates: list[Candidate], key: Any) -> None:
        rest = [c for c in candidates if c is not first and all(c is not other for other in chosen)]
        if rest:
            best = min(rest, key=key)
            best.why = why
            chosen.append(best)

    sparse = first.row["expansion"] > 1
    take(f"best {'dense' if sparse else 'sparse'} model", [c for c in found if (c.row["expansion"] > 1) != sparse],
         lambda c: c.loss)  # fmt: skip
    close = [c for c in found if c.loss <= CLOSE * first.loss]
    take("least memory within 1% of the loss", [c for c in close if c.memory < first.memory], lambda c: c.memory)
    take("fastest within 1% of the loss", [c for c in close if c.seconds < FASTER * first.seconds],
         lambda c: c.seconds)  # fmt: skip
    take("next best of another width", [c for c in found if c.recipe.model.width != first.recipe.model.width],
         lambda c: c.loss)  # fmt: skip
    within = [c for c in found if not {"params_active", "expansion"} & set(c.outside)]
    if first.outside:
        take("best of a size that the study tried", within, lambda c: c.loss)
    return chosen


# ---------------------------------------------------------------------------------------------------------------- shown
def print_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console()
    best = plan["recommended"]
    on = f" on each of {plan['devices']} devices" if plan["devices"] > 1 else ""
    console.print(f"{short(plan['flops'])} FLOPs, {gib(plan['memory'])}{on}: {plan['candidates']} candidates fit, "
                  f"{plan['too_large']} need more memory", highlight=False)  # fmt: skip
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns, names stand above it
    for column in ("", "loss [95%]", "params", "per token", "tokens", "steps", "memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, c in enumerate([best, *plan["alternatives"]], start=1):
        console.print(f"{number} {c.get('why') or 'recommended'}: {c['name']}", highlight=False)
        table.add_row(
            str(number), f"{c['loss']:.3f} [{c['low']:.3f}, {c['high']:.3f}]", short(c["params_total"]),
            short(c["params_per_token"]), short(c["tokens"]), f"{c['steps']:,}", gib(c["memory"]),
            duration(c["seconds"]),
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print(f"\nRecommended, as a run:\n  {command(plan)}", highlight=False, soft_wrap=True)
    speed = short(best["flops"] / best["seconds"] / plan["devices"])
    console.print(f"Time: {speed} FLOPs/s for the recommended model, by its size and the study's runs "
                  f"({plan['speed_from']}).", highlight=False)  # fmt: skip
    console.print(f"Law: {plan['law']['formula']}, from {plan['law']['runs']} runs.", highlight=False)
    if at := undetermined(plan["law"]):
        console.print(at, highlight=False, style="yellow")
    console.print(warning(best), highlight=False, style="yellow" if best["outside"] else "")


def command(plan: dict[str, Any]) -> str:
    return shlex.join(["vlmoe", "pretrain", plan["base"], *plan["overrides"]])


def warning(candidate: dict[str, Any]) -> str:
    """Whether the recommendation lies within what was measured."""
    if not candidate["outside"]:
        return "Within the range of the study's runs on every axis."
    far = ", ".join(f"{AXES[axis]} {times:.3g} times" for axis, times in candidate["outside"].items())
    return (
        f"Extrapolates: {far} beyond the nearest of the study's runs. The interval knows the runs' scatter, not "
        "whether the law holds out there."
    )


def undetermined(law: dict[str, Any]) -> str:
    """Which of the law's parameters its runs leave open; empty where none."""
    values, ends = law["at_bound"], law["intervals_at_bound"]
    parts = [f"{', '.join(values)} ended there"] if values else []
    parts += [f"the interval of {', '.join(ends)} reaches there"] if ends else []
    return f"The fit's bounds: {'; '.join(parts)}: the runs do not determine them." if parts else ""


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
