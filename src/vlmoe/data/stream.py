"""Shards read one after another, for data too large to index: `read: stream` and `read: resample`.

A shard is a WebDataset .tar file or a parquet file.

What a run reads is a function of the recipe and of the micro-batch's number here too, as with random access. So no
reader has a state that must be saved, any number of workers or ranks gives the same batches, and a run resumes, or goes
back, at any step. In detail:

- The data are `readers` logical streams. Micro-batch n takes samples of reader n mod readers, the next ones of its
  stream. (Workers that divide the readers then share no shard; others give the same batches and open more shards.)
- A reader takes shards in turns. In epochs, all shards are shuffled epoch by epoch and written in a row, and the turns
  of reader r are places r, r + readers, r + 2 readers, ... of it: no shard is dealt twice in an epoch, none is left
  out, and no reader is ever more than one shard ahead of another. Resampling, each turn draws a shard with replacement.
- A shard is brought whole and opened when its turn comes. Its samples stand in the stream in its own order; those held
  out are passed over.
- The stream is cut into blocks of `buffer` samples (fewer where an epoch ends), and each block is shuffled. A buffer
  that is refilled sample by sample mixes a little better, but what it holds follows from all that went before; a block
  follows from its number. It holds no samples, only places in shards that are on disk.

What a position in a stream means depends on the numbers of samples in the shards before it. These are known once a
shard has been read, and kept in a ledger in the run's folder: resuming needs the shards of one block, no others.
Without the ledger the earlier shards are read through again, to the same end.

A sample that cannot be used keeps its place, so that it moves no other; another one near it is drawn instead.
A shard that cannot be had, after all attempts, takes one place, is reported in it with the number of samples that
shards have on average, and is tried again at its next turn. The ledger keeps that too. When several in a row are lost
the run ends: resumed, it tries the same ones again.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlmoe.config import SourceConfig, StreamConfig, UserError
from vlmoe.data.augment import Views
from vlmoe.data.counter import hash64, shuffled
from vlmoe.data.dealer import Dealer, shard_weights, uneven
from vlmoe.data.fetch import Ahead, Files, OpenFile
from vlmoe.data.files import FileOptions, FileSource, Parts, choose_caption, make_sample
from vlmoe.data.ledger import Ledger, Turn
from vlmoe.data.parquet import OpenTable, ParquetSource, columns_of
from vlmoe.data.rows import rows_of_file
from vlmoe.data.sample import ENDLESS, BadSample, Sample
from vlmoe.data.shards import OpenShard, ShardSource, expand_shards
from vlmoe.data.table_files import expand_tables
from vlmoe.data.urls import FetchError, Stat, file_name, is_url, persist, shown_names, without_query

LOST_IN_A_ROW = 8  # shards that a reader may lose one after the other
FEW = 64  # samples of a block that may all be bad
HELD_OUT_SAMPLES = 1024  # of a stream, about so many are evaluated on


class Shard(Protocol):
    """A shard at hand, its entries in any order."""

    def __len__(self) -> int: ...

    def key(self, entry: int, shown: str) -> str:
        """shown: what the shard is called in keys."""
        ...

    def read(self, entry: int, key: str, image: bool) -> Parts:
        """The raw parts of an entry, the image only if asked for. Raises BadSample."""
        ...


@dataclass
class Opened:
    """rows: the shard's entries that belong to the split."""

    shard: Shard
    rows: np.ndarray


