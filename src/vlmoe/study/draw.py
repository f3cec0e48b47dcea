"""A study's pictures. Blue is dense and orange is sparse, told apart by colour-blind readers; markers and line styles
tell models apart without colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from vlmoe.model.sizes import short
from vlmoe.study.collect import Row, groups
from vlmoe.study.compare import AT_MOST, means

FRONTIER, SAVED, LAW = "study.png", "saved.png", "law.png"
COLOUR = {"dense": "#0072B2", "sparse": "#D55E00"}
INK, GRID = "#333333", "#DDDDDD"
MARKERS = {"dense": "os^Dv", "sparse": "XPhd*<>p8"}
LINES = ("-", "--", ":", "-.")
AXES = {
    "flops": "training FLOPs",
    "seconds": "wall clock, seconds of training",
    "memory_bytes": "memory of a step, MiB",
}
SCALE = {"memory_bytes": 2.0**-20}
STYLE: Any = {
    "font.size": 9, "axes.edgecolor": "#888888", "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def draw_frontier(rows: Sequence[Row], fronts: dict[str, list[dict[str, Any]]], out: Path) -> Path | None:
    """Held-out loss against FLOPs, wall clock and memory: every model's finished runs (mean over seeds, with the
    range), joined from length to length, over the frontier of all. Memory: each model's longest runs. A row of panels
    for each world."""
    worlds = groups(means(rows), "world")
    if not worlds:
        return None
    styles = {world: _styles(points) for world, points in worlds.items()}
    with matplotlib.rc_context(STYLE):
        below = 0.3 + 0.19 * -(-max(map(len, styles.values())) // 3)
        figure = Figure(figsize=(12, (4.2 + below) * len(worlds)), layout="constrained")
        parts = figure.subfigures(len(worlds), 1, squeeze=False)[:, 0]
        for part, (world, points) in zip(parts, worlds.items(), strict=True):
            axes = part.subplots(1, 3, sharey=True)
            models = {p["model"] for p in points}
            for axis, (cost, label) in zip(axes, AXES.items(), strict=True):
                _panel(axis, [p for p in points if cost in p], cost, styles[world])
                front = [(f[cost] * SCALE.get(cost, 1.0), f["loss"]) for f in fronts[cost] if f["model"] in models]
                if len(front) > 1 and cost != "memory_bytes":
                    axis.plot(*zip(*front, strict=True), color="#BBBBBB", linewidth=7, alpha=0.6, zorder=0,
                              solid_capstyle="round", label="_")  # fmt: skip
                axis.set_xlabel(label)
            axes[0].set_ylabel(f"{world}: held-out loss, nats" if world else "held-out loss, nats")
            handles, labels = axes[0].get_legend_handles_labels()
            part.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        figure.savefig(out / FRONTIER, dpi=130)
    return out / FRONTIER


def _styles(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Model -> how it is drawn: side's colour in shades, a marker and a line of its own."""
    found: dict[str, dict[str, Any]] = {}
    for side, colour in COLOUR.items():
        names = list(dict.fromkeys(p["model"] for p in points if p["side"] == side))
        for i, name in enumerate(names):
            lighter = 0.45 * i / max(1, len(names) - 1)
            shade = tuple(c + (1 - c) * lighter for c in to_rgb(colour))
            marker = MARKERS[side][i % len(MARKERS[side])]
            found[name] = {"color": shade, "marker": marker, "linestyle": LINES[i % len(LINES)]}
    return found


def _panel(axis: Any, points: Sequence[dict[str, Any]], cost: str, styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        mine = sorted((p for p in points if p["model"] == name), key=lambda p: p["steps"])
        if cost == "memory_bytes":
            mine = mine[-1:]
        if not mine:
            continue
        x = np.array([p[cost] for p in mine]) * SCALE.get(cost, 1.0)
        y, low, high = (np.array([p[k] for p in mine]) for k in ("loss", "least", "most"))
        axis.errorbar(x, y, yerr=[y - low, high - y], linewidth=1.4, markersize=6, elinewidth=1, capsize=2,
                      markeredgecolor="white", markeredgewidth=0.6, label=name, **style)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    _widen(axis.set_xlim, [p[cost] * SCALE.get(cost, 1.0) for p in points])
    _widen(axis.set_ylim, [p[end] for p in points for end in ("least", "most")])
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(float(v))))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)


