"""A launch may die at any moment: the next one ends with the very numbers of a run that never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.train import launch
from tests.train.toy import ToyData, toy_recipe, toy_task
from vlmoe.config import read_sealed, write_sealed
from vlmoe.train import checkpoint
from vlmoe.train.loop import train
from vlmoe.train.runlog import EVENTS, METRICS, ROUTING, SKIPPED, RunError, machine, read_lines

STEPS = 6


def trace(run_dir: Path) -> dict[str, Any]:
    """Everything a run wrote that must not depend on interruptions; floats are compared exactly."""
    timing = {"tokens_per_second", "seconds", "wait_share"}
    metrics = [{k: v for k, v in r.items() if k not in timing} for r in read_lines(run_dir / METRICS)]
    state = json.loads((run_dir / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())
    return {
        "metrics": metrics,
        "routing": read_lines(run_dir / ROUTING),
        "skipped": (run_dir / SKIPPED).read_text(),
        "bad": state["bad"],
        "files": state["files"],  # their SHA-256: weights and optimizer state
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """accumulate -> trace."""
    traces = {}
    for accumulate in (1, 2):
        run_dir = tmp_path_factory.mktemp("whole")
        assert launch.run(run_dir, accumulate=accumulate) == 0
        traces[accumulate] = trace(run_dir)
        assert [r["step"] for r in traces[accumulate]["metrics"]] == list(range(1, STEPS + 1))
    return traces


def assert_tidy(run_dir: Path) -> None:
    """Only whole checkpoints are left, and as many as asked for."""
    names = sorted(os.listdir(run_dir / "checkpoints"))
    assert names == ["step-4", "step-6"]


# A save is: fsync of the logs (3), of two tensor files, of state.json, of the folder; rename; fsync of the parent.
@pytest.mark.parametrize(
    ("moment", "resumes_at"),
    [
        ("forward 2", 0),
        ("fsync 1", 0),
        ("fsync 4", 0),  # model.safetensors written, nothing else
        ("fsync 6", 0),  # state.json written
        ("rename 1", 0),  # all written, not committed
        ("fsync 8", 2),  # committed
        ("half-line 3", 2),
        ("forward 4", 2),
        ("append 12", 4),
        ("rename 4", 6),  # the third checkpoint is committed, the first about to be removed
        ("rmtree 1", 6),  # the first is renamed, not deleted
        ("plot 1", 6),
    ],
)
def test_killed_anywhere_goes_on_exactly(
    tmp_path: Path, uninterrupted: dict[int, dict[str, Any]], moment: str, resumes_at: int
) -> None:
    assert launch.run(tmp_path, moment) == -signal.SIGKILL
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert (checkpoint.read_state(found).step if found else 0) == resumes_at
    assert launch.run(tmp_path) == 0
    assert trace(tmp_path) == uninterrupted[1]
    assert_tidy(tmp_path)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    assert launch.run(tmp_path, "forward 4") == -signal.SIGKILL
    assert launch.run(tmp_path) == 0
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_another_machine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_plots: None) -> None:
    assert launch.run(tmp_path, "forward 4") == -signal.SIGKILL
    path = tmp_path / "checkpoints" / "step-2" / "state.json"
    state = read_sealed(path)
    state["machine"] = machine(torch.device("cpu")) | {"threads": 64}
    write_sealed(path, state)
    train(toy_recipe(tmp_path), toy_task(), ToyData(), tmp_path)
    said = capsys.readouterr().out
    assert f"not the machine of the checkpoint (threads 64 -> {torch.get_num_threads()})" in said


def test_killed_again_and_again_with_accumulation_and_workers(
    tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    for moment in ("forward 3", "fsync 5", "forward 7", "rename 1", "forward 5", "fsync 6"):
        assert launch.run(tmp_path, moment, accumulate=2, workers=1) == -signal.SIGKILL
    assert launch.run(tmp_path, accumulate=2, workers=2) == 0
    assert trace(tmp_path) == uninterrupted[2]
    assert_tidy(tmp_path)


def test_killed_from_outside_at_no_chosen_moment(tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]) -> None:
    for lines in (1, 3, 5):
        process = launch.start(tmp_path)
        while process.is_alive() and len(read_lines(tmp_path / METRICS)) < lines:
            time.sleep(0.001)
        process.kill()
        process.join()
    assert launch.run(tmp_path) == 0
    assert trace(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize(
    ("moment", "code"),
    [
        ("sigterm 3", 143),
        ("group-sigint 3", 130),
        ("group-sigterm 3", 143),
        ("group-sighup 3", 129),
        ("group-sigusr1 3", 138),
        ("updated 3", 143),
    ],
)
def test_a_signal_finishes_the_step_and_saves(
    tmp_path: Path, uninterrupted: dict[int, dict[str, Any]], moment: str, code: int
) -> None:
    assert launch.run(tmp_path, moment, workers=0 if moment == "sigterm 3" else 2) == code
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [2, 3]
    assert launch.run(tmp_path, keep=2) == 0
    assert trace(tmp_path) == uninterrupted[1]


def test_nothing_is_saved_after_an_exception_within_a_step(
    tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    assert launch.run(tmp_path, "raise 3", workers=2) == 1
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [2]
    assert launch.run(tmp_path) == 0
    assert trace(tmp_path) == uninterrupted[1]


def test_what_was_ignored_stays_ignored(tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]) -> None:
    """As under nohup."""
    assert launch.run(tmp_path, "ignored-sighup 3", workers=1) == 0
    assert trace(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_worker_is_replaced(tmp_path: Path, uninterrupted: dict[int, dict[str, Any]], accumulate: int) -> None:
    assert launch.run(tmp_path, "worker 1", workers=1, accumulate=accumulate, steps=STEPS) == 0
    assert trace(tmp_path) == uninterrupted[accumulate]
    told = [e for e in read_lines(tmp_path / EVENTS) if e["event"] == "worker replaced"]
    assert len(told) == 1
    assert "killed by SIGKILL" in told[0]["cause"]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    assert launch.run(tmp_path, "sigint-twice 4") == -signal.SIGINT
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [2]


def test_two_processes_cannot_share_a_folder_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    process = launch.start(tmp_path, "hang 2", workers=1)
    while not read_lines(tmp_path / METRICS):
        assert process.is_alive()
        time.sleep(0.005)
    with pytest.raises(RunError, match=f"in use by process {process.pid} on "):
        train(toy_recipe(tmp_path), toy_task(), ToyData(), tmp_path)
    process.kill()
    process.join()
    assert train(toy_recipe(tmp_path), toy_task(), ToyData(), tmp_path).steps == STEPS


# Files of the toy at width 64: model 36 kB, optimizer 72 kB.
@pytest.mark.parametrize("limit", [20_000, 50_000])
def test_a_full_disk_is_an_error_that_leaves_the_older_checkpoint(tmp_path: Path, limit: int) -> None:
    """The limit is the kernel's (RLIMIT_FSIZE): writing beyond it fails in the middle of a file."""
    assert launch.run(tmp_path, f"limit {limit}") == launch.USER_ERROR
    folder = tmp_path / "checkpoints"
    error = (tmp_path / "error.txt").read_text()
    assert f"{folder / 'step-4'}: the checkpoint could not be written" in error
    assert "File too large" in error
    assert f"The newest one is {folder / 'step-2'}" in error
    assert os.listdir(folder) == ["step-2"]
    assert checkpoint.read_state(folder / "step-2").step == 2


def test_a_full_disk_while_logging_names_the_log(tmp_path: Path) -> None:
    assert launch.run(tmp_path, "limit 600", checkpoint_every=6) == launch.USER_ERROR
    # metrics.jsonl and TensorBoard's file are as long; the thread that writes the second may come first
    pattern = rf"{tmp_path}/(metrics.jsonl|tensorboard): cannot be written: .*File too large"
    assert re.match(pattern, (tmp_path / "error.txt").read_text())
