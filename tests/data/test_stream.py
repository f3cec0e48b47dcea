"""Shards and parquet files read as streams: what an epoch holds, what a resumed run sees, what a lost shard costs."""

import io
import json
import multiprocessing
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.fakes import FakeSource
from vlmoe.config import SourceConfig, StreamConfig, UserError
from vlmoe.data import shards as shards_module
from vlmoe.data import stream as stream_module
from vlmoe.data import urls
from vlmoe.data.dealer import Dealer, shard_weights, uneven
from vlmoe.data.files import FileOptions
from vlmoe.data.mixture import Mixture
from vlmoe.data.rows import rows_of_file
from vlmoe.data.sample import BadSample, Sample
from vlmoe.data.shard_index import ShardIndex, scan_shard
from vlmoe.data.shards import ShardSource
from vlmoe.data.sources import open_files
from vlmoe.data.stream import StreamSource, held_out_of_stream
from vlmoe.data.urls import FetchOptions

READERS = 4
FORK = multiprocessing.get_context("fork")


class Flaky(MemoryFileSystem):
    """Files in memory, of which transfers fail: `failing[name]` more times, or for ever."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in its parent, all instances share the files
    pseudo_dirs = [""]  # noqa: RUF012
    failing: ClassVar[Counter[str]] = Counter()
    fetched: ClassVar[Counter[str]] = Counter()

    def get_file(self, rpath: str, lpath: str, **more: Any) -> None:
        name = rpath.rsplit("/", 1)[-1]
        self.fetched[name] += 1
        if self.failing[name] > 0:
            self.failing[name] -= 1
            raise OSError("connection reset")
        super().get_file(rpath, lpath, **more)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for files in (MemoryFileSystem, Flaky):
        files.store.clear()
        files.pseudo_dirs[:] = [""]
    Flaky.failing.clear()
    Flaky.fetched.clear()
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shard(name: str, size: int) -> bytes:
    """A .tar or a .parquet file, by its name."""
    buffer = io.BytesIO()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [f"{name} number {i}" for i in range(size)]}), buffer, row_group_size=5)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(size):
            text = f"{name} number {i}".encode()
            info = tarfile.TarInfo(f"{i:04d}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def whole_names(size: int, number: int, suffix: str = "tar") -> list[str]:
    """Names of shards of which nothing is held out, so that all are equally long."""
    names = (f"s{i:03d}.{suffix}" for i in count())
    return list(islice((n for n in names if len(rows_of_file(n, size, "train")) == size), number))


def write(sizes: dict[str, int], where: Path | str) -> str:
    """Shards of these sizes in a folder or below a URL. Returns the pattern."""
    for name, size in sizes.items():
        if isinstance(where, Path):
            where.mkdir(exist_ok=True)
            (where / name).write_bytes(shard(name, size))
        else:
            with fsspec.open(f"{where}/{name}", "wb") as file:
                file.write(shard(name, size))
    return f"{where}/*.{name.rpartition('.')[2]}"


def open_stream(pattern: str, record: Path | None = None, **changes: Any) -> StreamSource:
    """buffer, readers, limit, attempts; other changes are the source's."""
    stream = StreamConfig(readers=changes.pop("readers", READERS), buffer=changes.pop("buffer", 10))
    fetch = FetchOptions("", changes.pop("limit", 10**9), changes.pop("attempts", 3))
    type = "parquet" if pattern.endswith(".parquet") else "shards"
    config = SourceConfig(type, "text", pattern, **({"read": "stream"} | changes))
    return StreamSource(FileOptions("text", pattern, fetch=fetch), config, stream, 5, 0, record)


def keys_of(source: StreamSource, start: int, stop: int, batch: int = 4) -> list[list[str]]:
    """Keys of micro-batches, as a run draws them."""
    mixture = Mixture([(source, 1.0)], 5, batch=batch)
    return [[mixture.draw(n * batch + i, lambda s: s.key, []) for i in range(batch)] for n in range(start, stop)]


def trained_on(sizes: dict[str, int]) -> list[str]:
    entry = {name: f"{name}:{{}}" if name.endswith(".parquet") else f"{name}/{{:04d}}" for name in sizes}
    rows = {name: rows_of_file(name, size, "train").tolist() for name, size in sizes.items()}
    return sorted(entry[name].format(i) for name in sizes for i in rows[name])


def file_of(key: str) -> str:
    return re.split("[/:]", key)[0]


