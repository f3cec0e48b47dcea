"""The map of where sparsity pays, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from vlmoe.model.sizes import short
from vlmoe.study.collect import groups
from vlmoe.study.compare import AT_MOST
from vlmoe.study.draw import GRID, INK, STYLE
from vlmoe.study.saturation import PUBLISHED, Point, curve_of, per_parameter, picture_of

COSTS = {"flops": "FLOPs saved, times", "seconds": "wall clock saved, times"}
MARKERS = "os^Dv<>Ph*"
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 10, 20, 30)


def draw_map(points: Sequence[Point], out: Path) -> list[Path]:
    """A picture for each kind of sparse model: FLOPs and wall clock saved, on a logarithmic scale, over tokens per
    parameter, a line for each world; where worlds differ in what there is to know, below it over the bits needed over
    those held, a line for each length."""
    return [_draw(mine, out / picture_of(kind)) for kind, mine in groups(points, "kind").items()]


def _draw(points: Sequence[Point], path: Path) -> Path:
    by_bits = len({p["bits_ratio"] for p in points if p["bits_ratio"]}) > 1
    with matplotlib.rc_context(STYLE):
        rows = 1 + by_bits
        figure = Figure(figsize=(10, 4.4 * rows), layout="constrained")
        parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
        worlds = sorted(groups(points, "world").items(), key=lambda item: item[1][0]["concepts"] or 0)
        lines = [(_world_label(mine[0]), mine) for _, mine in worlds]
        _row(parts[0], lines, "tokens_per_parameter", "tokens of training per parameter of the dense model")
        if by_bits:
            lines = [
                (f"{per_parameter(mine[0]['tokens_per_parameter'])} tokens per parameter", mine)
                for mine in _alike(points)
            ]
            label = "bits to know, over bits that the dense model can hold (2 per parameter)"
            _row(parts[1], lines, "bits_ratio", label)
        figure.savefig(path, dpi=130)
    return path


def _alike(points: Sequence[Point]) -> list[list[Point]]:
    """Points of about the same tokens per parameter: a length of the study in all its worlds, whose texts differ."""
    found: list[list[Point]] = []
    for point in sorted(points, key=lambda p: p["tokens_per_parameter"]):
        if found and point["tokens_per_parameter"] < 1.1 * found[-1][0]["tokens_per_parameter"]:
            found[-1].append(point)
        else:
            found.append([point])
    return found


def _world_label(point: Point) -> str:
    return f"{point['concepts']:,} concepts" if point["concepts"] else point["world"] or point["model"]


def _row(part: Any, lines: Sequence[tuple[str, Sequence[Point]]], x: str, label: str) -> None:
    axes = part.subplots(1, 2, sharex=True, sharey=True)
    colours = matplotlib.colormaps["viridis_r"]
    for axis, (cost, title) in zip(axes, COSTS.items(), strict=True):
        axis.axhline(1, color="#888888", linewidth=1)
        axis.axhline(PUBLISHED, color="#888888", linewidth=1, linestyle="--")
        for i, (name, points) in enumerate(lines):
            colour = colours(0.15 + 0.85 * i / max(1, len(lines) - 1) if len(lines) > 1 else 0.6)
            style: Any = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 6}
            _line(axis, points, x, cost, name, style)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel(title)
        axis.grid(color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
    low, high = axes[0].get_ylim()
    low, high = min(low, 0.8), max(high, 1.2 * PUBLISHED)
    axes[0].set_ylim(low, high)
    ticks = [t for t in TICKS if low <= t <= high]
    values = [p[x] for _, points in lines for p in points if p[x] is not None]
    left, right = min(values) / 1.3, max(values) * 1.3
    axes[0].set_xlim(left, right)
    for axis in axes:
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axis.yaxis.set_tick_params(labelleft=True)
        axis.yaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if right < 1000 * left else LogLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(float(v))))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.text(0.01, PUBLISHED * 1.02, f"{PUBLISHED}, published", transform=axis.get_yaxis_transform(), fontsize=8,
                  color=INK, va="bottom")  # fmt: skip
        axis.text(0.01, 1.02, "level with dense", transform=axis.get_yaxis_transform(), fontsize=8, color=INK,
                  va="bottom")  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8.5)


def _line(axis: Any, points: Sequence[Point], x: str, cost: str, name: str, style: dict[str, Any]) -> None:
    """Measured factors with their interval, joined; a dot for each seed; bounds hollow, with an arrow to where the mean
    may lie."""
    measured = curve_of(points, x, cost)
    axis.plot(*(zip(*measured, strict=True) if measured else ([], [])), linewidth=1.6, markeredgecolor="white",
              markeredgewidth=0.6, label=name, **style)  # fmt: skip
    for point in points:
        found = point[cost]
        if not found or point[x] is None or found["factor"] is None:
            continue
        by_seed = [seed["factor"] for seed in found["seeds"].values() if not seed["bound"]]
        axis.plot([point[x]] * len(by_seed), by_seed, ".", color=style["color"], markersize=4)
        if found["low"] is not None:
            axis.plot([point[x]] * 2, [found["low"], found["high"]], color=style["color"], linewidth=1.4, alpha=0.6)
        if found["bound"]:
            axis.plot(point[x], found["factor"], **style, markerfacecolor="white", label="_")
            end = (0, -16 if found["bound"] == AT_MOST else 16)
            axis.annotate("", (point[x], found["factor"]), end, textcoords="offset points",
                          arrowprops={"arrowstyle": "<-", "color": style["color"]})  # fmt: skip
