"""`vlmoe report` as a user types it: on a run, on two, on a model of transformers, and mistyped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.golden.record import OVERRIDES
from tests.interpret.report.test_build import data_of
from vlmoe.cli import app
from vlmoe.config import UserError, load_recipe
from vlmoe.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("no_plots")
TEXTS = ["the red dog sees 42 birds, near 17 trees.", "a cat sleeps", "two trees and two dogs run near the cat"]


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, ["report", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    short = ["data.visual_tokenizer.steps=2", "train.steps=4", f"run.dir={folder}"]
    pretrain(load_recipe("demo", [*OVERRIDES, *short]))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tests.interpret.hf_tiny import build, tokenizer

    folder, made = tmp_path_factory.mktemp("hf") / "mixtral", build("mixtral")
    saved: Any = made
    saved.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    return folder


def test_a_run_gets_a_page_in_its_folder(run: Path) -> None:
    assert invoke(str(run), "--samples", "12", "--device", "cpu").split() == [str(run / "report.html")]
    found = data_of(run / "report.html")["runs"][0]
    assert {site["name"] for site in found["sites"]} == {"1/vision", "1/text", "3/vision", "3/text"}
    assert found["title"] == "tiny" and found["about"]["steps"] == 4
    assert len(found["samples"]) == 12 and found["history"]["steps"][-1] == 4
    assert all(e["ablation"] for experts in found["experts"].values() for e in experts)


def test_findings_as_json_are_those_of_the_page(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.html"
    said = json.loads(invoke(str(run), "--compare", str(run), "--samples", "4", "--out", str(out), "--json"))
    shown = data_of(out)
    assert list(said) == ["a", "b"]
    assert [r["samples"] for r in shown["runs"]] == [said["a"]["samples"], said["b"]["samples"]]
    assert shown["drift"]["1/vision"]["changed"] == 0  # the run with itself


def test_a_model_of_transformers_gets_a_page(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixtral.html"
    assert invoke("--hf", str(model), "--texts", str(model / "texts.txt"), "--out", str(out)).split() == [str(out)]
    found = data_of(out)["runs"][0]
    assert found["about"]["kind of model"] == "mixtral" and found["about"]["samples"] == 3
    assert [len(s["routes"]["0"]["text"]) == len(s["tokens"]) for s in found["samples"]] == [True] * 3
    invoke("--hf", str(model), "--texts", str(model / "texts.txt"), "--out", str(out), "--samples", "2")
    assert data_of(out)["runs"][0]["about"]["samples"] == 2


def test_mistakes_are_errors_of_one_line(run: Path, model: Path, tmp_path: Path) -> None:
    texts, pictures = model / "texts.txt", tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(pictures / "one.png")
    (tmp_path / "unfinished").mkdir()
    hf = ("--hf", str(model), "--out", str(tmp_path / "out.html"))
    for words, message in [
        ((), "got neither"),
        ((str(run), *hf, "--texts", str(texts)), "got both"),
        (("runs/none",), "runs/none: no such folder"),
        ((str(run), "--compare", "runs/none"), "runs/none: no such folder"),
        ((str(tmp_path / "unfinished"),), "is the run finished"),
        ((str(run), "--texts", str(texts)), "--texts: goes with --hf"),
        ((str(run), "--samples", "0"), "--samples: expected at least 1"),
        (hf, "expected the texts to look at as --texts FILE"),
        (("--hf", str(model), "--texts", str(texts)), "expected the page to write as --out"),
        ((*hf, "--texts", "none.txt"), "none.txt"),
        ((*hf, "--texts", str(texts), "--compare", str(run)), "--compare: goes with a run"),
        ((*hf, "--texts", str(texts), "--images", str(pictures)), "an image for each of the 3 texts"),
        (("--hf", str(tmp_path), "--texts", str(texts), "--out", str(tmp_path / "o.html")), "no config.json"),
    ]:
        with pytest.raises(UserError) as error:
            invoke(*words)
        assert message in str(error.value) and "\n" not in str(error.value), (words, error.value)
    assert not list(tmp_path.glob("*.html"))