def by_epoch(source: StreamSource, epochs: int) -> list[list[str]]:
    """Keys of each epoch over all readers, reader after reader; "lost" for a shard."""
    found: list[list[str]] = [[] for _ in range(epochs)]
    for number in range(source.readers):
        reader = source.reader(number)
        for k in count():
            epoch = source.dealer.epoch(number, reader.locate(k)[0])
            if epoch >= epochs:
                break
            try:
                found[epoch].append(reader.read(k, False)[1])
            except BadSample:
                found[epoch].append("lost")
    return found


# --------------------------------------------------------------------------------------------------------------- epochs
@pytest.mark.parametrize(
    ("readers", "buffer", "suffix"),
    [(1, 1000, "tar"), (4, 5, "tar"), (3, 64, "tar"), (8, 1, "tar"), (3, 64, "parquet"), (8, 5, "parquet")],
)
def test_every_epoch_holds_every_sample_once(tmp_path: Path, readers: int, buffer: int, suffix: str) -> None:
    sizes = {f"a.{suffix}": 31, f"b.{suffix}": 7, f"c.{suffix}": 0, f"d.{suffix}": 120, f"e.{suffix}": 1}
    source = open_stream(write(sizes, tmp_path / "data"), readers=readers, buffer=buffer)
    epochs = by_epoch(source, 4)
    for epoch in epochs:
        assert sorted(epoch) == trained_on(sizes)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len(trained_on(sizes)) < sum(sizes.values())  # some are held out


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_two_ranks_of_two_workers_read_an_epoch_without_overlap(tmp_path: Path, suffix: str) -> None:
    sizes = dict.fromkeys(whole_names(12, 8, suffix), 12)
    pattern = write(sizes, tmp_path / "data")
    alone = keys_of(open_stream(pattern), 0, 48)
    # Worker w of rank r has micro-batches r + 2 w, r + 2 w + 4, ...; each process opens the data for itself.
    read: dict[int, list[str]] = {}
    shards: list[set[str]] = []
    for rank in range(2):
        for worker in range(2):
            source = open_stream(pattern, tmp_path / "run" / "stream")
            mine = {n: keys_of(source, n, n + 1)[0] for n in range(rank + 2 * worker, 48, 4)}
            shards.append({file_of(key) for n, batch in mine.items() if n < 24 for key in batch})
            read |= mine
    assert [read[n] for n in range(48)] == alone
    for epoch in (alone[:24], alone[24:]):
        assert sorted(chain(*epoch)) == trained_on(sizes)
    assert alone[:24] != alone[24:]
    assert sum(map(len, shards)) == len(set.union(*shards)) == 8  # of the first epoch, nobody opened another's shards


def test_any_micro_batch_can_be_asked_for_in_any_order(tmp_path: Path) -> None:
    pattern = write({f"{i}.tar": 9 + i for i in range(6)}, tmp_path / "data")
    alone = keys_of(open_stream(pattern), 0, 60)
    source = open_stream(pattern, readers=READERS)
    order = np.random.default_rng(0).permutation(60).tolist()
    assert [keys_of(source, n, n + 1)[0] for n in order] == [alone[n] for n in order]
    assert keys_of(open_stream(pattern, buffer=11), 0, 60) != alone


def test_streams_mix_with_sources_of_random_access() -> None:
    class Fake(FakeSource):
        readers = 3

        def __len__(self) -> int:
            return 1 << 40

    mixture = Mixture([(Fake("text", 0), 2.0), (FakeSource("text", 1 << 41), 1.0), (Fake("text", 0), 0.5)], 0, batch=5)
    seen: Counter[tuple[int, int]] = Counter()
    for position in range(2000):
        number, index, _ = mixture.index(position)
        readers = 1 if number == 1 else 3
        draws, reader = divmod(index, readers)
        assert reader == position // 5 % readers
        assert draws == seen[number, reader]
        seen[number, reader] += 1
    assert abs(sum(n for (number, _), n in seen.items() if number == 0) - 2000 * 4 / 7) < 3


def test_what_is_held_out_is_not_in_the_stream(tmp_path: Path) -> None:
    sizes = {f"{i}.tar": 150 for i in range(4)}
    pattern = write(sizes, tmp_path / "data")
    held_out = held_out_of_stream(FileOptions("text", pattern, "val"), "shards")
    keys = {held_out[i].key for i in range(len(held_out))}
    assert len(keys) + len(trained_on(sizes)) == 600
    assert not keys & set(by_epoch(open_stream(pattern), 1)[0])
    few = write({"0.tar": 150}, tmp_path / "few")
    assert len(held_out_of_stream(FileOptions("text", few, "val"), "shards")) == len(
        keys & {k for k in keys if k[0] == "0"}
    )


