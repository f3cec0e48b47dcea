"""Indexes of shards: scanned by several processes, kept, mapped; the rows of a split without a list of them."""

import mmap
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_stream import shard
from vlmoe.data import shard_index
from vlmoe.data.files import FileOptions, hash_entries, split_rows
from vlmoe.data.rows import SplitRows
from vlmoe.data.shard_index import ShardIndex, index_shards, map_index, save_index, scan_shard
from vlmoe.data.shards import ShardSource

COLUMNS = ("offsets", "sizes")


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "_CACHED_FROM", 0)
    (tmp_path / "data").mkdir()
    for i in range(5):
        content = shard(f"{i}.tar", 40 * i)
        (tmp_path / "data" / f"{i}.tar").write_bytes(content[: 100 * 512 + 700 if i == 3 else None])
    return [str(tmp_path / "data" / f"{i}.tar") for i in range(5)]


def same(one: ShardIndex, two: ShardIndex) -> bool:
    about = [(list(i.keys), i.damage, i.members, i.ignored.as_dict()) for i in (one, two)]
    return about[0] == about[1] and all(np.array_equal(getattr(one, c), getattr(two, c)) for c in COLUMNS)


@pytest.mark.parametrize("parallel_from", [0, 1 << 40])
def test_scanned_by_one_or_several_processes_and_mapped_from_files(
    paths: list[str], parallel_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_index, "_PARALLEL_FROM", parallel_from)
    monkeypatch.setattr(shard_index.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    scanned = [scan_shard(Path(path)) for path in paths]
    for indexes in (index_shards(paths), index_shards(paths)):  # made, then found
        assert indexes.counts.tolist() == [len(index) for index in scanned]
        assert all(same(indexes[i], index) for i, index in enumerate(scanned))
        array: object = indexes[2].offsets
        while isinstance(array, np.ndarray):
            array = array.base
        assert isinstance(getattr(array, "obj", array), mmap.mmap)
    assert scanned[3].damage and scanned[3].members
    assert same(pickle.loads(pickle.dumps(indexes))[4], scanned[4])


def test_few_stay_mapped(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "_MAPPED", 2)
    indexes = index_shards(paths)
    for i in (0, 1, 2, 1, 4):
        assert len(indexes[i].keys) == len(scan_shard(Path(paths[i])).keys)
    assert list(indexes._mapped) == [1, 4]


def test_an_index_that_is_not_whole_is_refused(paths: list[str], tmp_path: Path) -> None:
    file = tmp_path / "x.index"
    save_index(scan_shard(Path(paths[2])), file)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:20], b"", b"null\n", b'{"samples": 1}\n'):
        file.write_bytes(damaged)
        assert not shard_index._whole(file)
    file.write_bytes(whole)
    assert same(map_index(file), scan_shard(Path(paths[2])))


def test_only_shards_that_are_new_are_scanned(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    index_shards(paths[:4])
    seen: list[Path] = []

    def scan(path: Path) -> ShardIndex:
        seen.append(path)
        return scan_shard(path)

    monkeypatch.setattr(shard_index, "scan_shard", scan)
    index_shards(paths)
    assert seen == [Path(paths[4])]


@pytest.mark.parametrize("share", [0.01, 0, 0.001, 0.3, 1])
@pytest.mark.parametrize("counts", [[], [0], [1], [3, 0, 4], [250, 1, 0, 399, 70]])
def test_rows_of_a_split_are_those_of_the_list(counts: list[int], share: float) -> None:
    names = [f"{i}.tar" for i in range(len(counts))]
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hash_entries(n, c) for n, c in zip(names, counts, strict=True))])
    for split in ("train", "val", "all"):
        rows, listed = SplitRows(names, counts, split, share), split_rows(hashes, split, share).tolist()
        assert len(rows) == len(listed)
        assert [rows[i] for i in range(len(rows))] == list(rows) == listed
        with pytest.raises(IndexError):
            rows[len(rows)]


def test_a_source_draws_through_mapped_indexes(paths: list[str], tmp_path: Path) -> None:
    source = ShardSource(FileOptions("text", str(tmp_path / "data"), "train"))
    copied = pickle.loads(pickle.dumps(source))  # as for a spawned worker
    for i in (0, 57, len(source) - 1):
        assert source[i].key == copied[i].key
        assert source.text(i) == copied[i].text