class Reader:
    """One logical stream. Position k is the k-th sample it gives; all methods may be called for any k."""

    def __init__(self, source: StreamSource, number: int) -> None:
        self.source, self.number = source, number
        path = source.record and source.record / f"{source.id}-{number}.jsonl"
        self.ledger = Ledger(path, source.about)
        self.ends: list[int] = []  # where each turn's entries end, counted in the stream
        self.epochs = [0]  # where each epoch begins that has begun, likewise
        self.pending: list[Turn] = []  # turns that are not in the ledger yet
        self.start = self.stop = self.key = 0  # of the block at hand
        self.open: dict[int, Opened] = {}  # by turn, of that block
        self.failed: dict[int, str] = {}  # turns of it whose shard was had before, and not now
        self.ahead: tuple[int, Ahead] | None = None
        self._follow()

    # --------------------------------------------------------------------------------------------------- positions
    def locate(self, k: int) -> tuple[int, int]:
        """(turn, entry in it) of a position."""
        self.block(k)
        place = self.start + shuffled(k - self.start, self.stop - self.start, self.key)
        turn = bisect_right(self.ends, place)
        return turn, place - (self.ends[turn - 1] if turn else 0)

    def block(self, k: int) -> tuple[int, int]:
        """First position of the block that holds a position, and the first behind it."""
        if self.start <= k < self.stop:
            return self.start, self.stop
        size = self.source.stream.buffer
        while True:
            self._count(k + 1)
            epoch = bisect_right(self.epochs, k) - 1
            first = self.epochs[epoch]
            start = first + (k - first) // size * size
            self._count(start + size, epoch + 1)
            if self._agree():
                break
        self.start, self.stop = start, min(start + size, self.ends[-1], *self.epochs[epoch + 1 : epoch + 2])
        self.key = hash64("block", self.source.key, self.number, start)
        turns = range(bisect_right(self.ends, start), bisect_right(self.ends, self.stop - 1) + 1)
        self.open = {turn: shard for turn, shard in self.open.items() if turn in turns}
        self.failed = {}
        return self.start, self.stop

    def _count(self, until: int, epoch: int | None = None) -> None:
        """Look into the next shards until so many entries are known, or all before the epoch of this number."""
        empty = 0
        while (self.ends[-1] if self.ends else 0) < until and (epoch is None or len(self.epochs) <= epoch):
            turn = self._look(len(self.ends))
            empty = 0 if turn.entries else empty + 1
            if empty > 2 * len(self.source.shards):
                raise UserError(f"{self.source.type} {self.source.name}: no {self.source.kind} samples to train on")
            self.pending.append(turn)
            lost = self.pending[-LOST_IN_A_ROW:]
            if len(lost) == LOST_IN_A_ROW and all(turn.lost for turn in lost):
                self._forget()
                raise UserError(
                    f"{self.source.type} {self.source.name}: {LOST_IN_A_ROW} in a row cannot be read; the last, "
                    f"{turn.shard}: {turn.lost}. The run can be resumed when they can"
                )
            self._add(turn)
            behind = [n for n in self.open if self.ends[n] <= until - 2 * self.source.stream.buffer]
            for n in behind:  # no block near `until` has a sample of it
                del self.open[n]

    def _look(self, number: int) -> Turn:
        shard = self.source.dealer.deal(self.number, number)
        name = self.source.shown[shard]
        try:
            self.open[number] = self._bring(number)
        except FetchError as error:
            return Turn(name, 1, str(error))
        return Turn(name, len(self.open[number].rows))

    def _add(self, turn: Turn) -> None:
        self.ends.append((self.ends[-1] if self.ends else 0) + turn.entries)
        epoch = self.source.dealer.epoch
        if epoch(self.number, len(self.ends)) != epoch(self.number, len(self.ends) - 1):
            self.epochs.append(self.ends[-1])

    def _follow(self) -> None:
        for turn in self.ledger.turns[len(self.ends) :]:
            self._add(turn)

    def _forget(self) -> None:
        self.pending, self.ends, self.epochs = [], [], [0]
        self._follow()

    def _agree(self) -> bool:
        """Write down what was found, before anything that follows from it is given away. False where another process
        found something else before."""
        before = len(self.ledger.turns)
        if not self.pending:
            return True
        known = [turn.entries for turn in (*self.ledger.turns, *self.pending) if not turn.lost]
        mean = max(1, round(sum(known) / len(known))) if known else 1
        pending = [replace(turn, samples=mean) if turn.lost else turn for turn in self.pending]
        self.ledger.add(pending)
        agreed = self.ledger.turns[before : before + len(pending)] == pending
        if agreed:
            self.pending = []
            self._follow()
        else:
            self._forget()
        return agreed

    # ---------------------------------------------------------------------------------------------------- samples
    def read(self, k: int, image: bool) -> tuple[Parts, str, int]:
        """The raw parts of the sample at a position, its key, and a number that grows with every reading.

        Raises BadSample, and UserError when a shard has changed.
        """
        turn, place = self.locate(k)
        about = self.ledger.turns[turn]
        if about.lost:
            raise BadSample(about.shard, f"lost shard: {about.lost}", about.samples)
        opened = self._opened(turn, about)
        row = int(opened.rows[place])
        key = opened.shard.key(row, about.shard)
        parts = opened.shard.read(row, key, image)
        epoch = self.source.dealer.epoch(self.number, turn)
        return parts, key, row + (epoch if self.source.dealer.until is None else turn)

    def _opened(self, turn: int, about: Turn) -> Opened:
        if turn in self.failed:
            raise BadSample(about.shard, self.failed[turn])
        if turn not in self.open:
            try:
                self.open[turn] = self._bring(turn)
            except FetchError as error:
                self.failed[turn] = f"a shard that was read before cannot be read now: {error}"
                raise BadSample(about.shard, self.failed[turn]) from None
        found = len(self.open[turn].rows)
        if found != about.entries:
            raise UserError(
                f"shard {about.shard}: has {found} samples to train on, and had {about.entries} when this run read it "
                "first: it has changed, and with it what comes next"
            )
        return self.open[turn]

    def _bring(self, turn: int) -> Opened:
        name = self.source.shards[self.source.dealer.deal(self.number, turn)]
        if self.ahead is not None and self.ahead[0] == turn:
            file = self.ahead[1].take()
        else:
            file = self.source.files.open(name)
        following = self.source.shards[self.source.dealer.deal(self.number, turn + 1)]
        worker = multiprocessing.current_process().daemon  # no fork will break a thread of its
        if worker and is_url(following) and (self.ahead is None or self.ahead[0] <= turn):
            self.ahead = turn + 1, Ahead(self.source.files, following)
        shard = persist(lambda: self.source.make(file, name), self.source.options.fetch.attempts, (FetchError,))
        options = self.source.options
        return Opened(shard, rows_of_file(file_name(name), len(shard), options.split, options.held_out))


