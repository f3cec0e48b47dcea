"""The recorded run comes out again: a change that alters the numbers cannot pass unseen."""

import json
from pathlib import Path

import pytest

import vlmoe
from tests.golden.record import CURVE, KEYS, run


def test_golden_curve(tmp_path: Path) -> None:
    """Other processors round differently, and a flipped routing choice grows with the steps: early steps are held
    tightly, later ones loosely."""
    recorded = json.loads(CURVE.read_text())
    curve = run(tmp_path / "run")
    assert [line["step"] for line in curve] == [line["step"] for line in recorded] == list(range(1, 31))
    for got, wanted in zip(curve, recorded, strict=True):
        for key in KEYS:
            tolerance = 1e-2 if got["step"] <= 5 else 5e-2
            if key != "grad_norm" or got["step"] <= 5:
                assert got[key] == pytest.approx(wanted[key], rel=tolerance), f"step {got['step']}: {key}"
    assert recorded[-1]["loss"] < 0.9 * recorded[0]["loss"]  # and it is a run that learns
    trained = vlmoe.load(tmp_path / "run")
    assert trained.recipe.train.steps == 30
