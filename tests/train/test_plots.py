"""The pictures show what the logs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.train.toy import ToyData, toy_recipe, toy_task
from vlmoe.train import plots
from vlmoe.train.loop import train
from vlmoe.train.runlog import METRICS, ROUTING

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures instead of files."""
    drawn: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        drawn.append(figure)
        return path

    monkeypatch.setattr(plots, "_save", keep)
    return drawn


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_finished_run_has_both_and_they_come_back_when_lost(tmp_path: Path) -> None:
    train(toy_recipe(tmp_path, steps=2), toy_task(), ToyData(), tmp_path)
    for name in (plots.CURVES, plots.ROUTING_PNG):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    (tmp_path / plots.CURVES).unlink()
    train(toy_recipe(tmp_path, steps=2), toy_task(), ToyData(), tmp_path)
    assert (tmp_path / plots.CURVES).read_bytes().startswith(PNG)


def test_one_panel_for_each_measure_and_gaps_for_nulls(tmp_path: Path, figures: list[Figure]) -> None:
    write(
        tmp_path / METRICS,
        [
            {"step": s, "loss": 4.0 / s, "lr": 0.1, "pair/mlm": None if s == 2 else s, "text/mlm": -s, "seconds": s}
            for s in (1, 2, 3)
        ],
    )
    plots.plot_curves(tmp_path)
    axes = {axis.get_title(): axis for axis in figures[0].axes if axis.get_visible()}
    assert list(axes) == ["loss, all parts", "learning rate", "mlm"]
    lines = {str(line.get_label()): line for line in axes["mlm"].lines}
    assert np.asarray(lines["pair"].get_xydata()).tolist() == [[1, 1], [3, 3]]
    assert np.asarray(lines["text"].get_xydata()).tolist() == [[1, -1], [2, -2], [3, -3]]
    assert lines["pair"].get_color() != lines["text"].get_color()
    assert lines["pair"].get_linestyle() != lines["text"].get_linestyle()


def test_loads_are_multiples_of_the_even_share_over_the_last_quarter(tmp_path: Path, figures: list[Figure]) -> None:
    early = {"1/text": [9, 1], "10/text": [5, 5], "3/vision": [0, 0, 0]}
    late = {"1/text": [3, 1], "10/text": [0, 8], "3/vision": [1, 1, 1]}
    write(tmp_path / ROUTING, [{"step": s, "load": late if s > 6 else early} for s in range(1, 9)])
    plots.plot_routing(tmp_path)
    images = {axis.get_title(): axis.images[0].get_array() for axis in figures[0].axes if axis.images}
    text = next(image for title, image in images.items() if title.startswith("text: load"))
    assert np.asarray(text).tolist() == [[1.5, 0.5], [0.0, 2.0]]  # block 1 before block 10
    over_time = np.asarray(images["block 3, over time"])
    assert over_time.shape == (3, 8)
    assert (over_time == 1).all()  # a step in which a layer had no tokens counts as even


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert plots.plot_curves(tmp_path) is None
    assert plots.plot_routing(tmp_path) is None
