"""The loop: what it computes, what it writes and how it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.train.toy import ToyData, ToyTask, toy_recipe, toy_task
from vlmoe.config import UserError, load_recipe, to_mapping
from vlmoe.data.batch import Batch
from vlmoe.data.loader import Step
from vlmoe.model.device import pick_device, pick_precision
from vlmoe.tasks.base import StepOutput, Summed
from vlmoe.train import checkpoint
from vlmoe.train.gradients import seed_of
from vlmoe.train.loop import NonFiniteError, routing_every, train
from vlmoe.train.runlog import EVENTS, METRICS, ROUTING, RunError, cut, lock_run, read_lines

pytestmark = pytest.mark.usefixtures("no_plots")


class Pairs(ToyData):
    """Item n joins items 2n and 2n + 1 of ToyData in one micro-batch."""

    def __getitem__(self, n: int) -> Step:
        parts = [ToyData.__getitem__(self, 2 * n + i).batches["text"] for i in (0, 1)]
        text_BT, target_BT = (torch.cat([getattr(p, f) for p in parts]) for f in ("text_BT", "target_BT"))
        return Step({"text": Batch(parts[0].keys + parts[1].keys, text_BT=text_BT, target_BT=target_BT)}, [], 8)


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_lines(run_dir / METRICS)]


def test_accumulating_equals_a_bigger_batch(tmp_path: Path) -> None:
    small, big = toy_task(dropout=0.0), toy_task(dropout=0.0)
    train(toy_recipe(tmp_path / "small", accumulate=2), small, ToyData(), tmp_path / "small")
    train(toy_recipe(tmp_path / "big", accumulate=1), big, Pairs(), tmp_path / "big")
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "big"), rel=1e-5)
    assert len(set(losses(tmp_path / "big"))) == 6
    for a, b in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    small_load, big_load = (read_lines(tmp_path / name / ROUTING) for name in ("small", "big"))
    assert small_load == big_load  # summed over micro-batches


def test_what_was_drawn_before_does_not_matter_and_the_seed_does(tmp_path: Path) -> None:
    runs = {}
    for name, seed, draws in (("a", 0, 0), ("b", 0, 3), ("c", 1, 0)):
        task = toy_task()
        torch.rand(draws)
        recipe = toy_recipe(tmp_path / name)
        recipe.seed = seed
        train(recipe, task, ToyData(), tmp_path / name)
        runs[name] = losses(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert runs["a"][0] != runs["c"][0]  # the same weights and data, other dropout
    seeds = {seed_of(s, n) for s in range(20) for n in range(50)}
    assert len({s & 0xFFFFFFFF for s in seeds}) == 1000  # torch's CPU generator reads the low 32 bits only


def test_the_folder_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = toy_recipe(tmp_path, accumulate=2)
    result = train(recipe, toy_task(), ToyData(), tmp_path)
    assert (result.steps, result.resumed_from, result.stopped, result.stopped_by) == (6, 0, False, None)
    assert 0 <= result.wait_share <= 1
    assert result.tokens_per_second == pytest.approx(6 * 2 * 8 / result.seconds)

    records = read_lines(tmp_path / METRICS)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    expected = {"step", "loss", "lr", "grad_norm", "text/mlm", "text/mlm_accuracy"}
    expected |= {"tokens_per_second", "seconds", "wait_share"}
    assert all(set(r) == expected for r in records)
    assert records[-1]["loss"] == result.final_loss
    assert [r["seconds"] for r in records] == sorted(r["seconds"] for r in records)
    assert records[0]["lr"] == 0.025  # half of the warm-up
    assert read_lines(tmp_path / ROUTING)[0] == {"step": 1, "load": {"1/text": [2, 10, 2, 2], "3/vision": [2, 10]}}

    events = read_lines(tmp_path / EVENTS)
    assert [e["event"] for e in events] == ["launch", "checkpoint", "checkpoint", "checkpoint"]
    assert events[0]["torch"] == torch.__version__
    assert events[0]["threads"] == torch.get_num_threads()
    assert to_mapping(load_recipe(str(tmp_path / "recipe.yaml"))) == to_mapping(recipe)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    points = board.Scalars("train/loss")
    assert [p.step for p in points] == [1, 2, 3, 4, 5, 6]
    assert [p.value for p in points] == pytest.approx([r["loss"] for r in records], rel=1e-6)

    said = capsys.readouterr().out
    assert "step 6/6" in said
    assert "waiting for data" in said
    before = (tmp_path / METRICS).read_bytes()
    again = train(recipe, toy_task(seed=3), ToyData(), tmp_path)
    assert "already at step 6 of 6" in capsys.readouterr().out
    assert (again.steps, again.resumed_from, again.seconds, again.final_loss) == (6, 6, 0.0, result.final_loss)
    assert (tmp_path / METRICS).read_bytes() == before
    assert len(read_lines(tmp_path / EVENTS)) == 4


def test_starting_again_leaves_the_trained_weights_in_the_task(tmp_path: Path) -> None:
    first, second = toy_task(), toy_task(seed=9)
    train(toy_recipe(tmp_path), first, ToyData(), tmp_path)
    train(toy_recipe(tmp_path), second, ToyData(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_logging_less_keeps_the_numbers(tmp_path: Path) -> None:
    train(toy_recipe(tmp_path / "all", steps=7), toy_task(), ToyData(), tmp_path / "all")
    train(toy_recipe(tmp_path / "some", steps=7, log_every=3), toy_task(), ToyData(), tmp_path / "some")
    every = {r["step"]: r["loss"] for r in read_lines(tmp_path / "all" / METRICS)}
    assert {r["step"]: r["loss"] for r in read_lines(tmp_path / "some" / METRICS)} == {s: every[s] for s in (3, 6, 7)}
    assert [r["step"] for r in read_lines(tmp_path / "some" / ROUTING)] == [3, 6, 7]
    assert routing_every(toy_recipe(tmp_path, steps=200_000).train) == 200


class Asked(ToyTask):
    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        self.answers = [*getattr(self, "answers", []), self.measuring]
        output = super().forward(batches)
        return output if self.measuring else replace(output, metrics={})


def test_metrics_are_taken_where_they_are_read(tmp_path: Path) -> None:
    """In the steps that are logged and in the last one; without the guard in all, for the error that may come."""
    for guard in (True, False):
        torch.manual_seed(0)
        task = Asked()
        recipe = toy_recipe(tmp_path / str(guard), steps=8, log_every=3, guard={"on": guard})
        train(recipe, task, ToyData(), tmp_path / str(guard))
        assert [n for n, asked in enumerate(task.answers, start=1) if asked] == ([3, 6, 8] if guard else [*range(1, 9)])
        lines = read_lines(tmp_path / str(guard) / METRICS)
        assert [line["step"] for line in lines] == [3, 6, 8]
        assert all("text/mlm_accuracy" in line for line in lines)


class Breaking(ToyTask):
    """Its loss, or only its gradient, is no number in the micro-step that `at` says."""

    def __init__(self, at: int, only_gradient: bool) -> None:
        super().__init__()
        self.at, self.only_gradient, self.calls = at, only_gradient, 0

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        output = super().forward(batches)
        if self.calls == self.at:
            # sqrt has an infinite slope at 0: the loss stays finite
            broken = (self.hidden.bias.sum() * 0.0).sqrt() if self.only_gradient else math.nan
            output.losses["broken"] = Summed(output.loss.new_zeros(()) + broken, 1)
        self.calls += 1
        return output


@pytest.mark.parametrize("only_gradient", [False, True])
def test_what_is_not_finite_stops_the_run_and_spoils_nothing(tmp_path: Path, only_gradient: bool) -> None:
    torch.manual_seed(0)
    task = Breaking(4, only_gradient)
    with pytest.raises(NonFiniteError) as error:
        train(toy_recipe(tmp_path, guard={"on": False}), task, ToyData(), tmp_path)
    assert "step 5: loss or gradient is not finite: loss " in str(error.value)
    assert ("grad_norm nan" if only_gradient else "loss nan") in str(error.value)
    assert "text/mlm" in str(error.value)
    assert str(tmp_path / "checkpoints" / "step-4") in str(error.value)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [2, 4]
    assert len(losses(tmp_path)) == 4
    assert all(torch.isfinite(p).all() for p in task.parameters())
    assert read_lines(tmp_path / EVENTS)[-1]["event"] == "not finite"
    again = toy_recipe(tmp_path, guard={"on": False})
    assert train(again, toy_task(), ToyData(), tmp_path).resumed_from == 4


def test_too_many_bad_samples_fail_the_run_and_a_larger_budget_lets_it_go_on(tmp_path: Path) -> None:
    recipe, data = toy_recipe(tmp_path), ToyData(bad=frozenset({1, 3, 4}))
    recipe.data.max_bad_share = 0.1
    with pytest.raises(UserError, match=r"3 of 27 samples had to be skipped.*data.max_bad_share = 0.1"):
        train(recipe, toy_task(), data, tmp_path)
    recipe.data.max_bad_share = 0.2
    assert train(recipe, toy_task(), data, tmp_path).resumed_from == 4
    skipped = [json.loads(line)["key"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert skipped == ["broken-1", "broken-3", "broken-4"]  # each once, though 4 was met twice


class Autocast(ToyTask):
    seen: torch.dtype | None = None

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        self.seen = self.hidden(torch.zeros(1, self.hidden.in_features)).dtype
        return super().forward(batches)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision_on_the_cpu(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    task = Autocast()
    train(toy_recipe(tmp_path, steps=1, precision=precision), task, ToyData(), tmp_path)
    assert task.seen == dtype
    assert task.hidden.weight.dtype == torch.float32
    assert pick_precision(precision, torch.device("cpu")) == dtype


def test_devices() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"key 'train.device' got 'tpu9', wanted auto, cpu, cuda or cuda:N"):
        pick_device("tpu9")
    for name in ("mps", "meta", "xpu", "mps:0"):
        with pytest.raises(UserError, match=rf"key 'train.device' got '{name}', wanted auto.* not supported"):
            pick_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"key 'train.device' got 'cuda'.*sees no CUDA device"):
            pick_device("cuda")
        with pytest.raises(UserError, match=r"--device got 'cuda:99'"):
            pick_device("cuda:99", "--device")


def test_a_cuda_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"got 'cuda:2', wanted a number below 2"):
        pick_device("cuda:2")


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run.dir .*/file/run: cannot be written"):
        train(toy_recipe(tmp_path), toy_task(), ToyData(), tmp_path / "file" / "run")


def test_the_lock_is_entered_again_by_its_holder(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        assert train(toy_recipe(tmp_path), toy_task(), ToyData(), tmp_path).steps == 6


@pytest.mark.parametrize(
    ("text", "size", "left"),
    [
        (b"a\nbb\nccc\n", 5, b"a\nbb\n"),
        (b"a\nbb\ncc", 7, b"a\nbb\n"),  # a torn last line goes
        (b"a\nbb\nccc\n", 4, b"a\n"),  # the file was edited: whole lines only
        (b"a\n", 99, b"a\n"),
        (b"a\nbb\n", 0, b""),
    ],
)
def test_logs_are_cut_at_whole_lines(tmp_path: Path, text: bytes, size: int, left: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(text)
    cut(path, size)
    assert path.read_bytes() == left
    cut(tmp_path / "absent", size)


def test_a_metric_that_is_no_number_becomes_null(tmp_path: Path) -> None:
    class Undefined(ToyTask):
        def forward(self, batches: dict[str, Batch]) -> StepOutput:
            output: Any = super().forward(batches)
            output.metrics["text/mlm_accuracy"] = torch.tensor(math.nan)
            return output

    train(toy_recipe(tmp_path, steps=2), Undefined(), ToyData(), tmp_path)
    assert [r["text/mlm_accuracy"] for r in read_lines(tmp_path / METRICS)] == [None, None]
