"""Making a run longer: in the constant phase of its schedule, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.toy import ToyData, toy_recipe, toy_task
from vlmoe.config import UserError
from vlmoe.train import checkpoint
from vlmoe.train.loop import TrainResult, train
from vlmoe.train.runlog import EVENTS, read_lines

pytestmark = pytest.mark.usefixtures("no_plots")
WSD: dict[str, Any] = {"schedule": "constant_decay", "min_lr": 0.0}


class EndsError(Exception):
    pass


def launch(folder: Path, stop: int | None = None, task: Any = None, **keys: Any) -> TrainResult:
    def disturb(_: Any, n: int) -> None:
        if n == stop:
            raise EndsError

    return train(toy_recipe(folder, **keys), task or toy_task(), ToyData(), folder, disturb=disturb)


def test_a_run_in_its_constant_phase_may_be_made_longer(tmp_path: Path) -> None:
    with pytest.raises(EndsError):
        launch(tmp_path / "a", stop=4, steps=6, decay_steps=2, **WSD)
    assert checkpoint.steps_in(tmp_path / "a" / "checkpoints") == [2, 4]
    longer, whole = toy_task(), toy_task()
    assert launch(tmp_path / "a", task=longer, steps=9, decay_steps=3, **WSD).resumed_from == 4
    launch(tmp_path / "b", task=whole, steps=9, decay_steps=3, **WSD)
    assert all(torch.equal(a, b) for a, b in zip(longer.parameters(), whole.parameters(), strict=True))


def test_a_run_whose_rate_has_fallen_may_not(tmp_path: Path) -> None:
    launch(tmp_path / "a", steps=6, decay_steps=3, **WSD)
    with pytest.raises(UserError, match=r"train\.steps: the checkpoint has 6"):
        launch(tmp_path / "a", steps=9, decay_steps=3, **WSD)
    launch(tmp_path / "b")
    with pytest.raises(UserError, match=rf"init={tmp_path / 'b'} seed=ANOTHER run.dir=ANOTHER"):
        launch(tmp_path / "b", steps=9)


def test_a_run_that_made_few_of_its_updates_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(module: Any, args: Any, output: Any) -> None:
        output.losses["mlm"].total.data.fill_(float("nan"))

    def disturb(trainer: Any, n: int) -> None:
        if n == 2:
            trainer.task.register_forward_hook(spoil)

    result = train(toy_recipe(tmp_path), toy_task(), ToyData(), tmp_path, disturb=disturb)
    assert (result.held_back, result.steps, result.mostly_held_back) == (4, 6, True)
    assert "4 of 6 updates were held back" in capsys.readouterr().out
    assert [e["updates"] for e in read_lines(tmp_path / EVENTS) if e["event"] == "held back in all"] == [4]
