"""A run that reads streams goes on from its checkpoints with the very numbers of one that never stopped."""

import io
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

from tests.data.fakes import small_recipe
from tests.data.test_stream import shard
from vlmoe.config import Recipe, UserError
from vlmoe.data.check_recipe import check_recipe
from vlmoe.train import pretrain as module
from vlmoe.train.pretrain import MODEL, STREAM, pretrain
from vlmoe.train.runlog import METRICS, read_lines

STEPS = 6


def recipe_of(run_dir: Path, data: Path, workers: int) -> Recipe:
    recipe = small_recipe(
        data__batch={"image": 0, "text": 4, "pair": 0},
        data__sources=[{"type": "shards", "kind": "text", "path": str(data), "read": "stream"}],
        data__stream={"readers": 2, "buffer": 8},
        data__text_tokenizer={"samples": 40},
        model__depth=1,
        model__vl_ffn=0,
    )
    recipe.data.workers = workers
    recipe.run.dir = str(run_dir)
    recipe.train.steps, recipe.train.warmup, recipe.train.checkpoint_every, recipe.train.keep = STEPS, 1, 2, 3
    return recipe


def trace(run_dir: Path) -> tuple[Any, list[tuple[int, float]]]:
    state = json.loads((run_dir / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())
    return state["files"], [(line["step"], line["loss"]) for line in read_lines(run_dir / METRICS)]


def test_a_stream_resumes_exactly_with_other_workers_and_without_its_ledger(tmp_path: Path, no_plots: None) -> None:
    (tmp_path / "data").mkdir()
    for i in range(6):
        (tmp_path / "data" / f"{i}.tar").write_bytes(shard(f"{i}.tar", 9))
    whole = tmp_path / "whole"
    pretrain(recipe_of(whole, tmp_path / "data", workers=2))
    assert sorted(p.name for p in (whole / STREAM).iterdir()) == ["text-0-0.jsonl", "text-0-1.jsonl"]
    for step, workers, ledger in ((2, 0, True), (4, 0, False)):
        run = tmp_path / f"from {step}"
        shutil.copytree(whole, run)
        shutil.rmtree(run / MODEL)
        for later in range(step + 2, STEPS + 1, 2):
            shutil.rmtree(run / "checkpoints" / f"step-{later}")
        if not ledger:
            shutil.rmtree(run / STREAM)
        pretrain(recipe_of(run, tmp_path / "data", workers))
        assert trace(run) == trace(whole)


def test_too_few_files_are_said_once_in_the_check_and_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: Any) -> NoReturn:
        raise UserError("begun")

    monkeypatch.setattr(module, "train", begun)
    (tmp_path / "data").mkdir()
    for i, said in enumerate(("1 file is too few for 2 readers", "", "3 files cannot be dealt evenly to 2 readers")):
        (tmp_path / "data" / f"{i}.tar").write_bytes(shard(f"{i}.tar", 9))
        recipe, console = recipe_of(tmp_path / f"run {i}", tmp_path / "data", 0), Console(file=io.StringIO(), width=60)
        with pytest.raises(UserError, match="begun"):
            pretrain(recipe, console)
        assert isinstance(console.file, io.StringIO)
        for lines in (check_recipe(recipe)["problems"], console.file.getvalue().splitlines()):
            found = [line for line in lines if "readers" in line]
            assert len(found) == bool(said)
            assert all(line.startswith(f"text of {tmp_path}/data: {said}") for line in found)
