"""A run on several processes learns what it learns on one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.training import losses, run, spawn
from vlmoe.config import load_recipe
from vlmoe.train.pretrain import pretrain
from vlmoe.train.runlog import read_lines


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    result, task = run(folder)
    return folder, vars(result), dict(task.state_dict())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, spawn(2, folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("four")
    return folder, spawn(4, folder)


@pytest.fixture(params=["two", "four"])
def several(request: pytest.FixtureRequest) -> tuple[Path, list[Any]]:
    return request.getfixturevalue(request.param)


def test_the_same_is_learned(alone: Any, several: Any) -> None:
    folder, found = several
    assert losses(folder / "whole") == pytest.approx(losses(alone[0]), abs=1e-10)
    for result, weights in (process["whole"] for process in found):
        assert {k: result[k] for k in ("steps", "stopped_by", "held_back")} == {
            k: alone[1][k] for k in ("steps", "stopped_by", "held_back")
        }
        for name, value in alone[2].items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-10)


def test_the_same_is_written_down(alone: Any, several: Any) -> None:
    """Metrics, loads, bad samples and validations of all processes, by the first one alone."""
    one, many = alone[0], several[0] / "whole"
    for ours, theirs in zip(read_lines(many / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "tokens_per_second", "wait_share"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-10), name
    assert read_lines(many / "routing.jsonl") == read_lines(one / "routing.jsonl")
    skipped = [sorted(map(json.dumps, read_lines(folder / "skipped.jsonl"))) for folder in (many, one)]
    assert skipped[0] == skipped[1] and len(skipped[1]) == 3
    judged = [
        [(e["step"], e["score"]) for e in read_lines(folder / "events.jsonl") if e["event"] == "validation"]
        for folder in (many, one)
    ]
    assert [step for step, _ in judged[0]] == [step for step, _ in judged[1]]
    assert [score for _, score in judged[0]] == pytest.approx([score for _, score in judged[1]], abs=1e-10)


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_they_go_on(two: Any) -> None:
    folder, found = two
    assert [process["stopped"] for process in found] == [(signal.SIGTERM, 8)] * len(found)
    for process in found:
        for name, value in process["whole"][1].items():
            assert torch.equal(process["resumed"][name], value)
    assert losses(folder / "stopped") == losses(folder / "whole")


def test_another_number_of_processes_goes_on(two: Any, tmp_path: Path, alone: Any) -> None:
    """From a checkpoint of two, one process trains to the same end."""
    shutil.copytree(two[0] / "stopped" / "checkpoints", tmp_path / "checkpoints")
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    shutil.rmtree(newest)
    for name in ("metrics.jsonl", "routing.jsonl", "skipped.jsonl"):
        shutil.copyfile(two[0] / "stopped" / name, tmp_path / name)
    result, task = run(tmp_path)
    assert 0 < result.resumed_from < result.steps
    for name, value in alone[2].items():
        torch.testing.assert_close(task.state_dict()[name], value, rtol=0, atol=1e-10)


def test_micro_batches_that_cannot_be_shared_are_refused(several: Any) -> None:
    world = len(several[1])
    for process in several[1]:
        assert f"got {world + 1} micro-batches a step for {world} processes" in process["refused"]
        assert f"multiple of {world}: {world}, {2 * world}, " in process["refused"]


def test_the_command_that_people_type(tmp_path: Path) -> None:
    """torchrun with a sparse recipe: tokenizers made once, the losses of one process, one report."""
    settings = [
        "model.width=32", "model.heads=2", "model.depth=2", "model.codes=32", "data.text_tokenizer.samples=300",
        "data.visual_tokenizer.steps=3", "data.batch={pair: 4, image: 1, text: 1}", "data.workers=0", "train.warmup=2",
        "train.steps=8", "train.accumulate=2", "train.log_every=1", "train.watch_every=4", "eval.samples=16",
        "eval.batch=16", "eval.every=4", "eval.pictures=0", "model.vision.router.bias_rate=0.01",
    ]  # fmt: skip
    pretrain(load_recipe("characters", [*settings, f"run.dir={tmp_path / 'one'}"]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmoe"]
    words = ["pretrain", "characters", *settings, f"run.dir={tmp_path / 'two'}"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for theirs, ours in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    loads = [read_lines(tmp_path / name / "routing.jsonl")[-1]["load"] for name in ("one", "two")]
    assert {name: sum(load) for name, load in loads[0].items()} == {n: sum(load) for n, load in loads[1].items()}
    assert done.stdout.count("text tokenizer: ") == 1 and done.stdout.count("step 8/8") == 1
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()
