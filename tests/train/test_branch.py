"""Runs of several lengths that branch off one training at a constant rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.toy import ToyData, ToyTask, toy_recipe, toy_task
from vlmoe.config import UserError
from vlmoe.train import checkpoint
from vlmoe.train.branch import began_at, branch_off
from vlmoe.train.loop import TrainResult, train
from vlmoe.train.runlog import CHECKPOINTS, EVENTS, METRICS, ROUTING, SKIPPED, read_lines

pytestmark = pytest.mark.usefixtures("no_plots")
WSD: dict[str, Any] = {"schedule": "constant_decay", "min_lr": 0.0, "checkpoint_every": 100, "guard": {"every": 3}}
TIMING = {"tokens_per_second", "seconds", "wait_share"}
DATA = ToyData(bad=frozenset({1, 7}))


def launch(folder: Path, task: ToyTask, steps: int, decay: int, **keys: Any) -> TrainResult:
    return train(toy_recipe(folder, steps=steps, decay_steps=decay, **WSD, **keys), task, DATA, folder)


def branch(folder: Path, source: Path, steps: int, decay: int, **keys: Any) -> tuple[ToyTask, TrainResult]:
    recipe = toy_recipe(folder, steps=steps, decay_steps=decay, **WSD, **keys)
    recipe.branch_from = str(source)
    folder.mkdir(parents=True, exist_ok=True)
    branch_off(recipe, folder, ["tokenizers"])
    task = toy_task(seed=9)  # whatever it was initialised with is gone
    return task, train(recipe, task, DATA, folder)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 steps, the last 3 of decay, with checkpoints of steps 6 and 12 kept."""
    folder = tmp_path_factory.mktemp("trunk")
    (folder / "tokenizers").mkdir(parents=True)
    (folder / "tokenizers" / "text.json").write_text("words")
    launch(folder, toy_task(), 21, 3, keep_at=[6, 12], keep=1)
    return folder


def test_checkpoints_to_be_kept_are_kept(trunk: Path) -> None:
    assert checkpoint.steps_in(trunk / CHECKPOINTS) == [6, 12, 21]


@pytest.mark.parametrize(("start", "steps", "decay"), [(6, 8, 2), (12, 15, 3), (6, 15, 3)])
def test_a_branch_is_a_run_from_nothing(trunk: Path, tmp_path: Path, start: int, steps: int, decay: int) -> None:
    """Weights, optimizer, every logged number, skipped samples. (6, 15, 3) trains on at the constant rate first."""
    task, result = branch(tmp_path / "branch", trunk / CHECKPOINTS / f"step-{start}", steps, decay)
    assert (result.resumed_from, result.steps, began_at(tmp_path / "branch")) == (start, steps, start)
    whole = toy_task()
    launch(tmp_path / "whole", whole, steps, decay)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), whole.parameters(), strict=True))
    found = []
    for name in ("branch", "whole"):
        folder = tmp_path / name
        state = json.loads((folder / CHECKPOINTS / f"step-{steps}" / "state.json").read_text())
        metrics = [{k: v for k, v in r.items() if k not in TIMING} for r in read_lines(folder / METRICS)]
        routing, skipped = read_lines(folder / ROUTING), (folder / SKIPPED).read_text()
        found.append((state["files"], state["guard"], state["bad"], metrics, routing, skipped))
    assert found[0] == found[1]
    assert len(found[0][3]) == steps
    assert (tmp_path / "branch" / "tokenizers" / "text.json").read_text() == "words"


def test_the_clock_of_a_branch_is_that_of_all_its_steps(trunk: Path, tmp_path: Path) -> None:
    branch(tmp_path, trunk / CHECKPOINTS / "step-6", 8, 2)
    own, other = read_lines(tmp_path / METRICS), read_lines(trunk / METRICS)
    assert own[5]["seconds"] == other[5]["seconds"] < own[6]["seconds"]
    assert [e["event"] for e in read_lines(tmp_path / EVENTS)].count("launch") == 2


def test_a_branch_that_was_not_copied_whole_begins_anew(trunk: Path, tmp_path: Path) -> None:
    """Killed before the checkpoint was there: nothing of what was copied appears twice."""
    recipe = toy_recipe(tmp_path, steps=8, decay_steps=2, **WSD)
    recipe.branch_from = str(trunk / CHECKPOINTS / "step-6")
    path = branch_off(recipe, tmp_path, [])
    checkpoint.remove(path)
    branch(tmp_path, trunk / CHECKPOINTS / "step-6", 8, 2)
    assert [r["step"] for r in read_lines(tmp_path / METRICS)] == list(range(1, 9))
    assert [e["event"] for e in read_lines(tmp_path / EVENTS)].count("branched") == 1


@pytest.mark.parametrize(
    ("source", "keys", "said"),
    [
        ("step-7", {}, r"no checkpoint, wanted RUN/checkpoints/step-N"),
        ("", {}, r"there are steps 6, 12, 21"),
        ("step-6", {"lr": 0.1}, r"train\.lr: the checkpoint has 0\.05, the recipe 0\.1"),
        ("step-12", {"steps": 13, "decay_steps": 2}, r"train\.steps: the checkpoint has 21, the recipe 13"),
        ("step-21", {}, r"train\.steps: the checkpoint has 21, the recipe 15"),
    ],
)
def test_what_cannot_be_branched_off_is_refused(
    trunk: Path, tmp_path: Path, source: str, keys: dict[str, Any], said: str
) -> None:
    recipe = toy_recipe(tmp_path, **(WSD | {"steps": 15, "decay_steps": 3} | keys))
    recipe.branch_from = str(trunk / CHECKPOINTS / source)
    with pytest.raises(UserError, match=said):
        branch_off(recipe, tmp_path, [])
    assert not any(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_branched_off(trunk: Path, tmp_path: Path) -> None:
    copied = tmp_path / "trunk" / CHECKPOINTS
    copied.mkdir(parents=True)
    path = checkpoint.copy(trunk / CHECKPOINTS / "step-6", copied)
    with open(path / checkpoint.MODEL, "rb+") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(UserError, match=r"step-6/model\.safetensors"):
        branch(tmp_path / "branch", path, 8, 2)
    assert checkpoint.steps_in(tmp_path / "branch" / CHECKPOINTS) == []
