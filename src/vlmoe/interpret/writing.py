"""The files of a recording, written row group by row group.

Shape suffixes: M recorded rows of a batch · K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmoe.interpret.coding import Coded
from vlmoe.interpret.recording import PLAIN, ROUTING, TOKENS

ROWS = 1 << 15  # tokens of a row group: what is held in memory, twice


@dataclass
class TokenRows:
    """The recorded tokens of a batch. words: column -> its values; all but "position"."""

    position_M: np.ndarray
    words: dict[str, Coded]


@dataclass
class SiteRows:
    """The recorded decisions of one site in a batch. token_M: rows of the token table. Fillers have gate 0 and are not
    kept."""

    token_M: np.ndarray
    expert_MK: np.ndarray
    gate_MK: np.ndarray
    kept_MK: np.ndarray
    entropy_M: np.ndarray


class Writer:
    """Gathers rows and writes them in row groups, by one thread of its own, at most one group ahead."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens: list[TokenRows] = []
        self.routed: dict[int, list[SiteRows]] = {}
        self.held = 0
        self.parts: list[tuple[Path, pq.ParquetWriter]] = []  # of the tokens; a new one for each new set of factors
        self.routing: pq.ParquetWriter | None = None
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def add(self, tokens: TokenRows, routed: dict[int, SiteRows]) -> None:
        self.tokens.append(tokens)
        for number, rows in routed.items():
            self.routed.setdefault(number, []).append(rows)
        self.held += len(tokens.position_M)
        if self.held >= ROWS:
            self._flush()

    def close(self, whole: bool) -> None:
        """whole: False when the recording is given up."""
        try:
            if whole:
                self._flush()
                self._wait()
        finally:
            self.pool.shutdown()
            for _, writer in self.parts:
                writer.close()
            if self.routing is not None:
                self.routing.close()
        if whole:
            self._join_parts()

    def _flush(self) -> None:
        self._wait()
        tokens, routed = self.tokens, self.routed
        self.tokens, self.routed, self.held = [], {}, 0
        self.pending = self.pool.submit(self._write, tokens, routed)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _write(self, tokens: list[TokenRows], routed: dict[int, list[SiteRows]]) -> None:
        if tokens:
            have = self.parts[-1][1].schema.names if self.parts else [*PLAIN]
            names = list(dict.fromkeys([*have, *(name for rows in tokens for name in rows.words)]))
            table = _token_table(tokens, names)
            if not self.parts or names != have:
                path = self.folder / f"{len(self.parts)}-{TOKENS}"
                self.parts.append((path, _open(path, table.schema)))
            self.parts[-1][1].write_table(table, row_group_size=max(1, len(table)))
        for number in sorted(routed):  # a row group holds one site, so that a site can be read alone
            table = _site_table(number, routed[number])
            if self.routing is None:
                self.routing = _open(self.folder / ROUTING, table.schema)
            self.routing.write_table(table, row_group_size=max(1, len(table)))

    def _join_parts(self) -> None:
        """One file of tokens with the columns of the last part, which has all; empty files where nothing came."""
        target = self.folder / TOKENS
        if len(self.parts) == 1:
            self.parts[0][0].rename(target)
        else:
            schema = self.parts[-1][1].schema if self.parts else _token_table([], PLAIN).schema
            with _open(target, schema) as writer:
                for path, _ in self.parts:
                    with pq.ParquetFile(path) as part:
                        for group in range(part.num_row_groups):
                            table = _completed(part.read_row_group(group), schema)
                            writer.write_table(table, row_group_size=max(1, len(table)))
                    path.unlink()
        if self.routing is None:
            _open(self.folder / ROUTING, _site_table(0, []).schema).close()