def test_the_share_held_out_is_the_sources_own(tmp_path: Path) -> None:
    pattern = write({f"{i}.tar": 40 for i in range(4)}, tmp_path / "data")
    stream, config = StreamConfig(readers=2, buffer=10), SourceConfig("shards", "text", pattern, read="stream")
    for share in (0.0, 0.3):
        options = FileOptions("text", pattern, held_out=share)
        train = {s for e in by_epoch(StreamSource(options, config, stream, 5, 0), 1) for s in e}
        held = ShardSource(FileOptions("text", pattern, "val", held_out=share))
        assert not train & {held[i].key for i in range(len(held))}
        assert len(train) + len(held) == 160
        assert 0.5 * share * 160 <= len(held) <= 1.5 * share * 160
    assert len(held_out_of_stream(FileOptions("text", pattern, "val", held_out=1.0), "shards")) == 160


def test_captions_rotate_over_epochs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    name = whole_names(1, 1)[0]
    with tarfile.open(tmp_path / "data" / name, "w") as tar:
        text = json.dumps({"text": ["one", "two", "three"]}).encode()
        info = tarfile.TarInfo("a.json")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    for read in ("stream", "resample"):
        source = open_stream(str(tmp_path / "data"), readers=1, buffer=1, read=read)
        assert [source[i].text for i in range(4)] == ["one", "two", "three", "one"]
        assert source.text(2) == "three"


# -------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path: Path, suffix: str) -> None:
    sizes = {f"{i:02d}.{suffix}": 8 + i % 3 for i in range(20)}
    pattern = write(sizes, "flaky://data")
    alone = keys_of(open_stream(pattern), 0, 80)
    record = tmp_path / "run" / "stream"
    assert keys_of(open_stream(pattern, record), 0, 37) == alone[:37]
    for ledger in record.iterdir():
        with ledger.open("a") as file:
            file.write('{"shard": "torn')  # killed while it wrote
    urls_cache = tmp_path / "cache"
    os.rename(urls_cache, tmp_path / "other")  # another machine, with the run's folder
    resumed = open_stream(pattern, record)
    Flaky.fetched.clear()  # of parquet, the first file, for its columns
    assert keys_of(resumed, 37, 41) == alone[37:41]
    assert sum(Flaky.fetched.values()) <= READERS * 3  # the shards of one block of each reader
    assert keys_of(resumed, 41, 80) == alone[41:]
    assert keys_of(open_stream(pattern), 37, 80) == alone[37:]  # without the ledger: longer, to the same end


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_killed_processes_leave_an_epoch_whole(tmp_path: Path, suffix: str) -> None:
    sizes = dict.fromkeys(whole_names(12, 8, suffix), 12)
    pattern, record = write(sizes, tmp_path / "data"), tmp_path / "run" / "stream"
    read: dict[int, list[str]] = {}
    # Two ranks of two workers are killed while they read; two of one go on, and others of them, until the second epoch.
    for start, stop, processes in ((0, 13, 4), (13, 29, 2), (29, 48, 3)):
        for number in range(processes):
            mine = range(start + number, 48, processes)
            here, there = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_send_batches, args=(pattern, record, mine, there))
            process.start()
            for n in mine:
                if n >= stop:
                    break
                read[n] = here.recv()
            process.kill()
            process.join()
    assert [read[n] for n in range(48)] == keys_of(open_stream(pattern), 0, 48)
    for epoch in (range(24), range(24, 48)):
        assert sorted(chain(*(read[n] for n in epoch))) == trained_on(sizes)


def _send_batches(pattern: str, record: Path, numbers: range, to: Connection) -> None:
    source = open_stream(pattern, record)
    for n in numbers:
        to.send(keys_of(source, n, n + 1)[0])


def test_processes_that_keep_one_ledger_agree(tmp_path: Path) -> None:
    sizes = dict.fromkeys(whole_names(6, 10), 6)
    pattern = write(sizes, "flaky://data")
    record = tmp_path / "run"
    one, two = open_stream(pattern, record, attempts=1), open_stream(pattern, record, attempts=1)
    keys_of(two, 0, 1)
    lost = one.shards[one.dealer.deal(0, 2)].rsplit("/", 1)[-1]
    for name in sizes:
        Flaky.failing[name] = 10**6 if name == lost else 0
    (tmp_path / "cache" / "vlmoe").rename(tmp_path / "gone")
    first = keys_of(one, 0, 24)
    Flaky.failing.clear()
    assert keys_of(two, 0, 24) == first  # it could have read the shard, and takes it as lost
    lines = (record / "text-0-0.jsonl").read_text().splitlines()
    assert "connection reset" in lines[1 + 2]  # behind the line that says what it is of


