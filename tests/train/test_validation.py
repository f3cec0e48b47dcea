"""Early stopping: the best weights are kept, come back at the end, and a run killed on the way ends alike."""

from pathlib import Path

import pytest
import torch

from tests.train.toy import ToyData, ToyTask, toy_recipe, toy_task
from vlmoe.tasks.base import Task
from vlmoe.train import checkpoint
from vlmoe.train.checkpoint import CheckpointError
from vlmoe.train.judge import Validation
from vlmoe.train.loop import train

pytestmark = pytest.mark.usefixtures("no_plots")


class Script:
    """Gives prescribed scores, remembers the weights that each was given for and whether the task was in training."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.seen: list[torch.Tensor] = []
        self.training: list[bool] = []

    def __call__(self, task: Task) -> float:
        assert isinstance(task, ToyTask)
        self.seen.append(task.hidden.weight.detach().clone())
        self.training.append(task.training)
        return self.scores[len(self.seen) - 1]


def test_the_best_weights_are_those_of_the_best_score(tmp_path: Path) -> None:
    script = Script(0.1, 0.9, 0.9, 0.3, 0.2, 0.4)
    task = toy_task()
    result = train(toy_recipe(tmp_path), task, ToyData(), tmp_path, Validation(script, every=1))
    assert result.steps == 6
    assert script.training == [False] * 6
    assert task.training
    assert torch.equal(task.hidden.weight, script.seen[1])  # a later equal score is no better one
    assert not torch.equal(script.seen[1], script.seen[5])


def test_training_ends_when_nothing_gets_better_and_stays_ended(tmp_path: Path) -> None:
    script = Script(0.5, 0.4, 0.3)
    task = toy_task()
    result = train(toy_recipe(tmp_path), task, ToyData(), tmp_path, Validation(script, every=1, patience=2))
    assert result.steps == 3
    assert torch.equal(task.hidden.weight, script.seen[0])
    again = toy_task()
    result = train(toy_recipe(tmp_path), again, ToyData(), tmp_path, Validation(Script(), every=1, patience=2))
    assert (result.steps, result.resumed_from) == (3, 3)
    assert torch.equal(again.hidden.weight, script.seen[0])


def test_the_last_step_is_judged_whatever_the_interval(tmp_path: Path) -> None:
    script = Script(0.1, 0.2)
    train(toy_recipe(tmp_path), toy_task(), ToyData(), tmp_path, Validation(script, every=4))
    assert len(script.seen) == 2


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    def by_weight(task: Task) -> float:
        assert isinstance(task, ToyTask)
        return float(task.hidden.weight.detach().double().abs().sum())

    whole, parts = toy_task(), toy_task()
    train(toy_recipe(tmp_path / "a"), whole, ToyData(), tmp_path / "a", Validation(by_weight, every=1))

    class KilledError(Exception):
        pass

    def dies(task: Task) -> float:
        calls.append(1)
        if len(calls) == 5:  # after the checkpoint of step 4
            raise KilledError
        return by_weight(task)

    calls: list[int] = []
    with pytest.raises(KilledError):
        train(toy_recipe(tmp_path / "b"), toy_task(), ToyData(), tmp_path / "b", Validation(dies, every=1))
    result = train(toy_recipe(tmp_path / "b"), parts, ToyData(), tmp_path / "b", Validation(by_weight, every=1))
    assert result.resumed_from == 4
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validation_changes_nothing_about_training(tmp_path: Path) -> None:
    plain, judged = toy_task(), toy_task()
    train(toy_recipe(tmp_path / "a"), plain, ToyData(), tmp_path / "a")
    scores = Script(1, 2, 3, 4, 5, 6)  # the last is the best, so its weights are those of the end
    train(toy_recipe(tmp_path / "b"), judged, ToyData(), tmp_path / "b", Validation(scores, every=1))
    for a, b in zip(plain.parameters(), judged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_weights_are_kept_once_and_read_back(tmp_path: Path) -> None:
    task, other = toy_task(0), toy_task(1)
    checkpoint.save_weights(tmp_path, task)
    checkpoint.load_weights(tmp_path, other)
    assert torch.equal(task.embed.weight, other.embed.weight)
    assert torch.equal(other.head.weight, other.embed.weight)


def test_best_weights_that_are_broken_or_of_another_model_are_named(tmp_path: Path) -> None:
    checkpoint.save_weights(tmp_path, toy_task())
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit the model"):
        checkpoint.load_weights(tmp_path, toy_task(width=16))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable"):
        checkpoint.load_weights(tmp_path, toy_task())
