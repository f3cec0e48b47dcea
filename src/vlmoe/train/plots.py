"""Pictures of a run: its curves and where its tokens went. Colours are told apart by colour-blind readers.

Each function reads the run's folder, writes one PNG and returns its path, or None when there is nothing to draw.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from vlmoe.train.runlog import EVENTS, METRICS, ROUTING, read_lines

CURVES, ROUTING_PNG = "curves.png", "routing.png"
# Okabe and Ito's palette, dark ones first; line styles repeat the distinction for prints without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":")
# Purple for too little, white for even, orange for too much; above LOAD_LIMIT even shares the last colour holds.
LOAD_COLOURS, LOAD_LIMIT = "PuOr_r", 3.0
NOT_DRAWN = {"step", "tokens_per_second", "seconds", "wait_share", "memory_gib"}
TIME_COLUMNS = 200
LABELS = {"loss": "loss, all parts", "lr": "learning rate", "grad_norm": "gradient norm, before clipping"}


def plot_curves(run_dir: Path) -> Path | None:
    """curves.png: one panel for each measure (loss, its parts, learning rate, gradient norm, what the task reports).

    Metrics named "kind/measure" share the measure's panel, one line for each kind.
    """
    records = read_lines(run_dir / METRICS)
    if not records:
        return None
    last = max(record["step"] for record in records)
    for event in read_lines(run_dir / EVENTS):  # never cut: of a step done again the last counts, as it is drawn last
        if event["event"] == "validation" and event["step"] <= last and "parts" in event:
            parts = {f"val {name}": score["value"] for name, score in event["parts"].items()}
            records.append({"step": event["step"], **parts})
    names = list(dict.fromkeys(name for record in records for name in record if name not in NOT_DRAWN))
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(name.rpartition("/")[2], []).append(name)
    kinds = sorted({name.rpartition("/")[0] for name in names if "/" in name})
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (measure, members) in zip(axes, panels.items(), strict=False):
        for name in members:
            kind = name.rpartition("/")[0]
            _line(axis, records, name, kind, kinds.index(kind) if kind else 0)
        axis.set_title(LABELS.get(measure, measure.replace("_", " ")), fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if measure == "grad_norm":
            axis.set_yscale("log")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(run_dir.resolve().name, fontsize=11)
    figure.supxlabel("step", fontsize=10)
    return _save(figure, run_dir / CURVES)


def _line(axis: Any, records: list[dict[str, Any]], name: str, label: str, index: int) -> None:
    """The values as they are, faint, and their running mean over a fiftieth of the curve."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if not points:
        return
    step, value = np.array(points, dtype=float).T
    label = label or "_"  # matplotlib leaves such labels out of the legend
    colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
    window = 1 if name == "lr" else len(value) // 50
    if window < 2:
        axis.plot(step, value, color=colour, linestyle=style, label=label, marker="." if len(value) < 3 else None)
        return
    axis.plot(step, value, color=colour, alpha=0.18, linewidth=0.8)
    mean = np.convolve(value, np.ones(window) / window, mode="valid")
    axis.plot(step[window - 1 :], mean, color=colour, linestyle=style, linewidth=1.6, label=label)


def plot_routing(run_dir: Path) -> Path | None:
    """routing.png: the load of each expert, by block over the last quarter of the run, and by layer over time.

    A load is told as a multiple of the even share: 0 is an idle expert, 1 is even.
    """
    records = read_lines(run_dir / ROUTING)
    if not records:
        return None
    layers = sorted(records[-1]["load"], key=lambda name: (name.rpartition("/")[2], _block(name)))
    by_modality: dict[str, list[str]] = {}
    for name in layers:
        by_modality.setdefault(name.rpartition("/")[2], []).append(name)
    depth = max(len(names) for names in by_modality.values())
    heights = [1.2 + 0.25 * depth] + [1.3] * depth
    figure = Figure(figsize=(6.0 * len(by_modality), 0.8 + sum(heights)), layout="constrained")
    grid = figure.subplots(1 + depth, len(by_modality), squeeze=False, gridspec_kw={"height_ratios": heights})
    image = None
    for column, (modality, names) in enumerate(by_modality.items()):
        over_time = {name: _relative([record["load"][name] for record in records]) for name in names}
        late = {name: load_TE[-max(1, len(load_TE) // 4) :].mean(axis=0) for name, load_TE in over_time.items()}
        image = _final(grid[0, column], late, modality)
        for row in range(depth):
            axis = grid[1 + row, column]
            if row < len(names):
                _over_time(axis, over_time[names[row]], names[row], [record["step"] for record in records])
            else:
                axis.set_visible(False)
        grid[len(names), column].set_xlabel("step")
    if image is not None:
        label = "load, in even shares (1 = even, 0 = idle)"
        figure.colorbar(image, ax=grid, extend="max", label=label, shrink=0.5, location="right")
    figure.suptitle(run_dir.resolve().name, fontsize=11)
    return _save(figure, run_dir / ROUTING_PNG)


def _final(axis: Any, late: dict[str, np.ndarray], modality: str) -> Any:
    """Blocks x experts. Layers with fewer experts than the widest end early."""
    widest = max(len(load_E) for load_E in late.values())
    picture = np.full((len(late), widest), np.nan)
    for row, load_E in enumerate(late.values()):
        picture[row, : len(load_E)] = load_E
    image = axis.imshow(
        picture, cmap=LOAD_COLOURS, norm=TwoSlopeNorm(1, 0, LOAD_LIMIT), aspect="auto", interpolation="nearest"
    )
    axis.set_yticks(range(len(late)), [f"block {_block(name)}" for name in late], fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("expert")
    axis.set_title(f"{modality}: load of the experts, last quarter of the run", fontsize=10)
    if widest <= 12:
        for (row, expert), value in np.ndenumerate(picture):
            if np.isfinite(value):
                tone = "white" if value < 0.3 or value > 2.4 else "black"
                axis.text(expert, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=tone)
    return image


def _over_time(axis: Any, load_TE: np.ndarray, name: str, steps: list[int]) -> None:
    bins = np.array_split(load_TE, min(TIME_COLUMNS, len(load_TE)))
    picture = np.stack([part.mean(axis=0) for part in bins], axis=1)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, picture.shape[0] - 0.5, -0.5)
    axis.imshow(
        picture,
        cmap=LOAD_COLOURS,
        norm=TwoSlopeNorm(1, 0, LOAD_LIMIT),
        aspect="auto",
        extent=extent,
        interpolation="nearest",
    )
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("expert", fontsize=8)
    axis.set_title(f"block {_block(name)}, over time", fontsize=9)


def _relative(loads: list[list[float]]) -> np.ndarray:
    """(T, E) counts -> multiples of the even share; a step without tokens counts as even."""
    load_TE = np.array(loads, dtype=float)
    mean_T1 = load_TE.mean(axis=1, keepdims=True)
    return np.where(mean_T1 > 0, load_TE / np.maximum(mean_T1, 1e-9), 1.0)


def _block(name: str) -> int:
    """'3/vision' -> 3."""
    return int(name.partition("/")[0])


def _save(figure: Figure, path: Path) -> Path:
    with matplotlib.rc_context({"font.size": 9}):
        figure.savefig(path, dpi=110)
    return path
