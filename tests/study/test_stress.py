"""Faults in short runs: what the report says of them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmoe.cli import app
from vlmoe.study.stress import faults, recovery

pytestmark = pytest.mark.usefixtures("no_plots")
SMALL = [
    "characters", "model.width=32", "model.heads=2", "model.depth=2", "data.visual_tokenizer.steps=5",
    "data.text_tokenizer.samples=300", "data.workers=0", "data.batch={pair: 4, image: 1, text: 1}", "train.steps=40",
    "train.warmup=5", "eval={samples: 16, batch: 16}", "train.guard.every=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stress")
    chosen = [
        word
        for name in ("NaN in one batch", "one expert infinite", "half of the batch padding", "all tokens to one expert")
        for word in ("--fault", name)
    ]
    result = CliRunner().invoke(app, ["stress", *SMALL, "--out", str(folder), *chosen], catch_exceptions=False)
    assert result.exit_code == 0
    return folder


def test_the_report_tells_who_survived(out: Path) -> None:
    rows = json.loads((out / "stress.json").read_text())["faults"]
    by = {(row["fault"], row["autopilot"]): row for row in rows}
    for name in ("NaN in one batch", "one expert infinite"):
        assert by[name, True]["survived"]
        assert not by[name, False]["survived"]
        assert "not finite" in by[name, False]["error"]
        assert by[name, True]["actions"]["update held back"] >= 1
    assert by["one expert infinite", True]["actions"]["expert revived"] >= 1
    assert by["all tokens to one expert", True]["actions"].get("pressure raised", 0) >= 1
    table = (out / "stress.md").read_text()
    assert "| NaN in one batch | off | no | - | - |" in table
    assert (out / "stress.png").stat().st_size > 5000


def test_padding_changes_no_number(out: Path) -> None:
    report = json.loads((out / "stress.json").read_text())
    (on,) = (r for r in report["faults"] if r["fault"] == "half of the batch padding" and r["autopilot"])
    assert on["excess"] == pytest.approx(0, abs=1e-3)
    assert on["recovery"] == 0


def test_recovery_by_hand() -> None:
    plain = {step: 1.0 for step in range(1, 101)}
    bump = {step: 2.0 if 50 < step <= 70 else 1.0 for step in plain}
    # the running median, over the 48 steps since the fault, is normal again when more than half of them are: after 90
    assert recovery(bump, plain, 50) == 40
    assert recovery(plain, plain, 50) == 0
    assert recovery({step: 2.0 for step in plain}, plain, 50) is None


def test_an_unknown_fault_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["stress", *SMALL, "--out", str(tmp_path), "--fault", "fire"])
    assert result.exit_code != 0
    assert "no fault 'fire'; there are: learning rate x4" in str(result.exception)
    assert len(faults(100)) == 9
