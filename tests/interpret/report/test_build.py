"""The file that is written: whole, escaped, small enough, and what is said of findings that cannot be shown."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.interpret.report.synthetic import findings
from vlmoe.interpret.report import ReportError, build
from vlmoe.interpret.report.build import SCRIPTS
from vlmoe.interpret.report.words import compared, overview

DATA = re.compile(r'<script type="application/json" id="data" data-encoding="(\w+)">(.*?)</script>', re.DOTALL)


def data_of(page: Path) -> dict[str, Any]:
    found = DATA.search(page.read_text(encoding="utf-8"))
    assert found is not None
    text = found[2] if found[1] == "plain" else gzip.decompress(base64.b64decode(found[2])).decode()
    return dict(json.loads(text))


def said(points: list[Any]) -> str:
    return "\n".join("".join(x if isinstance(x, str) else x["text"] for x in point) for point in points)


def told(run: dict[str, Any]) -> dict[str, str]:
    full = {"notes": [], "information": {}, "agreement": {}, "sharing": {}, "history": None} | run
    return {part["title"]: said(part["points"]) for part in overview(full)}


# ----------------------------------------------------------------------------------------------------------------- file
def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    page = build(findings(), tmp_path / "new" / "report.html")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\{\{\w+\}\}", text)
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\((?!data:)""", text)
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]
    run = data_of(page)["runs"][0]
    assert run["sites"] == findings()["sites"]


def test_every_script_of_the_folder_is_in_the_page() -> None:
    folder = resources.files("vlmoe.interpret.report") / "page"
    assert {p.name for p in folder.iterdir() if p.name.endswith(".js")} == set(SCRIPTS)


def test_text_of_the_data_cannot_leave_its_place(tmp_path: Path) -> None:
    run = findings(title="</title><script>alert(1)</script>")
    run["notes"] = ["</script><script>alert(2)</script><!--", "{{data}}"]
    page = build(run, tmp_path / "report.html")
    assert "<script>alert" not in page.read_text()
    assert data_of(page)["runs"][0]["notes"] == run["notes"]


def test_numbers_are_rounded_and_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    run = findings()
    run["use"]["1/vision"]["entropy"] = math.nan
    run["use"]["1/vision"]["dropped"] = np.float32(0.123456789)
    run["use"]["1/vision"]["tokens"] = np.int64(5_000_000)
    use = data_of(build(run, tmp_path / "report.html"))["runs"][0]["use"]["1/vision"]
    assert (use["entropy"], use["dropped"], use["tokens"]) == (None, 0.12346, 5_000_000)


def test_large_findings_are_compressed_and_unpack_to_the_same(tmp_path: Path) -> None:
    run = findings(12, 32, 4, modalities=("",))
    page = build(run, tmp_path / "report.html")
    assert 'data-encoding="gzip"' in page.read_text()
    assert page.stat().st_size < 0.3 * len(json.dumps(run))
    shown = data_of(page)["runs"][0]["samples"][3]
    assert shown["routes"] == run["samples"][3]["routes"]


def test_a_page_over_the_limit_shows_fewer_samples_and_says_so(tmp_path: Path) -> None:
    run = findings(shown=40)
    whole = build(run, tmp_path / "whole.html").stat().st_size
    small = build(run, tmp_path / "small.html", limit=int(0.8 * whole))
    assert small.stat().st_size <= 0.8 * whole
    kept = data_of(small)["runs"][0]
    assert 0 < len(kept["samples"]) < 40
    assert any("of 40 samples" in note for note in kept["notes"])
    patches = [p["sample"] for site in kept["experts"].values() for e in site for p in e["top_patches"]]
    assert max(patches) < len(kept["samples"])
    assert len(run["samples"]) == 40  # what was given stays as it was


# --------------------------------------------------------------------------------------------------------------- errors
def without(key: str) -> dict[str, Any]:
    run = findings()
    del run[key]
    return run


