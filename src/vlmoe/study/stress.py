"""Faults put into short runs, with the autopilot on and off: what survives, how soon it recovers, what it costs.

A fault belongs to micro-batches of the data, not to steps: a run that rolls back and leaves the data out leaves the
fault behind, as it would leave a bad shard behind.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from vlmoe.config import Recipe, UserError, read_json
from vlmoe.data.batch import Batch
from vlmoe.data.loader import Step, StepData, held_out, held_out_size
from vlmoe.evaluate.masked import losses
from vlmoe.model.device import pick_device
from vlmoe.tasks.base import Summed
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.given import check_given
from vlmoe.train.loop import Trainer, train
from vlmoe.train.pretrain import TOKENIZERS, prepare_text_tokenizer, prepare_visual_tokenizer
from vlmoe.train.runlog import EVENTS, METRICS, read_lines

TABLE, REPORT, PICTURE = "stress.md", "stress.json", "stress.png"
RECOVERED = 1.05  # of the undisturbed run's loss, both as running medians
WINDOW = 48  # steps of these medians; after a roll-back the data are others, and shorter ones differ by 5% by chance
DRAWN = 16  # steps of the medians in the picture
Disturb = Callable[[Trainer, int], None]
ChangeData = Callable[[Step, int], Step]


@dataclass
class Fault:
    """disturb(trainer, n): called before micro-step n. data(step, n): what becomes of the n-th micro-batch. first: the
    micro-step it begins with."""

    about: str
    first: int
    disturb: Disturb | None = None
    data: ChangeData | None = None


# --------------------------------------------------------------------------------------------------------------- faults
def faults(steps: int) -> dict[str, Fault]:
    """name -> fault, for a run of so many micro-steps. Most begin in the middle and last a twentieth of the run."""
    middle, stretch = steps // 2, max(1, steps // 20)
    window = range(middle, middle + stretch)
    at = f"at micro-step {middle}"
    during = f"micro-steps {window.start} to {window.stop - 1}"
    return {
        "learning rate x4": Fault(during, middle, disturb=_rate(4, window)),
        "learning rate x10": Fault(during, middle, disturb=_rate(10, window)),
        "router logits x50": Fault(at, middle, disturb=_once(middle, _scale_routers)),
        "NaN in one batch": Fault(at, middle, disturb=_nan(middle)),
        "one expert zeroed": Fault(f"of each layer, {at}", middle, disturb=_once(middle, _fill_expert(0.0))),
        "one expert infinite": Fault(f"of each layer, {at}", middle, disturb=_once(middle, _fill_expert(math.inf))),
        "all tokens to one expert": Fault("in every layer, from the start", 0, disturb=_once(0, _collapse)),
        "corrupted images": Fault(f"noise, {during}", middle, data=_noise(window)),
        "half of the batch padding": Fault("texts twice as long as need be, always", 0, data=_pad),
    }


def _once(at: int, act: Callable[[Trainer], None]) -> Disturb:
    return lambda trainer, n: act(trainer) if n == at else None


def _rate(factor: float, window: range) -> Disturb:
    def disturb(trainer: Trainer, n: int) -> None:
        if n in window:
            for group in trainer.optimizer.param_groups:
                group["lr"] *= factor

    return disturb


def _nan(at: int) -> Disturb:
    def disturb(trainer: Trainer, n: int) -> None:
        if n != at:
            return

        def spoil(module: nn.Module, inputs: Any, output: Any) -> None:
            output.losses["fault"] = Summed(torch.tensor(math.nan, device=output.loss.device), 1)
            handle.remove()

        handle = trainer.task.register_forward_hook(spoil)

    return disturb


@torch.no_grad()
def _scale_routers(trainer: Trainer) -> None:
    for layer in trainer.routed.values():
        layer.router.weight.mul_(50)


def _fill_expert(value: float) -> Callable[[Trainer], None]:
    @torch.no_grad()
    def act(trainer: Trainer) -> None:
        for layer in trainer.routed.values():
            for parameter in layer.experts.parameters():
                parameter[0] = value
                for moment in trainer.optimizer.state.get(parameter, {}).values():
                    if torch.is_tensor(moment) and moment.shape == parameter.shape:
                        moment[0] = 0.0

    return act


@torch.no_grad()
def _collapse(trainer: Trainer) -> None:
    """A direction that all tokens get from the norm before the layer, and that the first router row answers to."""
    for block in trainer.task.backbone.blocks:  # type: ignore[union-attr]
        for branch in block.branches.values():
            if hasattr(branch.layer, "router"):
                direction = torch.ones_like(branch.norm.bias)
                branch.norm.bias += direction
                branch.layer.router.weight[0] += 5 * direction / direction.square().sum()


def _noise(window: range) -> ChangeData:
    def change(step: Step, n: int) -> Step:
        if n in window:
            generator = torch.Generator().manual_seed(n)
            for batch in step.batches.values():
                if batch.image_BCHW is not None:
                    shape = batch.image_BCHW.shape
                    batch.image_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return step

    return change


def _pad(step: Step, n: int) -> Step:
    for batch in step.batches.values():
        if batch.text_BT is not None and batch.valid_BT is not None and batch.target_BT is not None:
            more = batch.text_BT.shape[1]
            batch.text_BT = nn.functional.pad(batch.text_BT, (0, more))
            batch.valid_BT = nn.functional.pad(batch.valid_BT, (0, more), value=False)
            batch.target_BT = nn.functional.pad(batch.target_BT, (0, more), value=-100)
    return step


class _Changed(StepData):
    """A recipe's data with a fault in it."""

    def __init__(self, data: StepData, change: ChangeData) -> None:
        self._data, self._change = data, change

    def __getitem__(self, n: int) -> Step:
        return self._change(self._data[n], n)


