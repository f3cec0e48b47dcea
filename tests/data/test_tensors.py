"""Files of tensors, and others written under another name first: the mode of any new file, and what was meant."""

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlmoe.config import AlteredError, write_sealed
from vlmoe.data import shard_index
from vlmoe.data.tensors import load_sealed_tensors, save_sealed_tensors, save_tensors
from vlmoe.data.text_tokenizer import train_wordpiece


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_new_files_have_the_mode_that_the_umask_gives(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    save_sealed_tensors({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    write_sealed(tmp_path / "c.json", {"a": 1})
    train_wordpiece(["a b c"] * 2, 50).save(tmp_path)
    monkeypatch.setattr(shard_index, "_CACHED_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.txt").write_text("text")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "x.txt", "x.txt")
    shard_index.index_shards([str(tmp_path / "d.tar")])
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 8 and any(p.suffix == ".index" for p in files)
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in files} == {p.name: oct(0o666 & ~umask) for p in files}


def test_sealed_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_sealed_tensors(tensors, tmp_path / "x.safetensors", {"note": "hello"})
    found, metadata = load_sealed_tensors(tmp_path / "x.safetensors")
    assert metadata == {"note": "hello"}
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], v) for k, v in tensors.items())
    save_tensors(tensors, tmp_path / "x.safetensors", {"note": "hello"})
    with pytest.raises(AlteredError, match=r"x\.safetensors"):
        load_sealed_tensors(tmp_path / "x.safetensors")


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(shard_index, "_CACHED_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "file", "x.txt")
    assert len(shard_index.index_shards([str(tmp_path / "d.tar")])[0].keys) == 1
