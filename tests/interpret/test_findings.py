"""Findings of a run: every part is there, in plain JSON, and says what recording, statistics and tests say."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.interpret.test_own import finetuned
from tests.interpret.world import Toy, batch_of, tiny
from vlmoe.config import UserError
from vlmoe.data.batch import IGNORE
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.interpret.causal import ablate
from vlmoe.interpret.effects import Ground
from vlmoe.interpret.findings import batches_of, find, find_run, find_two, history, write
from vlmoe.interpret.own import OwnSubject
from vlmoe.tasks.export import Finetuned, Pretrained, export, load

KEYS = {
    "title", "about", "sites", "use", "information", "experts", "agreement", "paths", "sharing", "samples", "history",
    "drift", "notes",
}  # fmt: skip


def saved(trained: Pretrained, run: Path) -> Path:
    """A run's folder as training leaves it, as far as findings read it."""
    trained.text_tokenizer.save(run / "tokenizers")
    assert isinstance(trained.visual_tokenizer, VQTokenizer)
    trained.visual_tokenizer.save(run / "tokenizers")
    export(trained.model, trained.recipe, run / "tokenizers", run / "model")
    lines = []
    for step in range(1, 31):
        line: dict[str, Any] = {"step": step, "load": {"1/text": [step, 30, 30, 30], "1/vision": [8, 8, 0, 0]}}
        if step % 3 == 0:
            line["layers"] = {"1/text": {"entropy": 1.0 / step, "churn": 0.5, "dropped": 0.0, "max_load": 9.0}}
        lines.append(json.dumps(line))
    (run / "routing.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny(), tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    return find_run(run, samples=16, shown=6)


def test_everything_is_there_and_plain(found: dict[str, Any]) -> None:
    assert set(found) == KEYS
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["title"] == "tiny"
    assert found["about"]["samples"] == 48
    assert [s["name"] for s in found["sites"]] == ["1/text", "1/vision", "3/text", "3/vision"]
    for site in found["sites"]:
        name, E = site["name"], site["experts"]
        use = found["use"][name]
        assert len(use["share"]) == len(found["experts"][name]) == E
        assert sum(use["share"]) == pytest.approx(1)
        kinds = {"1/text": {"pair", "text"}, "1/vision": {"pair", "image"}, "3/text": {"text"}, "3/vision": {"image"}}
        assert set(use["by_kind"]) == kinds[name]
        assert all(sum(share) == pytest.approx(1) for share in use["by_kind"].values())
    assert any("pass a dense layer" in note for note in found["notes"])


def test_information_covers_factors_words_and_places(found: dict[str, Any]) -> None:
    text, vision = found["information"]["1/text"], found["information"]["1/vision"]
    assert {"word_class", "word", "hidden"} <= set(text) and "position" not in text
    assert {"colour", "position"} <= set(vision) and "word" not in vision
    for row in [*text.values(), *vision.values()]:
        assert row["bits"] >= 0 and row["chance_high"] >= row["chance"] and row["factor_bits"] > 0


def test_samples_are_shown_as_they_were_routed(found: dict[str, Any]) -> None:
    trained, samples = tiny(), found["samples"]
    subject = OwnSubject(trained)
    assert [s["kind"] for s in samples] == ["pair"] * 2 + ["image"] * 2 + ["text"] * 2
    batch = batch_of(trained, "pair", n=16)
    stats = subject.run(batch)[0].stats
    assert batch.target_BT is not None and batch.valid_BT is not None and batch.patch_mask_BP is not None
    for b, sample in enumerate(samples[:2]):
        assert sample["key"] == batch.keys[b]
        assert set(sample["routes"]) == {"1/text", "1/vision"}
        length = int(batch.valid_BT[b].sum())
        assert len(sample["tokens"]) == length
        assert sample["tokens"][0] == "<start>"
        assert sample["hidden"] == torch.nonzero(batch.target_BT[b] != IGNORE)[:, 0].tolist()
        assert sample["hidden_patches"] == torch.nonzero(batch.patch_mask_BP[b])[:, 0].tolist()
        s = stats["1/vision"]
        wanted = s.expert_index_NK.view(16, 17, 2)[b, 1:].tolist()  # without the class token
        assert sample["routes"]["1/vision"]["vision"] == wanted
        gates = s.gate_NK.view(16, 17, 2)[b, 1:, 0].tolist()
        assert sample["gates"]["1/vision"]["vision"] == pytest.approx(gates, abs=1e-4)
        T = batch.valid_BT.shape[1]
        words = stats["1/text"].expert_index_NK.view(16, T, 2)[b, :length].tolist()
        assert sample["routes"]["1/text"]["text"] == words
        assert sample["grid"] == [4, 4]
        raw = base64.b64decode(sample["image"].removeprefix("data:image/png;base64,"))
        shown = np.array(Image.open(io.BytesIO(raw)))
        assert batch.image_BCHW is not None
        assert (shown == batch.image_BCHW[b].permute(1, 2, 0).numpy()).all()
    assert samples[2]["tokens"] is None and samples[4]["image"] is None and samples[4]["grid"] is None


def test_experts_pages(found: dict[str, Any]) -> None:
    for name, site in found["experts"].items():
        for e, expert in enumerate(site):
            for row in expert["values"]:
                assert row["lift"] > 1 and 0 < row["purity"] <= 1 and 0 < row["coverage"] <= 1
            for patch in expert["top_patches"]:
                sample = found["samples"][patch["sample"]]
                assert sample["routes"][name]["vision"][patch["position"]][0] == e
                assert sample["gates"][name]["vision"][patch["position"]] == pytest.approx(patch["gate"], abs=1e-4)
            assert expert["ablation"]["mode"] == "reroute"
    assert any(expert["top_patches"] for expert in found["experts"]["3/vision"])
    assert any(expert["top_tokens"] for expert in found["experts"]["1/text"])


def test_ablations_are_those_of_the_causal_tests(found: dict[str, Any], run: Path) -> None:
    trained = load(run)
    subject = OwnSubject(trained)
    ground = Ground(subject, batches_of(trained, 16))
    wanted = ablate(subject, ground, {"1/text": [2]})
    shown = found["experts"]["1/text"][2]["ablation"]
    assert shown["loss"]["delta"] == pytest.approx(wanted.loss.delta)
    assert (shown["loss"]["low"], shown["loss"]["high"]) == pytest.approx((wanted.loss.low, wanted.loss.high))
    effects = {(g.modality, g.factor, g.value): g.effect for g in wanted.groups}
    assert shown["by_factor"]
    for row in shown["by_factor"]:
        effect = effects[row["modality"], row["factor"], row["value"]]
        assert row["delta"] == pytest.approx(effect.delta) and row["samples"] >= 10
        assert row["low_all"] <= row["delta"] <= row["high_all"]
    sizes = [abs(row["delta"]) for row in shown["by_factor"]]
    assert sizes == sorted(sizes, reverse=True)


def test_agreement_and_paths(found: dict[str, Any]) -> None:
    for row in found["agreement"].values():
        assert set(row) == {"spearman", "interval", "pairs", "causes", "looks_specialised_but_is_not",
                            "cause_without_lift"}  # fmt: skip
        for pair in row["looks_specialised_but_is_not"]:
            assert pair["lift"] >= 1.5 and pair["low"] <= 0
    assert found["paths"]["text"]["layers"] == ["1/text", "3/text"]
    assert sum(link["count"] for link in found["paths"]["vision"]["links"]) == 16 * 17
    assert found["sharing"] == {}


def test_history_is_the_runs_own(found: dict[str, Any], run: Path, tmp_path: Path) -> None:
    past = found["history"]
    assert past["steps"] == list(range(3, 31, 3))
    text = past["sites"]["1/text"]
    assert text["share"][0] == pytest.approx([3 / 93, 30 / 93, 30 / 93, 30 / 93])
    assert text["max_load"][0] == pytest.approx(4 * 30 / 93)
    assert text["entropy"][1] == pytest.approx(1 / 6)
    assert past["sites"]["1/vision"]["churn"] == [None] * 10
    assert history(tmp_path) is None
    (tmp_path / "routing.jsonl").write_text("".join(f'{{"step": {s}, "load": {{"a": [1, 1]}}}}\n' for s in range(1000)))
    thinned = history(tmp_path)
    assert thinned is not None and 60 <= len(thinned["steps"]) <= 120


def test_two_runs_and_their_drift(run: Path, tmp_path: Path) -> None:
    other = tiny()
    with torch.no_grad():
        for layer in other.model.backbone.routed_layers().values():
            layer.router.weight.copy_(layer.router.weight.flip(0))  # the same routers, experts numbered backwards
    options: dict[str, Any] = {"samples": 8, "shown": 2, "ablate": False}
    a, b = find_two(run, saved(other, tmp_path / "other"), **options)
    assert a["drift"] is None
    assert b["drift"]["1/vision"]["changed"] == 1 and b["drift"]["1/vision"]["matched"] == 0
    assert b["drift"]["1/vision"]["tokens"] == 2 * 8 * 17
    same = find_two(run, run, **options)[1]["drift"]
    assert all(row["changed"] == row["matched"] == 0 for row in same.values())
    assert all(expert["ablation"] is None for expert in a["experts"]["1/text"])
    assert a["agreement"] == {}


def test_a_subject_of_any_kind(tmp_path: Path) -> None:
    batch = {"samples": [f"{i}" for i in range(12)], "expert": [[0, 1, 2]] * 12, "right": [[0, 0, 2]] * 12}
    batch["factors"] = {"shape": [["round", "square", ""]] * 12}
    steps: list[str] = []
    found = find(Toy(), [batch], shown=2, mode="silence", folder=tmp_path / "kept",
                 progress=lambda what, done, total: steps.append(what))  # fmt: skip
    assert set(found) == KEYS and len(found["samples"]) == 2
    assert found["samples"][0]["routes"] == {"0": {"text": [[0], [1], [2]]}}
    assert found["samples"][0]["image"] is None
    assert found["experts"]["0"][0]["ablation"]["by_factor"][0]["value"] == "round"
    assert (tmp_path / "kept" / "recording.json").is_file()
    assert steps[0] == "recording" and "experts taken away" in steps
    few = find(Toy(), [batch], shown=1, most_ablations=2)
    tested = [e for e, expert in enumerate(few["experts"]["0"]) if expert["ablation"]]
    assert len(tested) == 2
    assert any("busiest" in note for note in few["notes"])
    json.dumps(found, allow_nan=False)
    with pytest.raises(UserError, match="no batches were given"):
        find(Toy(), [])


def test_without_a_loss_the_rest_is_shown_and_why_is_said() -> None:
    batch = {"samples": ["a", "b"], "expert": [[0, 1]] * 2, "right": [[-1, -1]] * 2}
    found = find(Toy(), [batch])
    assert found["experts"]["0"][0]["ablation"] is None
    assert any(note.startswith("No expert was taken away: nothing is predicted") for note in found["notes"])


@pytest.mark.parametrize("task", ["classify", "retrieval"])
def test_a_fine_tuned_run(task: str, tmp_path: Path) -> None:
    subject, _ = finetuned(task)
    trained = subject.trained
    assert isinstance(trained, Finetuned)
    trained.text_tokenizer.save(tmp_path / "run" / "tokenizers")
    export(trained.model, trained.recipe, tmp_path / "run" / "tokenizers", tmp_path / "run" / "model", trained.labels)
    found = find_run(tmp_path / "run", samples=12, shown=3)
    assert found["about"]["training"] == f"fine-tuned for {task}"
    tests = [expert["ablation"] for site in found["experts"].values() for expert in site]
    if task == "classify":
        assert all(-1 <= test["score"]["delta"] <= 1 for test in tests if test)
        assert any(tests)
        assert len(found["samples"]) == 3 and found["samples"][0]["image"]
    else:
        assert not any(tests)
        assert any("retrieval has no loss of single examples" in note for note in found["notes"])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: find_run(run / "missing"), "missing: no such folder"),
        (lambda run: find_run(run, split="dreams"), "no split 'dreams' in this run's data: there are val"),
    ],
)
def test_errors(make: Callable[[Path], Any], message: str, run: Path) -> None:
    with pytest.raises(UserError, match=message):
        make(run)


def test_a_model_without_routers(tmp_path: Path) -> None:
    dense = saved(tiny("model.vision.sparse=none", "model.text.sparse=none"), tmp_path / "dense")
    with pytest.raises(UserError, match="a dense model: no layer has a router"):
        find_run(dense)


def test_written_whole(found: dict[str, Any], tmp_path: Path) -> None:
    write(found, tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text()) == found
    with pytest.raises(ValueError, match="Out of range float values"):
        write({"x": float("nan")}, tmp_path / "g.json")
