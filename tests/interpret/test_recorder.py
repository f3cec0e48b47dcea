"""Recordings: what is written is what happened, chosen samples and sites, nothing half done; and their comparison."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.interpret.world import Toy, batch_of, tiny
from vlmoe.interpret import writing
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.recorder import Recorder, RecordingError, record
from vlmoe.interpret.recording import NoRecording, Recording, Routed, diff
from vlmoe.interpret.sites import Choice
from vlmoe.tasks.export import Pretrained


@pytest.fixture(scope="module")
def trained() -> Pretrained:
    return tiny()


@pytest.fixture(scope="module")
def subject(trained: Pretrained) -> OwnSubject:
    return OwnSubject(trained)


def batches(trained: Pretrained) -> Iterator[Any]:
    for kind in ("image", "pair", "text"):  # each kind has factors that those before it lack
        for start in (0, 8):
            yield batch_of(trained, kind, start)


def watched(subject: OwnSubject, batch: Any) -> dict[str, Choice]:
    seen: dict[str, Choice] = {}
    handles = [s.watch(lambda c, name=s.name: seen.__setitem__(name, c)) for s in subject.sites]  # type: ignore[misc]
    subject.run(batch)
    for handle in handles:
        handle.remove()
    return seen


def assert_faithful(subject: OwnSubject, recording: Recording, given: list[Any], keep: set[str] | None = None) -> None:
    """Every valid row of the samples of `keep` (None: all) stands in the recording, in order, with what was seen."""
    at = 0
    decided: dict[str, list[int]] = {name: [] for name in recording.sites}
    routed = {name: recording.at(name) for name in recording.sites}
    columns = {name: recording.column(name) for name in ("sample", "kind", "modality", "text")}
    factors = {name: recording.factor(name) for name in recording.factors}
    for batch in given:
        table, seen = subject.tokens(batch), watched(subject, batch)
        chosen = np.array([keep is None or key in keep for key in table.samples])
        rows = np.flatnonzero(table.valid_R & chosen[table.sample_R])
        number = {int(row): at + i for i, row in enumerate(rows)}
        for row, t in number.items():
            said = {name: c.values[c.code_T[t]] for name, c in columns.items()}
            assert said == {
                "sample": table.samples[table.sample_R[row]],
                "kind": table.kind,
                "modality": table.modality_R[row],
                "text": table.text_R[row],
            }
            assert recording.position_T[t] == table.position_R[row]
            for name, column in factors.items():
                wanted = table.factors[name][row] if name in table.factors else ""
                assert column.values[column.code_T[t]] == wanted
        for name, choice in seen.items():
            if name not in recording.sites:
                continue
            site = next(s for s in subject.sites if s.name == name)
            place = {int(t): n for n, t in enumerate(routed[name].token_N)}
            entropy_N = torch.distributions.Categorical(probs=choice.probs_NE).entropy()
            for n, row in enumerate(table.rows_of(site).tolist()):
                if row not in number:
                    continue
                m = place[number[row]]
                decided[name].append(number[row])
                assert_row(routed[name], m, choice, n)
                assert routed[name].entropy_N[m] == pytest.approx(float(entropy_N[n]), abs=1e-5)
        at += len(rows)
    assert recording.tokens == at
    for name, tokens in decided.items():
        assert sorted(tokens) == sorted(routed[name].token_N.tolist())


def assert_row(routed: Routed, m: int, choice: Choice, n: int) -> None:
    real = [(int(e), float(g), bool(k)) for e, g, k in zip(*(x[n] for x in parts(choice)), strict=True) if g or k]
    found = zip(routed.expert_NK[m].tolist(), routed.gate_NK[m].tolist(), routed.kept_NK[m].tolist(), strict=True)
    assert [row for row in found if row[0] >= 0] == real


def parts(choice: Choice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return choice.expert_NK, choice.gate_NK, choice.kept_NK


def test_a_recording_holds_what_happened(subject: OwnSubject, trained: Pretrained, tmp_path: Path) -> None:
    given = list(batches(trained))
    recording = record(subject, given, tmp_path / "r", about={"split": "val"})
    assert_faithful(subject, recording, given)
    assert recording.about == {"split": "val"}
    assert recording.samples == 48
    assert list(recording.sites) == ["1/vision", "1/text", "3/vision", "3/text"]
    assert {"colour", "word_class", "hidden"} <= set(recording.factors)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "recording.json", "routing.parquet", "tokens.parquet",
    ]  # fmt: skip


def test_small_row_groups_hold_the_same(
    subject: OwnSubject, trained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list(batches(trained))
    monkeypatch.setattr(writing, "ROWS", 100)
    recording = record(subject, given, tmp_path / "r")
    assert_faithful(subject, recording, given)
    tokens, routing = (pq.ParquetFile(tmp_path / "r" / f"{n}.parquet").metadata for n in ("tokens", "routing"))
    assert tokens.num_row_groups == len(given)
    for group in range(routing.num_row_groups):  # one site each, told by the statistics
        site = routing.row_group(group).column(1)
        assert site.path_in_schema == "site"
        assert site.statistics.min == site.statistics.max


@pytest.mark.parametrize(
    "changes",
    [
        ("router.capacity_factor_eval=0.5",),
        ("router.type=expert_choice",),
        ("router.k=1", "router.renormalize=false"),
    ],
)
def test_dropped_choices_and_tokens_without_an_expert(changes: tuple[str, ...], tmp_path: Path) -> None:
    trained = tiny(*(f"model.{side}.{c}" for side in ("vision", "text") for c in changes))
    subject, given = OwnSubject(trained), [batch_of(trained), batch_of(trained, "text")]
    recording = record(subject, given, tmp_path / "r")
    assert_faithful(subject, recording, given)
    routed = recording.at("1/text")
    if "capacity" in changes[0]:
        assert (~routed.kept_NK & (routed.expert_NK >= 0)).any()
    if "choice" in changes[0]:
        assert ((routed.expert_NK >= 0).sum(axis=1) != 2).any()


def test_the_same_samples_are_chosen_in_any_batches(subject: OwnSubject, trained: Pretrained, tmp_path: Path) -> None:
    given = [batch_of(trained, start=s) for s in (0, 8, 16, 24)]
    half = record(subject, given, tmp_path / "half", rate=0.5)
    whole = batch_of(trained, n=32)
    again = record(subject, [whole], tmp_path / "again", rate=0.5)
    keys = set(half.column("sample").values)
    assert keys == set(again.column("sample").values)
    assert 8 < len(keys) < 24 and half.samples == len(keys)
    assert_faithful(subject, half, given, keys)
    fewer = record(subject, given, tmp_path / "fewer", rate=0.2)
    assert set(fewer.column("sample").values) < keys


def test_sites_and_layers_are_chosen(subject: OwnSubject, trained: Pretrained, tmp_path: Path) -> None:
    given = [batch_of(trained, "text", n=2)]
    assert list(record(subject, given, tmp_path / "a", sites=["3/text"]).sites) == ["3/text"]
    assert list(record(subject, given, tmp_path / "b", layers=[1]).sites) == ["1/vision", "1/text"]
    with pytest.raises(RecordingError, match="no site '2/text' in this model; there are 1/vision, 1/text"):
        record(subject, given, tmp_path / "c", sites=["2/text"])
    with pytest.raises(RecordingError, match=r"no router in layer 2 .* \[1, 3\]"):
        record(subject, given, tmp_path / "c", layers=[2])
    with pytest.raises(RecordingError, match="rate: expected a share of the samples above 0 and up to 1, got 0"):
        record(subject, given, tmp_path / "c", rate=0)


def test_the_model_is_left_as_it_was(subject: OwnSubject, trained: Pretrained, tmp_path: Path) -> None:
    batch = batch_of(trained, n=2)
    before = subject.run(batch)[0].x_BTD
    with Recorder(subject, tmp_path / "r") as recorder:
        assert torch.equal(recorder.run(batch)[0].x_BTD, before)
    assert not any(m._forward_hooks for m in trained.model.modules())


def test_an_interrupted_recording_leaves_nothing(subject: OwnSubject, trained: Pretrained, tmp_path: Path) -> None:
    def stopped() -> Iterator[Any]:
        yield batch_of(trained, n=2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(subject, stopped(), tmp_path / "r")
    assert not list(tmp_path.iterdir())
    assert not any(m._forward_hooks for m in trained.model.modules())


def test_what_a_killed_recorder_leaves_is_no_recording(
    subject: OwnSubject, trained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROWS", 10)
    recorder = Recorder(subject, tmp_path / "r").__enter__()  # and never closed
    recorder.run(batch_of(trained, n=2))
    with pytest.raises(NoRecording, match=r"no recording\.json: not a recording, or an interrupted one"):
        Recording.load(tmp_path / "r")
    for folder in tmp_path.iterdir():
        with pytest.raises(NoRecording):
            Recording.load(folder)
    for handle in recorder._handles:
        handle.remove()
    assert record(subject, [batch_of(trained, n=2)], tmp_path / "r").samples == 2


def test_a_taken_folder_is_refused_and_a_recording_replaced_on_demand(
    subject: OwnSubject, trained: Pretrained, tmp_path: Path
) -> None:
    record(subject, [batch_of(trained, n=2)], tmp_path / "r")
    with pytest.raises(RecordingError, match="is already there; record into a new folder"):
        record(subject, [batch_of(trained, n=3)], tmp_path / "r")
    assert record(subject, [batch_of(trained, n=3)], tmp_path / "r", replace=True).samples == 3
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecordingError, match="is already there"):
        record(subject, [], tmp_path / "mine", replace=True)


@pytest.mark.parametrize("rows", [1, 1 << 20])
def test_a_full_disk_is_said_and_leaves_nothing(
    rows: int, subject: OwnSubject, trained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Met while recording, or at the end."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "ROWS", rows)
    monkeypatch.setattr(writing.Writer, "_write", full)
    with pytest.raises(RecordingError, match="r: cannot be written: No space left on device"):
        record(subject, [batch_of(trained, n=2)] * 3, tmp_path / "r")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="cannot be written"):
        record(subject, [], tmp_path / "file" / "r")


def test_nothing_recorded_is_a_recording_of_nothing(subject: OwnSubject, tmp_path: Path) -> None:
    recording = record(subject, [], tmp_path / "r")
    assert (recording.tokens, recording.factors) == (0, [])
    assert recording.at("1/text").expert_NK.shape == (0, 1)


def test_a_batch_is_run_once(subject: OwnSubject, trained: Pretrained, tmp_path: Path) -> None:
    batch = batch_of(trained, n=2)

    def twice() -> None:
        with Recorder(subject, tmp_path / "r") as recorder, recorder.batch(batch):
            subject.run(batch)
            subject.run(batch)

    with pytest.raises(RecordingError, match="site 1/vision decided for 68 tokens, but the batch has 34 rows"):
        twice()


def test_broken_recordings_are_told_apart(subject: OwnSubject, trained: Pretrained, tmp_path: Path) -> None:
    recording = record(subject, [batch_of(trained, n=2)], tmp_path / "r")
    with pytest.raises(NoRecording, match="no site '9/text'; there are 1/vision"):
        recording.at("9/text")
    with pytest.raises(NoRecording, match="no factor 'taste'; there are"):
        recording.factor("taste")
    path = tmp_path / "r" / "recording.json"
    said = json.loads(path.read_text())
    for change, message in (
        ({"format": 9}, "format 9, expected 1"),
        ({"tokens": 7}, r"tokens\.parquet: holds \d+ tokens, recording\.json says 7"),
        ({"sites": 1}, "not a recording's description"),
    ):
        path.write_text(json.dumps(said | change))
        with pytest.raises(NoRecording, match=message):
            Recording.load(tmp_path / "r")
    path.write_text(json.dumps(said))
    (tmp_path / "r" / "routing.parquet").write_bytes(b"no")
    with pytest.raises(NoRecording, match=r"routing\.parquet: cannot be read as Parquet"):
        Recording.load(tmp_path / "r")


def test_a_subject_that_knows_only_words(tmp_path: Path) -> None:
    toy = Toy()
    first = {"samples": ["a", "b"], "expert": [[0, 1], [2, 2]], "right": [[0, 0], [0, 0]]}
    first["factors"] = {"shape": [["round", ""], ["square", "round"]]}
    second = first | {"samples": ["c", "d"], "factors": {"size": [["big", "big"], ["small", ""]]}}
    recording = record(toy, [first, second], tmp_path / "r")
    words = {n: [c.values[i] for i in c.code_T] for n in ("shape", "size") for c in [recording.factor(n)]}
    assert words["shape"] == ["round", "", "square", "round", "", "", "", ""]
    assert words["size"] == ["", "", "", "", "big", "big", "small", ""]
    assert recording.at("0").first_N.tolist() == [0, 1, 2, 2] * 2
    assert recording.factor("shape").where("round").tolist() == [True, False, False, True] + [False] * 4
    assert not recording.factor("shape").where("oval").any()


# ----------------------------------------------------------------------------------------------------------------- diff
def test_drift_by_hand(tmp_path: Path) -> None:
    toy = Toy()
    one = {"samples": ["a", "b"], "expert": [[0, 0, 1], [1, 2, 2]], "right": [[0] * 3] * 2}
    # 0 became 2, 2 became 0, and one token of 1 went elsewhere; and a sample that the first has not
    two = {"samples": ["b", "a", "c"], "expert": [[1, 0, 0], [2, 2, 0], [1, 1, 1]], "right": [[0] * 3] * 3}
    a, b = record(toy, [one], tmp_path / "a"), record(toy, [two], tmp_path / "b")
    found = diff(a, b)["0"]
    assert found.tokens == 6
    assert found.first == pytest.approx(5 / 6)
    assert found.first_matched == pytest.approx(1 / 6)
    assert found.any == pytest.approx(5 / 6) and found.any_matched == pytest.approx(1 / 6)
    assert found.matching == [2, 1, 0]
    same = diff(a, a)["0"]
    assert (same.first, same.any, same.first_matched, same.any_matched) == (0, 0, 0, 0)


def test_order_of_the_chosen_counts_for_the_first_but_not_for_the_set(
    subject: OwnSubject, trained: Pretrained, tmp_path: Path
) -> None:
    given = [batch_of(trained)]
    a = record(subject, given, tmp_path / "a", sites=["1/text"])

    def turned(c: Choice) -> Choice:
        return replace(c, expert_NK=c.expert_NK.flip(1), gate_NK=c.gate_NK.flip(1))

    site = next(s for s in subject.sites if s.name == "1/text")
    with site.change(turned):
        b = record(subject, given, tmp_path / "b", sites=["1/text"])
    found = diff(a, b)["1/text"]
    assert (found.first, found.any) == (1, 0)


def test_recordings_with_nothing_in_common(tmp_path: Path) -> None:
    toy = Toy()
    batch = {"samples": ["a"], "expert": [[0]], "right": [[0]]}
    a, b = (record(toy, [batch | {"samples": [key]}], tmp_path / key) for key in ("a", "b"))
    with pytest.raises(NoRecording, match="share no token"):
        diff(a, b)
