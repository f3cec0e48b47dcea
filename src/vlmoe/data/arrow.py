"""Samples in Arrow files: what `datasets` saves with `save_to_disk`, or any Arrow IPC stream or file.

A file is mapped into memory, not read: only its batches' heads are looked at when it is opened, and rows are read where
they lie. So access is random, and workers share what the system keeps of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlmoe.config import UserError
from vlmoe.data.accounts import Account, account_of_files, shown_below
from vlmoe.data.columns import Columns
from vlmoe.data.files import FileOptions, FileSource, Parts, hash_entries, split_rows
from vlmoe.data.sample import BadSample
from vlmoe.data.table_files import expand_tables, roots_of

_MAGIC = b"ARROW1"  # a file's first bytes; a stream has none
_END = b"\xff\xff\xff\xff\0\0\0\0"  # a finished stream's last bytes


class ArrowSource(FileSource):
    """Rows of Arrow files; `columns` says in which forms they hold image, text and codes.

    Raises UserError when a file is no Arrow file or cut off, lacks a column, has it in a form that is not read, or all
    of them are empty.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self.paths = [Path(name) for name in expand_tables(options.path, ".arrow")]
        self.shown = shown_below(self.paths)
        self._tables: dict[int, pa.Table] = {}
        counts, hashes = [], []
        for number, path in enumerate(self.paths):
            table = open_table(path)
            if not number:
                self.columns = Columns(table.schema, options, f"arrow {path}")
            self.columns.check_same(table.schema, f"arrow {path}")
            counts.append(table.num_rows)
            hashes.append(hash_entries(path.name, table.num_rows))
        self.starts = np.cumsum([0, *counts])
        if not self.starts[-1]:
            raise UserError(f"arrow {options.path}: no rows")
        self.rows = split_rows(np.concatenate(hashes), options.split, options.held_out)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _locate(self, row: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return file, row - int(self.starts[file])

    def key(self, row: int) -> str:
        file, place = self._locate(row)
        return f"{self.shown[file]}:{place}"

    def account(self) -> Account:
        return account_of_files(self.options.path, self.paths, ".arrow")

    def understood(self) -> list[str]:
        return self.columns.understood()

    def read(self, row: int, image: bool) -> Parts:
        file, place = self._locate(row)
        key = self.key(row)
        if file not in self._tables:
            self._tables[file] = open_table(self.paths[file]).select(self.columns.names)
        try:
            one = self._tables[file].slice(place, 1)
            one.validate(full=True)  # what is mapped was written by anyone: offsets may lead anywhere
            values = {name: one.column(name)[0] for name in one.column_names}
            return self.columns.parts(values, key, roots_of(self.options, str(self.paths[file])), image)
        except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
            raise BadSample(key, f"cannot be read: {error}") from None


def open_table(path: Path) -> pa.Table:
    """All batches of an Arrow stream or file, mapped into memory. Raises UserError."""
    try:
        mapped = pa.memory_map(str(path))
        if mapped.read_at(len(_MAGIC), 0) == _MAGIC:
            return pa.ipc.open_file(mapped).read_all()
        size = mapped.size()
        if mapped.read_at(8, max(0, size - 8)) != _END:
            raise UserError(f"arrow {path}: no Arrow file, or cut off: a finished stream ends with a mark")
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"arrow {path}: cannot be read: {error}") from None
