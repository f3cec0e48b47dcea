"""What a checkpoint holds, and every way in which it can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.toy import ToyData, ToyTask, toy_recipe, toy_task
from vlmoe.config import Recipe, TrainConfig, describe, read_sealed, to_mapping, write_sealed
from vlmoe.train import checkpoint
from vlmoe.train.checkpoint import MODEL, OPTIMIZER, STATE, CheckpointError, State
from vlmoe.train.loop import train
from vlmoe.train.optim import make_optimizer

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained")
    train(toy_recipe(run_dir, steps=4), toy_task(), ToyData(), run_dir)
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run with checkpoints at 2 and 4."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def going_on(run_dir: Path, **settings: object) -> Recipe:
    return toy_recipe(run_dir, **{"steps": 4, **settings})


def test_plain_formats_and_names(trained: Path) -> None:
    folder = trained / "checkpoints" / "step-4"
    assert sorted(os.listdir(folder)) == [MODEL, OPTIMIZER, STATE]
    assert set(load_file(folder / OPTIMIZER)) == {
        f"{name}/{entry}"
        for name in ("embed.weight", "hidden.weight", "hidden.bias", "head.bias")
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    state = json.loads((folder / STATE).read_text())
    assert state["tied"] == {"head.weight": "embed.weight"}  # saved once
    assert set(load_file(folder / MODEL)) == {"embed.weight", "hidden.weight", "hidden.bias", "head.bias"}
    assert (state["step"], state["micro_step"]) == (4, 4)
    assert state["recipe"]["train"]["lr"] == 0.05


def test_restores_weights_ties_and_moments_exactly(trained: Path) -> None:
    folder = trained / "checkpoints" / "step-4"
    task = toy_task(seed=5)
    optimizer = make_optimizer(task, TrainConfig())
    checkpoint.restore(folder, task, optimizer)
    saved, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    assert task.head.weight is task.embed.weight
    assert torch.equal(task.head.weight, saved["embed.weight"])
    state = optimizer.state[task.hidden.weight]
    assert torch.equal(state["exp_avg"], moments["hidden.weight/exp_avg"])
    assert state["exp_avg"].abs().sum() > 0
    assert state["step"].item() == 4


def test_views_of_one_storage_are_saved_as_their_values(tmp_path: Path) -> None:
    class Views(ToyTask):
        def __init__(self) -> None:
            super().__init__()
            both = torch.arange(12.0)
            self.register_buffer("low", both[:6])
            self.register_buffer("turned", both[6:].view(2, 3).T)

    task = Views()
    state = State(1, 1, 0.0, None, {})
    path = checkpoint.save(tmp_path, state, task, make_optimizer(task, TrainConfig()), keep=1)
    saved = load_file(path / MODEL)
    assert saved["low"].tolist() == [0, 1, 2, 3, 4, 5]
    assert saved["turned"].tolist() == [[6, 9], [7, 10], [8, 11]]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_key(path: Path) -> None:
    state = read_sealed(path)
    del state["micro_step"]
    write_sealed(path, state)


def alter_key(path: Path) -> None:
    text = path.read_text()
    assert '"step": 4' in text
    path.write_text(text.replace('"step": 4', '"step": 5'))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (MODEL, truncate, r"has \d+ bytes, state.json says \d+"),
        (OPTIMIZER, truncate, r"has \d+ bytes, state.json says \d+"),
        (OPTIMIZER, flip, r"its SHA-256 is not the one in state.json"),
        (MODEL, os.remove, r"missing"),
        (STATE, os.remove, r"missing"),
        (STATE, truncate, r"not valid JSON"),
        (STATE, drop_key, r"lacks micro_step"),
        (STATE, alter_key, r"does not fit the sha256 in it: altered"),
        (STATE, lambda p: write_sealed(p, {"format": 99}), r"format 99, this version reads 4"),
        (STATE, lambda p: p.write_text('{"format": 4}'), r"no sha256 of its content"),
        (STATE, lambda p: p.write_text("[]"), r"JSON is a list"),
    ],
)
def test_damage_is_named_and_the_older_checkpoint_serves(
    run_dir: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    newest = run_dir / "checkpoints" / "step-4"
    damage(newest / name)
    with pytest.raises(CheckpointError, match=message) as error:
        train(going_on(run_dir), toy_task(), ToyData(), run_dir)
    assert str(newest / name) in str(error.value)
    assert f"Delete {newest} to go on from step 2" in str(error.value)
    assert checkpoint.steps_in(run_dir / "checkpoints") == [2, 4]  # nothing was cleaned away
    shutil.rmtree(newest)  # what the message says
    assert train(going_on(run_dir), toy_task(), ToyData(), run_dir).resumed_from == 2


def test_the_only_checkpoint_damaged(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-2")
    (run_dir / "checkpoints" / "step-4" / MODEL).unlink()
    with pytest.raises(CheckpointError, match=r"There is no older checkpoint: delete .*step-4 to start from"):
        train(going_on(run_dir), toy_task(), ToyData(), run_dir)


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Alter a tensor file and make state.json agree with it, as a checkpoint of another model would."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    state = read_sealed(folder / STATE)
    state["files"][name] = describe(folder / name) | {"tensors": len(tensors)}
    write_sealed(folder / STATE, state)


def test_a_checkpoint_of_another_model_lists_the_tensors(run_dir: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["head.bias"]
        tensors["extra"] = torch.zeros(2)
        tensors["hidden.bias"] = torch.zeros(9)

    rewrite(run_dir / "checkpoints" / "step-4", MODEL, change)
    with pytest.raises(CheckpointError) as error:
        train(going_on(run_dir), toy_task(), ToyData(), run_dir)
    assert "extra: the file has (2,) torch.float32, the model no such tensor" in str(error.value)
    assert "head.bias: the file has no such tensor, the model (12,) torch.float32" in str(error.value)
    assert "hidden.bias: the file has (9,) torch.float32, the model (8,) torch.float32" in str(error.value)
    assert "embed.weight" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"ghost/exp_avg": torch.zeros(1)}), "tensor ghost/exp_avg belongs to no parameter"),
        (lambda t: t.update({"head.bias/exp_avg": torch.zeros(3)}), r"head.bias/exp_avg has shape \(3,\), .*\(12,\)"),
        (lambda t: t.pop("head.bias/exp_avg_sq"), r"head.bias has \['exp_avg', 'step'\], AdamW needs"),
    ],
)
def test_a_foreign_optimizer_state_is_refused(
    run_dir: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(run_dir / "checkpoints" / "step-4", OPTIMIZER, change)
    with pytest.raises(CheckpointError, match=message):
        train(going_on(run_dir), toy_task(), ToyData(), run_dir)


def test_another_recipe_is_refused_key_by_key(run_dir: Path) -> None:
    recipe = going_on(run_dir, lr=0.01, steps=9)
    recipe.data.sources[1].weight = 3.0
    with pytest.raises(CheckpointError) as error:
        train(recipe, toy_task(), ToyData(), run_dir)
    lines = str(error.value).splitlines()
    assert lines[1:-2] == [
        "  data.sources[1].weight: the checkpoint has 1.0, the recipe 3.0",
        "  train.lr: the checkpoint has 0.05, the recipe 0.01",
        "  train.steps: the checkpoint has 4, the recipe 9",
    ]
    assert "init=" in lines[-1]


def test_keys_that_do_not_change_the_numbers_are_free(run_dir: Path) -> None:
    recipe = going_on(run_dir, log_every=3, checkpoint_every=9, keep=1)
    recipe.name, recipe.about, recipe.data.workers, recipe.data.max_bad_share = "other", "words", 3, 0.9
    recipe.eval.samples, recipe.run.dir = 7, "elsewhere"
    checkpoint.check_recipe(run_dir / "checkpoints" / "step-4", recipe)
    recipe.train.device = "auto"
    checkpoint.check_recipe(run_dir / "checkpoints" / "step-4", recipe)
    recipe.seed = 1
    with pytest.raises(CheckpointError, match="seed: the checkpoint has 0, the recipe 1"):
        checkpoint.check_recipe(run_dir / "checkpoints" / "step-4", recipe)


def test_a_checkpoint_from_before_a_key_was_there_says_what_it_did(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-4"
    state = read_sealed(path / STATE) | {"format": 3}
    del state["recipe"]["init"], state["recipe"]["train"]["patch_lr"]
    (path / STATE).write_text(json.dumps(state))
    recipe = going_on(run_dir)
    recipe.train.patch_lr = 1.0
    checkpoint.check_recipe(path, recipe)
    recipe.train.patch_lr = None
    with pytest.raises(CheckpointError, match=r"train\.patch_lr: the checkpoint has 1\.0, the recipe None"):
        checkpoint.check_recipe(path, recipe)


def test_pruning_and_sweeping(tmp_path: Path) -> None:
    for name in ("step-2", "step-10", "step-9", ".step-4.tmp-77", ".step-1.old-77", "step-x", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "step-10"  # by number, not by name
    checkpoint.sweep(tmp_path)
    checkpoint.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-10", "step-9", "step-x"]
    checkpoint.prune(tmp_path, 0)
    assert checkpoint.steps_in(tmp_path) == [10]  # never the last one


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    task = toy_task()
    with pytest.raises(CheckpointError, match=r"step-1: the checkpoint could not be written: .*Not a directory"):
        checkpoint.save(
            tmp_path / "checkpoints",
            State(1, 1, 0.0, None, to_mapping(toy_recipe(tmp_path))),
            task,
            make_optimizer(task, TrainConfig()),
            keep=1,
        )