def _widen(set_limits: Any, values: Sequence[float]) -> None:
    """Room around values that are nearly one: a logarithmic axis would have none."""
    if values and max(values) < 1.02 * min(values):
        set_limits(min(values) / 1.1, max(values) * 1.1)


def draw_saved(saved: Sequence[dict[str, Any]], out: Path) -> Path | None:
    """Compute saved by each sparse model at its dense twin's final loss, for FLOPs and for wall clock; an arrow where
    only a bound is known."""
    rows = [e for e in saved if e["flops"] or e["seconds"]]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.0 + 0.5 * len(rows)), layout="constrained")
        axis = figure.subplots()
        axis.axvline(1, color="#888888", linewidth=1)
        for marker, colour, label in (("o", "#D55E00", "in FLOPs"), ("s", "#000000", "on the clock")):
            axis.plot([], [], marker, color=colour, markersize=7, label=label)
        for row, entry in enumerate(reversed(rows)):
            for cost, offset, colour, marker in (("flops", 0.13, "#D55E00", "o"), ("seconds", -0.13, "#000000", "s")):
                found = entry[cost]
                if not found or found["factor"] is None:
                    continue
                y = row + offset
                if found["low"] is not None:
                    axis.plot([found["low"], found["high"]], [y, y], color=colour, linewidth=1.6, alpha=0.55)
                edge: Any = {"markerfacecolor": "white" if found["bound"] else colour, "markeredgecolor": colour}
                axis.plot(found["factor"], y, marker, markersize=7, label="_", **edge)
                if found["bound"]:  # the mean lies somewhere on that side
                    end = (-16 if found["bound"] == AT_MOST else 16, 0)
                    axis.annotate("", (found["factor"], y), end, textcoords="offset points",
                                  arrowprops={"arrowstyle": "<-", "color": colour})  # fmt: skip
        axis.set_yticks(range(len(rows)), [e["model"] for e in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xscale("log")
        least, most = axis.get_xlim()
        axis.set_xlim(min(least, 0.5), max(most, 2))
        ticks = [
            t
            for t in (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
            if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]
        ]
        axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(axis="x", color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.set_xlabel("times less than the dense model, at its final loss (hollow with an arrow: a bound)")
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
        figure.savefig(out / SAVED, dpi=130)
    return out / SAVED


def draw_law(
    rows: Sequence[Row], fitted: Sequence[dict[str, float]], checked: dict[str, Any] | None, out: Path
) -> Path:
    """Predicted against measured loss: of the runs in the fit, and of those that a fit without them predicted."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        axis = figure.subplots()
        both = [r["loss"] for r in rows] + [f["loss"] for f in fitted]
        ends = [0.98 * min(both), 1.02 * max(both)]
        axis.plot(ends, ends, color="#888888", linewidth=1)
        for side, colour in COLOUR.items():
            mine = [(r["loss"], f["loss"]) for r, f in zip(rows, fitted, strict=True) if r["side"] == side]
            if mine:
                axis.plot(*zip(*mine, strict=True), "o" if side == "dense" else "X", color=colour, markersize=6,
                          markeredgecolor="white", markeredgewidth=0.6, label=f"{side}, in the fit")  # fmt: skip
        for i, guess in enumerate(checked["runs"] if checked else []):
            axis.plot([guess["measured"]] * 2, [guess["low"], guess["high"]], color="#000000", linewidth=1, alpha=0.5)
            axis.plot(guess["measured"], guess["loss"], "D", markersize=6, markerfacecolor="white",
                      markeredgecolor="#000000", label="held out: most FLOPs" if i == 0 else "_")  # fmt: skip
        for set_scale, side_axis in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
            set_scale("log")
            side_axis.set_major_locator(MaxNLocator(6))
            side_axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            side_axis.set_minor_locator(NullLocator())
        axis.grid(color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.set_xlabel("measured held-out loss, nats")
        axis.set_ylabel("loss by the law")
        axis.legend(frameon=False, fontsize=8.5)
        figure.savefig(out / LAW, dpi=130)
    return out / LAW