def _open(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Words read back as plain strings. Of statistics only the site's are of use, to find its row groups; numbers that
    hardly repeat are told by their differences or their bytes, not by a dictionary."""
    if "site" not in schema.names:
        return pq.ParquetWriter(path, schema, store_schema=False, write_statistics=False)
    floats = ("gates.list.element", "entropy")
    return pq.ParquetWriter(
        path, schema, store_schema=False, write_statistics=["site"], use_dictionary=["site", "experts.list.element"],
        column_encoding={"token": "DELTA_BINARY_PACKED", **dict.fromkeys(floats, "BYTE_STREAM_SPLIT")},
    )  # fmt: skip


def _token_table(rows: list[TokenRows], names: Iterable[str]) -> pa.Table:
    """names: the columns wanted; a factor that some of the rows lack is "" for them."""
    columns = {}
    for name in names:
        if name == "position":
            values = [r.position_M for r in rows] or [np.zeros(0)]
            columns[name] = pa.array(np.concatenate(values).astype(np.int32))
        else:
            columns[name] = _dictionary([r.words.get(name, len(r.position_M)) for r in rows])
    return _table(columns)


def _dictionary(parts: list[Coded | int]) -> pa.DictionaryArray:
    """One column of several parts, with the words that occur. A number stands for so many empty words."""
    start: dict[int, int] = {}
    words: list[str] = [""]
    codes = []
    for part in parts:
        if isinstance(part, int):
            codes.append(np.zeros(part, np.int32))
            continue
        if id(part.values) not in start:  # batches share their words where they can
            start[id(part.values)] = len(words)
            words += part.values
        codes.append(part.code_R + start[id(part.values)])
    code = np.concatenate(codes) if codes else np.zeros(0, np.int32)
    used = np.bincount(code, minlength=len(words)) > 0
    place = np.cumsum(used, dtype=np.int32) - 1
    return pa.DictionaryArray.from_arrays(
        pa.array(place[code]), pa.array([words[i] for i in np.flatnonzero(used)], pa.string())
    )


def _site_table(number: int, rows: list[SiteRows]) -> pa.Table:
    """One row for each recorded token. Fillers, as expert choice leaves them, are left out of the lists."""
    K = max((r.expert_MK.shape[1] for r in rows), default=1)
    experts, gates, kept = (
        np.concatenate([_wide(getattr(r, name), K) for r in rows] or [np.zeros((0, 1), dtype)])
        for name, dtype in (("expert_MK", np.int16), ("gate_MK", np.float32), ("kept_MK", bool))
    )
    real = (gates != 0) | kept
    offsets = pa.array(np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32))
    token = np.concatenate([r.token_M for r in rows] or [np.zeros(0)]).astype(np.int64)
    entropy = np.concatenate([r.entropy_M for r in rows] or [np.zeros(0)]).astype(np.float32)
    columns = {"token": pa.array(token), "site": pa.array(np.full(len(token), number, np.int16))}
    for name, values in (("experts", experts), ("gates", gates), ("kept", kept)):
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values[real]))
    return _table(columns | {"entropy": pa.array(entropy)})


def _wide(values_MK: np.ndarray, K: int) -> np.ndarray:
    return values_MK if values_MK.shape[1] == K else np.pad(values_MK, ((0, 0), (0, K - values_MK.shape[1])))


def _table(columns: dict[str, pa.Array]) -> pa.Table:
    """Without nulls, and declared so: then nothing is written to tell them."""
    fields = [pa.field(name, _strict(column.type), nullable=False) for name, column in columns.items()]
    arrays = [column.cast(f.type) for column, f in zip(columns.values(), fields, strict=True)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _strict(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind.value_type, nullable=False)) if pa.types.is_list(kind) else kind


def _completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """With every column of the schema; words that are missing are ""."""
    columns = {}
    for field in schema:
        if field.name in table.schema.names:
            column = table.column(field.name).combine_chunks()
        else:
            column = pa.array([""] * len(table), pa.string())
        columns[field.name] = column
    return pa.Table.from_arrays([c.cast(f.type) for c, f in zip(columns.values(), schema, strict=True)], schema=schema)