# ----------------------------------------------------------------------------------------------------------------- runs
def stress(
    recipe: Recipe, out: Path, names: Iterable[str] | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run every fault with the autopilot on and off, beside the undisturbed run. Writes stress.json, stress.md and
    stress.png into `out`; finished runs there are not repeated.

    Raises:
        UserError: an unknown fault's name.
    """
    console = console or Console()
    recipe = copy.deepcopy(recipe)
    recipe.train.log_every = 1
    recipe.train.checkpoint_every = max(1, recipe.train.steps // 10)
    recipe.model.max_text *= 2  # room for the padding; the same model for all runs
    known = faults(recipe.train.steps * recipe.train.accumulate)
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise UserError(f"no fault {name!r}; there are: {', '.join(known)}")
    check_given(recipe, out)
    device = pick_device(recipe.train.device)
    text = prepare_text_tokenizer(recipe, out / TOKENIZERS, console)
    visual = prepare_visual_tokenizer(recipe, text, out / TOKENIZERS, device, console)

    def run(name: str, fault: Fault | None, on: bool) -> dict[str, Any]:
        folder = out / f"{name.replace(' ', '-')}-{'on' if on else 'off'}"
        result = folder / "result.json"
        if not result.is_file():
            plan = copy.deepcopy(recipe)
            plan.train.guard.on, plan.run.dir = on, str(folder)
            torch.manual_seed(plan.seed)
            task = MaskedDataModelling(plan.model, visual)
            data: StepData = StepData(plan, text)
            if fault is not None and fault.data is not None:
                data = _Changed(data, fault.data)
            error = ""
            try:
                done = train(plan, task, data, folder, disturb=fault.disturb if fault else None)
                if done.stopped_by is not None:  # the same command goes on with this run
                    raise SystemExit(128 + done.stopped_by)
            except UserError as problem:
                error = str(problem).splitlines()[0]
            found = {"error": error, "loss": math.nan}
            if not error:
                task.eval()
                found["loss"] = losses(task, _held_out(plan, text, device))["sum"]
            result.write_text(json.dumps({k: v if v == v else None for k, v in found.items()}))
        return read_json(result) | {"folder": str(folder)}

    plain = run("undisturbed", None, True)
    rows = []
    for name in chosen:
        for on in (True, False):
            console.print(f"{name}, autopilot {'on' if on else 'off'}", highlight=False)
            rows.append(_row(name, known[name], on, run(name, known[name], on), plain))
    report = {"undisturbed": plain["loss"], "steps": recipe.train.steps, "seed": recipe.seed, "faults": rows}
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    (out / TABLE).write_text(markdown(report))
    draw(report, out)
    return report


def _held_out(recipe: Recipe, text: Any, device: torch.device) -> Iterable[Batch]:
    count = min(recipe.eval.samples, held_out_size(recipe, "val", "pair"))
    for start in range(0, count, recipe.eval.batch):
        yield held_out(recipe, text, "val", "pair", start, min(recipe.eval.batch, count - start)).to(device)


def _row(name: str, fault: Fault, on: bool, found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    survived = not found["error"] and found["loss"] is not None
    actions: dict[str, int] = {}
    for event in read_lines(Path(found["folder"]) / EVENTS):
        if event["event"] not in ("launch", "checkpoint", "warning"):
            actions[event["event"]] = actions.get(event["event"], 0) + 1
    excess = found["loss"] / plain["loss"] - 1 if survived else None
    steps = recovery(curve(Path(found["folder"])), curve(Path(plain["folder"])), fault.first) if survived else None
    return {
        "fault": name, "about": fault.about, "autopilot": on, "survived": survived, "error": found["error"],
        "loss": found["loss"], "excess": excess, "recovery": steps, "actions": actions, "folder": found["folder"],
    }  # fmt: skip


def curve(folder: Path) -> dict[int, float]:
    """step -> training loss, of what the log kept."""
    return {r["step"]: r["loss"] for r in read_lines(folder / METRICS) if r.get("loss") is not None}


def recovery(ours: dict[int, float], plain: dict[int, float], first: int) -> int | None:
    """Steps from the fault until the loss, as a running median, is for good within 5% of the undisturbed run's. None
    when it never is; 0 when it never was outside."""
    last_bad = None
    steps = [step for step in sorted(ours) if step > first]
    for i, step in enumerate(steps):
        window = steps[max(0, i - WINDOW + 1) : i + 1]
        theirs = [plain[s] for s in window if s in plain]
        if theirs and statistics.median(ours[s] for s in window) > RECOVERED * statistics.median(theirs):
            last_bad = step
    if last_bad is None:
        return 0
    return None if not steps or last_bad == steps[-1] else last_bad - first


# ---------------------------------------------------------------------------------------------------------------- shown
def markdown(report: dict[str, Any]) -> str:
    head = ["fault", "autopilot", "survived", "steps to recover", "held-out loss", "against undisturbed", "actions"]
    lines = ["| " + " | ".join(head) + " |", "|" + "-|" * len(head)]
    for row in report["faults"]:
        lines.append("| " + " | ".join(cells(row)) + " |")
    first = (
        f"Undisturbed: held-out loss {report['undisturbed']:.3f} after {report['steps']} steps (seed {report['seed']})."
    )
    return "\n".join([first, "", *lines]) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    """A fault's row in words."""
    recovered = "never" if row["recovery"] is None else str(row["recovery"])
    return [
        row["fault"],
        "on" if row["autopilot"] else "off",
        "yes" if row["survived"] else "no",
        recovered if row["survived"] else "-",
        f"{row['loss']:.3f}" if row["survived"] else "-",
        f"{row['excess']:+.1%}" if row["survived"] else row["error"].partition(":")[0] + ": ended",
        ", ".join(f"{kind} {count}x" for kind, count in row["actions"].items()) or "none",
    ]


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console()
    table = Table(title=f"Undisturbed: held-out loss {report['undisturbed']:.3f}", title_justify="left")
    for column in ("fault", "autopilot", "survived", "recovered after", "loss", "excess", "actions"):
        table.add_column(column)
    for row in report["faults"]:
        table.add_row(*cells(row))
    console.print(table)


def draw(report: dict[str, Any], out: Path) -> Path:
    """Training loss of each fault, autopilot on and off, over the undisturbed run's."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["fault"] for row in report["faults"]))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    plain = _smooth(curve(out / "undisturbed-on"))
    for axis, name in zip(axes, names, strict=False):
        axis.plot(*plain, color="#999999", linewidth=2.5, label="undisturbed")
        for row in report["faults"]:
            if row["fault"] == name:
                style = {"color": "#0072B2"} if row["autopilot"] else {"color": "#D55E00", "linestyle": "--"}
                steps, values = _smooth(curve(Path(row["folder"])))
                axis.plot(
                    steps, values, linewidth=1.3, label=f"autopilot {'on' if row['autopilot'] else 'off'}", **style
                )
                if not row["survived"] and steps:
                    axis.plot(steps[-1], values[-1], "x", color=style["color"], markersize=9, markeredgewidth=2)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.2)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8)
    low, high = min(plain[1], default=0.0), max(plain[1], default=1.0)
    axes[0].set_ylim(0.9 * low, 1.25 * high)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("training loss", fontsize=10)
    figure.savefig(out / PICTURE, dpi=110)
    return out / PICTURE


def _smooth(points: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [
        statistics.median(points[s] for s in steps[max(0, i - DRAWN + 1) : i + 1]) for i in range(len(steps))
    ]