class StreamSource:
    """Samples of shards as streams. Sample number k of reader r has the index k * readers + r.

    number: the source's, in the recipe. record: the folder of the ledgers; None keeps them in memory.

    Raises UserError when the pattern stands for no shard, all have the weight 0, or the first of parquet files cannot
    be had or lacks a column.
    """

    def __init__(
        self,
        options: FileOptions,
        config: SourceConfig,
        stream: StreamConfig,
        seed: int,
        number: int,
        record: Path | None = None,
    ) -> None:
        self.options, self.stream, self.record = options, stream, record
        self.kind, self.name, self.id = options.kind, options.path, f"{options.kind}-{number}"
        self.readers = stream.readers
        self.type = config.type
        listed: dict[str, Stat] = {}
        self.shards = expand(options.path, self.type, listed)
        self.files = Files(options.fetch, listed)
        self.columns = columns_of(self.shards[0], self.files, options) if self.type == "parquet" else None
        self.shown = shown_names(self.shards)
        self.key = hash64("stream", seed, options.kind, number)
        until = np.cumsum(shard_weights(self.shards, config)) if config.read == "resample" else None
        self.dealer = Dealer(len(self.shards), self.readers, self.key, until)
        digest = hashlib.blake2b("\n".join(map(without_query, self.shards)).encode(errors="surrogateescape"))
        self.about = {"path": without_query(options.path), "shards": len(self.shards), "names": digest.hexdigest()[:32],
                      "read": config.read, "shard_weights": dict(config.shard_weights), "readers": self.readers,
                      "seed": seed, "split": options.split, "held_out": options.held_out}  # fmt: skip
        self._readers: dict[int, Reader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def __len__(self) -> int:
        return ENDLESS

    def make(self, file: OpenFile, name: str) -> Shard:
        """What reads the entries of a shard that has been brought."""
        if self.columns is None:
            return OpenShard(file, self.options)
        return OpenTable(file, name, self.columns, self.files.made_folder())

    def understood(self) -> list[str]:
        """As of `FileSource`."""
        return self.columns.understood() if self.columns is not None else []

    def warnings(self) -> list[str]:
        """For people: that there are too few files for the readers, and what to do."""
        return [] if self.dealer.until is not None else uneven(len(self.shards), self.readers)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index, 0)

    def draw(self, index: int, epoch: int, views: Views | None = None) -> Sample:
        """A sample; the epoch follows from the index. views: as of `make_sample`."""
        parts, key, number = self._read(index, image=self.kind != "text")
        return make_sample(parts, key, self.options, number, views)

    def text(self, index: int) -> str:
        """The text alone, without reading the image."""
        parts, key, number = self._read(index, image=False)
        return choose_caption(parts.captions, key, number, self.options.turns)[0]

    def instead(self, index: int, pick: int) -> int:
        """Another index of the same block, or of the next ones where it is short. pick: any number, to choose by."""
        k, reader = divmod(index, self.readers)
        start, stop = self.reader(reader).block(k)
        return (start + pick % max(stop - start, FEW)) * self.readers + reader

    def reader(self, number: int) -> Reader:
        if number not in self._readers:
            self._readers[number] = Reader(self, number)
        return self._readers[number]

    def _read(self, index: int, image: bool) -> tuple[Parts, str, int]:
        k, reader = divmod(index, self.readers)
        return self.reader(reader).read(k, image)


def expand(pattern: str, type: str, listed: dict[str, Stat] | None = None) -> list[str]:
    """The files that a pattern stands for. type: shards, parquet or arrow. listed: as of `expand_url`. Raises
    UserError."""
    return expand_shards(pattern, listed) if type == "shards" else expand_tables(pattern, f".{type}", listed)


def held_out_of_stream(options: FileOptions, type: str) -> FileSource:
    """The held-out samples of a stream that are evaluated on, by random access: those of its first shards, so many of
    them as would hold about HELD_OUT_SAMPLES if all were like the first."""
    opened: Callable[[FileOptions, list[str]], FileSource] = ShardSource if type == "shards" else ParquetSource
    shards = expand(options.path, type)
    first = opened(options, shards[:1])
    wanted = -(-HELD_OUT_SAMPLES // max(1, len(first)))
    return opened(options, shards[:wanted]) if wanted > 1 else first
