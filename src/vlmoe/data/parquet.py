"""Samples in parquet files: those of Hugging Face's hub, or anybody's.

Parquet is read a row group at a time, so one sample costs its whole group. Where files are read at random two things
keep that bearable: the groups used last are kept in memory up to a limit, and an epoch's order (`order`) shuffles the
groups, then the samples within a window of groups that fits that memory. Every sample still comes exactly once. Where
they are read as a stream, a file's columns are unpacked on disk while its samples are in use.
"""

from __future__ import annotations

import functools
import mmap
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmoe.config import UserError
from vlmoe.data.accounts import Account, account_of_files
from vlmoe.data.columns import Columns
from vlmoe.data.counter import hash64, shuffled
from vlmoe.data.fetch import FileList, Files, OpenFile
from vlmoe.data.files import FileOptions, FileSource, Parts, chosen_rows, hash_entries, is_held_out, split_rows
from vlmoe.data.sample import BadSample
from vlmoe.data.table_files import expand_tables, roots_of
from vlmoe.data.urls import FetchError, Stat, file_name, persist, shown_names, without_query

WINDOW_BYTES = 1 << 28  # of decoded row groups kept in memory, in each worker; one group is kept whatever its size


class ParquetSource(FileSource):
    """Rows of parquet files; `columns` says in which forms they hold image, text and codes.

    files: their names, instead of those that the options' path stands for; of few, none may be held out.

    Raises UserError when a file is no parquet file, lacks a column, has it in a form that is not read, or all of them
    are empty; likewise when files cannot be had, or those of URLs together exceed what is kept of such files.
    """

    def __init__(self, options: FileOptions, files: list[str] | None = None) -> None:
        super().__init__(options)
        listed: dict[str, Stat] = {}
        self.names = files or expand_tables(options.path, ".parquet", listed)
        self.files = FileList(self.names, options.fetch, "parquet", listed)
        self.shown = shown_names(self.names)
        groups: list[tuple[int, int, int, int]] = []  # file, group in it, rows, bytes
        hashes = [np.zeros(0, dtype=np.uint64)]
        for number, file in enumerate(self.files.bring(bounded=files is None)):
            where = f"parquet {without_query(self.names[number])}"
            about = self._about(file, where)
            if not number:
                self.columns = Columns(about.schema.to_arrow_schema(), options, where)
            self.columns.check_same(about.schema.to_arrow_schema(), where)
            for g in range(about.num_row_groups):
                group = about.row_group(g)
                groups.append((number, g, group.num_rows, group.total_byte_size))
            hashes.append(hash_entries(file_name(self.names[number]), about.num_rows))
        self.groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.starts = np.concatenate([[0], np.cumsum(self.groups[:, 2])])
        if not self.starts[-1]:
            raise UserError(f"parquet {options.path}: no rows")
        hash_N, share = np.concatenate(hashes), options.held_out
        if files is None:
            self.rows = split_rows(hash_N, options.split, share)
        else:
            self.rows = chosen_rows(is_held_out(hash_N, share), options.split)
        self.firsts = np.searchsorted(self.rows, self.starts)  # of each group, counted in rows of the split
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._order: tuple[int, Any] = (-1, None)  # of the epoch asked for last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _about(self, file: OpenFile, where: str) -> pq.FileMetaData:
        try:
            return pq.read_metadata(file.reader())
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{where}: cannot be read: {error}") from None

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
        return account_of_files(self.options.path, [Path(name) for name in self.names], ".parquet")

    def read(self, row: int, image: bool) -> Parts:
        group, place = self._locate(row)
        key = self.key(row)
        try:
            table = self._table(group, image)
            values = {name: table.column(name)[place] for name in table.column_names}
            return self.columns.parts(values, key, roots_of(self.options, self.names[self.groups[group, 0]]), image)
        except (pa.ArrowException, OSError, UnicodeDecodeError, FetchError) as error:
            raise BadSample(key, f"cannot be read: {error}") from None

    def _table(self, group: int, image: bool) -> pa.Table:
        """A row group from memory or disk. Reading texts alone (to train a tokenizer) is not cached."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, number = self.groups[group, :2].tolist()
        columns = [c.name for part, c in self.columns.found.items() if image or part == "text"]
        with pq.ParquetFile(self.files[file].reader()) as parquet:
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


def columns_of(file: str, files: Files, options: FileOptions) -> Columns:
    """The columns of a file. Raises UserError: it cannot be had, or lacks one."""
    name = f"parquet {without_query(file)}"
    try:
        return Columns(pq.read_schema(files.open(file).reader()), options, name)
    except (pa.ArrowException, OSError, FetchError) as error:
        raise UserError(f"{name}: cannot be read: {error}") from None


class OpenTable:
    """A parquet file at hand, its rows in any order: as row groups are costly to read again, and many to keep in
    memory, the columns that are wanted are unpacked into an Arrow file, which has no name and ends with this object.

    folder: where that lies. Rows of a row group that cannot be read are bad samples.

    Raises OSError and ArrowException where nothing can be read, UserError where the columns are not as in other files.
    """

    def __init__(self, file: OpenFile, name: str, columns: Columns, folder: Path) -> None:
        self.name, self.columns = name, columns
        options, names = columns.options, columns.names
        with pq.ParquetFile(file.reader()) as parquet, tempfile.TemporaryFile(dir=folder) as out:
            columns.check_same(parquet.schema_arrow, f"parquet {without_query(name)}")
            rows = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            self.ends = np.cumsum(rows, dtype=np.int64)
            schema = pa.schema([parquet.schema_arrow.field(column) for column in names])
            self.damage: dict[int, str] = {}  # row group -> why it cannot be read
            with pa.ipc.new_stream(out, schema) as writer:
                for group in range(len(rows)):
                    read = functools.partial(parquet.read_row_group, group, names, use_threads=False)
                    try:
                        table = persist(read, options.fetch.attempts)
                    except FetchError as error:
                        self.damage[group] = str(error)
                    else:
                        writer.write_table(table.select(names))
            out.flush()
            mapped = mmap.mmap(out.fileno(), 0, access=mmap.ACCESS_READ)
        self.table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
        whole = [0 if group in self.damage else count for group, count in enumerate(rows)]
        self.before = np.cumsum([0, *whole])  # rows that are at hand before each row group

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def key(self, row: int, shown: str) -> str:
        """shown: what the file is called in keys."""
        return f"{shown}:{row}"

    def read(self, row: int, key: str, image: bool) -> Parts:
        """Raises BadSample."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        if group in self.damage:
            raise BadSample(key, f"cannot be read: row group {group}: {self.damage[group]}")
        place = row - (int(self.ends[group - 1]) if group else 0) + int(self.before[group])
        values = {name: self.table.column(name)[place] for name in self.table.column_names}
        try:
            return self.columns.parts(values, key, roots_of(self.columns.options, self.name), image)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadSample(key, f"cannot be read: {error}") from None