def test_data_that_have_changed_are_noticed(tmp_path: Path) -> None:
    sizes = {f"{i}.tar": 20 for i in range(6)}
    pattern = write(sizes, tmp_path / "data")
    keys_of(open_stream(pattern, tmp_path / "run"), 0, 12)
    write({"6.tar": 20}, tmp_path / "data")
    with pytest.raises(UserError, match=r"written for other data.*\(shards, names\).*another run.dir"):
        keys_of(open_stream(pattern, tmp_path / "run"), 12, 13)
    (tmp_path / "data" / "6.tar").unlink()
    write(dict.fromkeys(sizes, 21), tmp_path / "data")
    with pytest.raises(UserError, match=r"shard \d.tar: has 2\d samples to train on, and had \d+ when this run"):
        keys_of(open_stream(pattern, tmp_path / "run"), 12, 13)


# ---------------------------------------------------------------------------------------------------------- lost shards
def test_a_shard_that_fails_is_tried_again(tmp_path: Path) -> None:
    sizes = dict.fromkeys(whole_names(12, 8), 12)
    pattern = write(sizes, "flaky://data")
    for name in sizes:
        Flaky.failing[name] = 2
    source = open_stream(pattern)
    assert sorted(by_epoch(source, 1)[0]) == trained_on(sizes)
    assert all(Flaky.fetched[name] == 3 for name in sizes)


def test_a_disk_that_fails_now_and_then_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict.fromkeys(whole_names(6, 4), 6)
    pattern = write(sizes, tmp_path / "data")
    scans: Iterator[int] = count()

    def scan(descriptor: int) -> ShardIndex:
        if next(scans) % 3:
            raise OSError(5, "Input/output error")
        return scan_shard(descriptor)

    monkeypatch.setattr(shards_module, "scan_shard", scan)
    assert sorted(by_epoch(open_stream(pattern), 1)[0]) == trained_on(sizes)
    scans = chain([1], repeat(2))
    with pytest.raises(BadSample, match=r"lost shard: Input/output error \(3 attempts\)"):
        _ = open_stream(pattern, buffer=1)[0]


def test_a_lost_shard_is_reported_with_its_size_and_read_in_the_next_epoch(tmp_path: Path) -> None:
    names = whole_names(12, 8)
    pattern = write(dict.fromkeys(names, 12), "flaky://data")
    source = open_stream(pattern, tmp_path / "run")
    name = source.shown[source.dealer.deal(1, 1)]
    Flaky.failing[name] = 10**6
    mixture = Mixture([(source, 1.0)], 5, batch=4)
    bad: list[tuple[str, str]] = []
    lost: list[int] = []
    drawn = [mixture.draw(p, lambda s: s.key, bad, lost.append) for p in range(96)]
    assert set(bad) == {(name, "lost shard: connection reset (3 attempts)")}
    assert lost == [11] * len(bad)  # as long as the others are
    in_epoch = [key for key in drawn if not key.startswith(name)]
    assert {key.split("/")[0] for key in in_epoch} == set(names) - {name}
    Flaky.failing.clear()
    resumed = Mixture([(open_stream(pattern, tmp_path / "run"), 1.0)], 5, batch=4)
    again = [resumed.draw(p, lambda s: s.key, []) for p in range(96)]
    assert again == drawn  # the shard is there again; the past stays as it was
    epochs = by_epoch(open_stream(pattern, tmp_path / "run"), 3)
    assert "lost" in epochs[0]
    assert sorted(epochs[2]) == trained_on(dict.fromkeys(names, 12))  # tried again, and read


def test_many_lost_shards_end_the_run_and_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "LOST_IN_A_ROW", 3)
    names = whole_names(12, 12)
    pattern = write(dict.fromkeys(names, 12), "flaky://data")
    alone = keys_of(open_stream(pattern, readers=2), 0, 40)
    (tmp_path / "cache" / "vlmoe").rename(tmp_path / "gone")
    run = open_stream(pattern, tmp_path / "run", readers=2)
    assert keys_of(run, 0, 4) == alone[:4]
    Flaky.failing.update(dict.fromkeys(names, 10**6))
    (tmp_path / "cache" / "vlmoe").rename(tmp_path / "gone too")
    with pytest.raises(UserError, match=r"3 in a row cannot be read; the last, s\d+.tar: connection reset"):
        keys_of(run, 4, 40)
    Flaky.failing.clear()
    assert keys_of(open_stream(pattern, tmp_path / "run", readers=2), 4, 40) == alone[4:]