def changed(*path: Any, to: Any) -> dict[str, Any]:
    run = findings()
    place = run
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return run


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ([], "got list, wanted a dict"),
        (without("samples"), "key 'samples' is missing"),
        (changed("sites", to={}), "key 'sites' got dict, wanted list"),
        (changed("sites", to=[]), "no routing to show"),
        (changed("sites", 0, to={"name": "1/vision"}), r"sites\[0\]: key 'layer' is missing"),
        (changed("use", to={}), "key 'use' lacks the site '1/vision'"),
        (changed("use", "1/vision", "share", to=[1.0]), "got 1 experts, wanted 8"),
        (changed("experts", "3/text", to=[]), "got 0 experts, wanted 8"),
        (changed("samples", 1, to={}), r"samples\[1\]: key 'key' is missing"),
        (changed("experts", "1/text", 2, "top_patches", to=[{"sample": 9, "position": 0}]), "sample 9, wanted 0 to 8"),
    ],
)
def test_findings_that_cannot_be_shown_are_named(run: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=words):
        build(run, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_the_second_findings_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="findings to compare with: key 'title' is missing"):
        build(findings(), tmp_path / "report.html", without("title"))


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "report.html", tmp_path):
        with pytest.raises(ReportError, match="cannot be written"):
            build(findings(), out)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------------------------- words
def test_the_overview_tells_balance_by_the_busiest_expert() -> None:
    run = findings(1, 4, 1, modalities=("text",))
    run["use"]["1/text"] |= {"share": [0.25, 0.25, 0.26, 0.24], "max_over_mean": 1.04}
    assert (
        "The 1 text router is balanced: the busiest expert, layer 1 · text, expert 2, takes 1.0" in told(run)["Balance"]
    )
    run["use"]["1/text"] |= {"share": [0.7, 0.3, 0.0, 0.0], "max_over_mean": 2.8}
    text = told(run)["Balance"]
    assert "is uneven" in text and "expert 0, takes 2.8 times" in text
    assert "2 experts of 4 took no token at all: layer 1 · text, expert 2, then layer 1 · text, expert 3." in text


def test_the_overview_names_only_factors_above_chance() -> None:
    run = findings(1, 4, 1, modalities=("text",))
    row = {"bits": 0.5, "chance": 0.1, "chance_high": 0.2, "factor_bits": 2.0, "share": 0.2, "tokens": 100}
    run["information"]["1/text"] = {"word_class": row}
    assert "word class: 20% of what there is to know (0.40 of 2.00 bits" in told(run)["Who takes what"]
    by_sample = {"sample_chance": 0.3, "sample_chance_high": 0.4, "share": 0.1}
    run["information"]["1/text"] = {"word_class": row | by_sample}
    assert "word class: 10% of what there is to know (0.20 of 2.00 bits" in told(run)["Who takes what"]
    run["information"]["1/text"] = {"word_class": row | by_sample | {"sample_chance_high": 0.6}}
    assert "tells nothing above chance" in told(run)["Who takes what"]
    run["information"]["1/text"] = {"word_class": row | {"chance_high": 0.6}}
    assert "tells nothing above chance" in told(run)["Who takes what"]


def test_the_overview_claims_only_causes_that_the_findings_confirm() -> None:
    run = findings(1, 2, 1, modalities=("text",))
    effect = {"factor": "colour", "value": "red", "modality": "text", "delta": 0.5, "low": 0.4, "high": 0.6}
    loss = {"delta": 0.1, "low": 0.05, "high": 0.15}
    for expert, cause in zip(run["experts"]["1/text"], (True, False), strict=True):
        expert["ablation"] = {"mode": "silence", "loss": loss, "by_factor": [effect | {"cause": cause}]}
    text = told(run)["What breaks without an expert"]
    assert "2 experts were taken away" in text and "its part of the output is taken away" in text
    assert "1 cause of 1 expert confirmed" in text
    assert "Without layer 1 · text, expert 0 the loss of text tokens with colour “red” changes by +0.500 nats" in text
    assert "Without layer 1 · text, expert 1 the loss of" not in text
    run["experts"]["1/text"][0]["ablation"]["by_factor"][0]["cause"] = False
    assert "No expert was shown to be needed" in told(run)["What breaks without an expert"]


def test_the_overview_says_when_nothing_was_taken_away() -> None:
    assert "No expert was taken away" in told(findings(ablation=False))["What breaks without an expert"]


def test_two_runs_are_compared_in_words() -> None:
    a, b = findings(), findings(seed=1)
    drift = {"3/text": {"changed": 0.9, "matched": 0.25, "tokens": 100}}
    text = said(compared(a, b, drift))
    assert "mean over 4 routers" in text and "up to 25% of cases (layer 3 · text)" in text
    b["sites"], b["use"] = [], {}
    assert "no router of the same name" in said(compared(a, b, None))
