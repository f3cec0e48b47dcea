"""Streams through the loader: real data workers, whatever their number, killed or not."""

import multiprocessing
import os
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader

from tests.data.fakes import small_recipe
from tests.data.test_loader import same_steps
from tests.data.test_stream import shard, trained_on, whole_names
from vlmoe.config import Recipe, RecipeError
from vlmoe.data.loader import BadBudget, Step, StepData, held_out, make_loader
from vlmoe.data.text_tokenizer import build_text_tokenizer, train_wordpiece

TOKENIZER = train_wordpiece(["s number tar 0 1 2 3 4 5 6 7 8 9 ."] * 2, 128)
SIZE = 12


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, int]:
    """Eight files in "data": .tar, or of the suffix that a test asks for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = dict.fromkeys(whole_names(SIZE, 8, getattr(request, "param", "tar")), SIZE)
    (tmp_path / "data").mkdir()
    for name in sizes:
        (tmp_path / "data" / name).write_bytes(shard(name, SIZE))
    return sizes


def recipe_of(path: Path | str, **stream: Any) -> Recipe:
    type = "parquet" if next(Path(path).glob("*.parquet"), None) else "shards"
    return small_recipe(
        data__batch={"image": 0, "text": 4, "pair": 0},
        data__sources=[{"type": type, "kind": "text", "path": str(path), "read": "stream"}],
        data__stream={"readers": 4, "buffer": 10} | stream,
    )


def keys(steps: list[Step]) -> list[str]:
    return list(chain(*(step.batches["text"].keys for step in steps)))


def test_any_number_of_workers_gives_the_same_batches(tmp_path: Path, shards: dict[str, int]) -> None:
    recipe = recipe_of(tmp_path / "data")
    alone = list(make_loader(StepData(recipe, TOKENIZER), 0, 48))
    for workers in (2, 3):  # three do not divide the readers
        data = StepData(recipe, TOKENIZER, record=tmp_path / str(workers))
        assert same_steps(list(make_loader(data, 5, 40, workers)), alone[5:40])
    assert sorted(keys(alone[:24])) == sorted(keys(alone[24:])) == trained_on(shards)


def test_two_ranks_of_two_workers_read_an_epoch_exactly(tmp_path: Path, shards: dict[str, int]) -> None:
    read: dict[int, Step] = {}
    for rank in range(2):
        data = StepData(recipe_of(tmp_path / "data"), TOKENIZER, record=tmp_path / "record")
        mine = range(rank, 24, 2)
        loader = DataLoader(data, batch_size=None, sampler=mine, num_workers=2)
        read |= dict(zip(mine, loader, strict=True))
    assert sorted(keys(list(read.values()))) == trained_on(shards)
    alone = StepData(recipe_of(tmp_path / "data"), TOKENIZER)
    assert same_steps([read[n] for n in range(24)], [alone[n] for n in range(24)])


@pytest.mark.parametrize("shards", ["tar", "parquet"], indirect=True)
def test_a_killed_worker_changes_nothing(tmp_path: Path, shards: dict[str, int]) -> None:
    recipe = recipe_of(tmp_path / "data")
    lost: list[int] = []
    alone = StepData(recipe, TOKENIZER)
    data = StepData(recipe, TOKENIZER, record=tmp_path / "record")
    others = set(multiprocessing.active_children())
    steps = iter(make_loader(data, 0, 30, workers=2, lost=lambda n, cause: lost.append(n)))
    found = [next(steps) for _ in range(9)]
    worker = (set(multiprocessing.active_children()) - others).pop()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    found += list(steps)
    assert len(lost) == 1
    assert same_steps(found, [alone[n] for n in range(30)])


def test_a_lost_shard_counts_for_all_its_samples(tmp_path: Path, shards: dict[str, int]) -> None:
    MemoryFileSystem.store.clear()
    for name in shards:
        with fsspec.open(f"memory://data/{name}", "wb") as file:
            file.write(shard(name, SIZE))
    gone = next(iter(shards))
    names = ",".join(shards)
    MemoryFileSystem.store.pop(f"/data/{gone}")
    data = StepData(recipe_of(f"memory://data/{{{names}}}", attempts=1), TOKENIZER)
    budget = BadBudget(tmp_path / "skipped.jsonl", 1.0)
    for n in range(24):
        budget.add(data[n])
    assert budget.bad >= SIZE and budget.drawn >= 24 * 4 + SIZE
    assert f'"key": "{gone}", "reason": "lost shard: ' in (tmp_path / "skipped.jsonl").read_text()


def test_tokenizers_and_evaluation_read_streams_too(tmp_path: Path, shards: dict[str, int]) -> None:
    (tmp_path / "data" / "z.tar").write_bytes(shard("z.tar", 300))
    for name in shards:
        (tmp_path / "data" / name).unlink()
    recipe = recipe_of(tmp_path / "data")
    tokenizer = build_text_tokenizer(recipe)
    assert held_out(recipe, tokenizer, "val", "text", 0, 2).keys[0].startswith("z.tar/")
    trained = set(keys([StepData(recipe, tokenizer)[n] for n in range(60)]))
    assert not trained & set(held_out(recipe, tokenizer, "val", "text", 0, 2).keys)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"read": "backwards"}, r"sources\[0\].read' got 'backwards', wanted random, stream or resample"),
        (
            {"read": "stream", "type": "folder"},
            r"sources\[0\].read' got 'stream', wanted random, because folder is not read as a stream",
        ),
        ({"read": "stream", "shard_weights": {"a": 1.0}}, r"sources\[0\].shard_weights' got .* wanted none"),
        ({"read": "resample", "shard_weights": {"a": -1.0}}, r"sources\[0\].shard_weights' got .*numbers not below 0"),
    ],
)
def test_keys_that_do_not_fit(source: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        small_recipe(
            data__batch={"image": 0, "text": 4, "pair": 0},
            data__sources=[{"type": "shards", "kind": "text", "path": "x"} | source],
        )


def test_streams_have_at_least_one_reader() -> None:
    with pytest.raises(RecipeError, match=r"data.stream.readers' got 0, wanted a positive number"):
        recipe_of("x", readers=0)