def test_a_shard_that_vanishes_after_it_was_counted_moves_nothing(tmp_path: Path) -> None:
    sizes = dict.fromkeys(whole_names(12, 8), 12)
    pattern = write(sizes, tmp_path / "data")
    source = open_stream(pattern, tmp_path / "run")
    alone = keys_of(source, 0, 24)
    name = source.shown[source.dealer.deal(0, 1)]
    (tmp_path / "data" / name).rename(tmp_path / "elsewhere")
    reader = source.reader(0)
    reader.open.clear()
    k = next(k for k in range(24) if alone[k // 4 * READERS][k % 4].startswith(name))
    reader.stop = reader.start
    with pytest.raises(BadSample, match="cannot be read now: No such file"):
        source[k * READERS]
    (tmp_path / "elsewhere").rename(tmp_path / "data" / name)
    reader.stop = reader.start
    assert source[k * READERS].key == alone[k // 4 * READERS][k % 4]


def test_damaged_and_compressed_shards(tmp_path: Path) -> None:
    names = whole_names(12, 5)
    pattern = write(dict.fromkeys(names, 12), "memory://data")
    with fsspec.open(f"memory://data/{names[0]}", "wb") as file:
        file.write(shard(names[0], 12)[: 512 * 9])
    with fsspec.open(f"memory://data/{names[1]}", "wb") as file:
        file.write(b"\x1f\x8b" + bytes(2000))
    mixture = Mixture([(open_stream(pattern), 1.0)], 5, batch=4)
    bad: list[tuple[str, str]] = []
    for position in range(40):
        mixture.draw(position, lambda s: s.key, bad)
    reasons = dict(bad)
    assert "the last good key is 0003" in reasons[names[0]]
    assert reasons[names[1]] == "lost shard: compressed; a plain .tar file is needed"


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    name = whole_names(15, 1, "parquet")[0]
    whole = shard(name, 15)
    about = pq.read_metadata(io.BytesIO(whole)).row_group(1).column(0)
    start = about.dictionary_page_offset or about.data_page_offset
    broken = whole[:start] + b"\xff" * about.total_compressed_size + whole[start + about.total_compressed_size :]
    (tmp_path / "data" / name).write_bytes(broken)
    source = open_stream(str(tmp_path / "data" / name), readers=1)
    good, bad = set(), {}
    for k in range(15):
        try:
            good.add(source[k].text)
        except BadSample as error:
            bad[error.key] = error.reason
    assert {*bad} == {f"{name}:{i}" for i in range(5, 10)}
    assert all(reason.startswith("cannot be read: row group 1: ") for reason in bad.values())
    assert good == {f"{name} number {i}" for i in (*range(5), *range(10, 15))}


def test_parquet_files_of_a_stream_have_the_same_columns(tmp_path: Path) -> None:
    names = whole_names(12, 6, "parquet")
    pattern = write(dict.fromkeys(names, 12), tmp_path / "data")
    assert open_stream(pattern).understood() == ["text: column 'text', a text"]
    pq.write_table(pa.table({"words": ["a"] * 12}), tmp_path / "data" / names[3])
    with pytest.raises(UserError, match=rf"parquet .*{names[3]}: no column 'text'; there are words"):
        by_epoch(open_stream(pattern), 1)
    (tmp_path / "data" / names[3]).write_bytes(b"PAR1")
    assert by_epoch(open_stream(pattern), 1)[0].count("lost") == 1
    (tmp_path / "data" / names[0]).write_bytes(b"")
    with pytest.raises(UserError, match=rf"parquet .*{names[0]}: cannot be read"):
        open_stream(pattern)


def test_data_without_samples_are_refused(tmp_path: Path) -> None:
    source = open_stream(write({"a.tar": 0, "b.tar": 0}, tmp_path / "data"))
    with pytest.raises(UserError, match="no text samples to train on"):
        _ = source[0]


# ------------------------------------------------------------------------------------------------------------ resample
def test_resampling_draws_shards_by_weight(tmp_path: Path) -> None:
    sizes = dict.fromkeys(whole_names(4, 4), 4)
    often, never = islice(sizes, 2)
    pattern = write(sizes, tmp_path / "data")
    weights = {often: 3.0, never: 0.0, "s*": 1.0}
    source = open_stream(pattern, tmp_path / "run", read="resample", shard_weights=weights)
    dealt = Counter(source.shown[source.dealer.deal(r, t)] for r in range(READERS) for t in range(500))
    assert dealt[never] == 0
    assert abs(dealt[often] / 2000 - 3 / 5) < 0.05
    drawn = keys_of(source, 0, 40)
    assert drawn == keys_of(open_stream(pattern, read="resample", shard_weights=weights), 0, 40)
    each = Counter(chain(*drawn))
    assert min(each.values()) >= 1 and not any(key.startswith(never) for key in each)
    reader = source.reader(0)
    turns = Counter(reader.locate(k)[0] for k in range(40))
    assert set(turns.values()) == {4}  # a shard that is drawn is read whole


def test_weights_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    config = SourceConfig("shards", "text", "p", read="resample", shard_weights={"b*": 1.0})
    with pytest.raises(UserError, match=r"no shard's name fits 'b\*' of shard_weights"):
        shard_weights(["x/a.tar"], config)
    config.shard_weights = {"a*": 0.0}
    with pytest.raises(UserError, match="leaves nothing to draw"):
        shard_weights(["x/a.tar"], config)
    config.shard_weights = {"x/*": 2.0, "a*": 5.0}
    assert shard_weights(["x/a.tar", "y/a.tar"], config).tolist() == [2.0, 5.0]


def test_dealing_never_overlaps() -> None:
    for shards, readers in ((1, 1), (5, 8), (40, 8), (33, 4)):
        dealer = Dealer(shards, readers, 3)
        dealt = [(dealer.epoch(r, t), dealer.deal(r, t)) for r in range(readers) for t in range(3 * shards)]
        for epoch in range(3 * shards * readers // shards - 1):
            assert sorted(s for e, s in dealt if e == epoch) == list(range(shards))


@pytest.mark.parametrize(
    ("files", "readers", "said"),
    [
        (1, 1, ""),
        (8, 8, ""),
        (24, 8, ""),
        (33, 8, ""),
        (1, 4, "1 file is too few for 4 readers .* up to 4 read the same file .* data.stream.readers = 1,"),
        (3, 8, "3 files are too few for 8 readers .* up to 3 read the same file .*readers = 3, .* 32 files or more"),
        (12, 8, "12 files cannot be dealt evenly to 8 readers .* data.stream.readers = 6, .* or as a multiple of 8"),
        (31, 8, "31 files cannot .* data.stream.readers = 7,"),
        (13, 8, "13 files cannot .* data.stream.readers = 3,"),
    ],
)
def test_files_that_cannot_be_dealt_evenly_are_said(files: int, readers: int, said: str) -> None:
    found = uneven(files, readers)
    assert len(found) == bool(said) and all(re.search(said, line) for line in found)
    if "same file" in said:
        together = [Counter(Dealer(files, readers, key).deal(r, 0) for r in range(readers)) for key in range(20)]
        assert max(max(count.values()) for count in together) == -(-readers // files)


@pytest.mark.parametrize("type", ["shards", "parquet"])
def test_samples_come_with_images_as_random_access_gives_them(tmp_path: Path, type: str) -> None:
    from tests.data.test_files import SIZE, pairs, write_tar
    from tests.data.test_tables import hub_table

    path = tmp_path / ("a.tar" if type == "shards" else "a.parquet")
    if type == "shards":
        write_tar(path, pairs(0, 30))
    else:
        pq.write_table(hub_table(0, 30), path, row_group_size=7)
    options = FileOptions("pair", str(path), "train", SIZE)
    whole = open_files(type, FileOptions("pair", options.path, "all", SIZE))
    random = {sample.key: sample for sample in (whole[i] for i in range(30))}
    config = SourceConfig(type, "pair", options.path, read="stream")
    source = StreamSource(options, config, StreamConfig(readers=2, buffer=8), 0, 0)

    def same(one: Sample, two: Sample) -> bool:
        return one.text == two.text and np.array_equal(one.image, two.image)  # type: ignore[arg-type]

    drawn = list(_first(source, 20))
    assert len({s.key for s in drawn}) > 10
    assert all(same(sample, random[sample.key]) for sample in drawn)


def _first(source: StreamSource, number: int) -> Iterator[Sample]:
    return (source[k * source.readers] for k in range(number))
