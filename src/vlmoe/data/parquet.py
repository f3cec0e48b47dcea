"""Samples in parquet files: those of Hugging Face's hub, or anybody's.

Parquet is read a row group at a time, so one sample costs its whole group. Two things keep that bearable: the groups
used last are kept in memory up to a limit, and an epoch's order (`order`) shuffles the groups, then the samples within
a window of groups that fits that memory. Every sample still comes exactly once.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmoe.config import UserError
from vlmoe.data.accounts import Account, account_of_files, shown_below
from vlmoe.data.columns import Columns
from vlmoe.data.counter import hash64, shuffled
from vlmoe.data.files import FileOptions, FileSource, Parts, hash_entries, split_rows
from vlmoe.data.sample import BadSample
from vlmoe.data.table_files import expand_tables, roots_of

WINDOW_BYTES = 1 << 28  # of decoded row groups kept in memory, in each worker; one group is kept whatever its size


class ParquetSource(FileSource):
    """Rows of parquet files; `columns` says in which forms they hold image, text and codes.

    Raises UserError when a file is no parquet file, lacks a column, has it in a form that is not read, or all of them
    are empty.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self.paths = expand_tables(options.path, ".parquet")
        self.columns = Columns(self._about(self.paths[0]).schema.to_arrow_schema(), options, f"parquet {self.paths[0]}")
        self.shown = shown_below(self.paths)
        groups: list[tuple[int, int, int, int]] = []  # file, group in it, rows, bytes
        hashes = [np.zeros(0, dtype=np.uint64)]
        for number, path in enumerate(self.paths):
            about = self._about(path)
            self.columns.check_same(about.schema.to_arrow_schema(), f"parquet {path}")
            for g in range(about.num_row_groups):
                group = about.row_group(g)
                groups.append((number, g, group.num_rows, group.total_byte_size))
            hashes.append(hash_entries(path.name, about.num_rows))
        self.groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.starts = np.concatenate([[0], np.cumsum(self.groups[:, 2])])
        if not self.starts[-1]:
            raise UserError(f"parquet {options.path}: no rows")
        self.rows = split_rows(np.concatenate(hashes), options.split, options.held_out)
        self.firsts = np.searchsorted(self.rows, self.starts)  # of each group, counted in rows of the split
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._order: tuple[int, Any] = (-1, None)  # of the epoch asked for last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _about(self, path: Path) -> pq.FileMetaData:
        try:
            return pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"parquet {path}: cannot be read: {error}") from None

    def understood(self) -> list[str]:
        return self.columns.understood()

    def _locate(self, row: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        return group, row - int(self.starts[group])

    def key(self, row: int) -> str:
        group, _ = self._locate(row)
        file = int(self.groups[group, 0])
        first = int(self.starts[np.searchsorted(self.groups[:, 0], file)])
        return f"{self.shown[file]}:{row - first}"

    def account(self) -> Account:
        return account_of_files(self.options.path, self.paths, ".parquet")

    def read(self, row: int, image: bool) -> Parts:
        group, place = self._locate(row)
        key = self.key(row)
        try:
            table = self._table(group, image)
            values = {name: table.column(name)[place] for name in table.column_names}
            return self.columns.parts(values, key, roots_of(self.options, self.paths[self.groups[group, 0]]), image)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadSample(key, f"cannot be read: {error}") from None

    def _table(self, group: int, image: bool) -> pa.Table:
        """A row group from memory or disk. Reading texts alone (to train a tokenizer) is not cached."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, number = self.groups[group, :2].tolist()
        columns = [c.name for part, c in self.columns.found.items() if image or part == "text"]
        with pq.ParquetFile(self.paths[file]) as parquet:
            table = parquet.read_row_group(number, columns=columns, use_threads=False)
        if image or self.kind == "text":
            self._cache[group] = table
            while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > WINDOW_BYTES:
                self._cache.popitem(last=False)
        return table

    def order(self, nth: int, key: int) -> int:
        """Element `nth` of the epoch chosen by `key`: a permutation of all rows of the split, kind to row groups."""
        groups, starts, windows = self._epoch(key)
        w = int(np.searchsorted(windows, nth, side="right")) - 1
        first, stop = int(windows[w]), int(windows[w + 1])
        place = first + shuffled(nth - first, stop - first, hash64("window", key, w))
        g = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self.firsts[groups[g]]) + place - int(starts[g])

    def _epoch(self, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups in the epoch's order, where each starts, and where each window of groups starts (with the end)."""
        if self._order[0] == key:
            return self._order[1]
        n = len(self.groups)
        groups = np.array([shuffled(i, n, hash64("groups", key)) for i in range(n)], dtype=np.int64)
        groups = groups[np.diff(self.firsts)[groups] > 0]
        starts = np.concatenate([[0], np.cumsum(np.diff(self.firsts)[groups])])
        windows, held = [0], 0
        for size, start in zip(self.groups[groups, 3].tolist(), starts.tolist(), strict=False):
            if held and held + size > WINDOW_BYTES:
                windows.append(start)
                held = 0
            held += size
        result = groups, starts, np.array([*windows, starts[-1]], dtype=np.int64)
        self._order = key, result
        return result
