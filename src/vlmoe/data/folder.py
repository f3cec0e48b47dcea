"""Samples in a folder of plain files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmoe.config import UserError
from vlmoe.data.accounts import Account, Ignored, account_of_files, no_picture, short
from vlmoe.data.counter import hash64
from vlmoe.data.files import (
    MAX_TEXT_BYTES,
    FileOptions,
    FileSource,
    Parts,
    decode_codes,
    decode_json,
    decode_text,
    hash_entries,
    split_rows,
)
from vlmoe.data.images import SUFFIXES
from vlmoe.data.packed import Packed
from vlmoe.data.sample import BadSample
from vlmoe.data.tables import Tables
from vlmoe.data.walk import Walk, walk_files

_CHUNK = 1 << 24


def existing(path: str, kind: str) -> Path:
    """The path of a source: a folder, or for texts alone a file. Raises UserError where there is none."""
    found = Path(path)
    if not found.is_dir() and not (kind == "text" and found.is_file()):
        raise UserError(f"folder {path}: no such folder")
    return found


class ImageFolder(FileSource):
    """Images below a folder, links followed (see `walk`); for pairs with captions.

    Captions come from a table (see `tables`) in the image's folder or the nearest above that has one; then only the
    images listed there are samples. Where there is none, from the file beside each image: NAME.txt, whose text is one
    caption, or NAME.json with `text_column`. A caption may be a list of texts. Codes: NAME.codes.npy beside the image.
    Samples stand in the order of the tables, then of the other images' names.

    Raises UserError when the folder does not exist, holds no images, or a table has a broken line.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self.folder = existing(options.path, options.kind)
        walk = walk_files(self.folder)
        tables = Tables(self.folder, walk.files, options.text_column) if self.kind == "pair" else None
        listed = tables.captions if tables is not None else {}
        self.columns = tables.columns if tables is not None else {}
        there = len(walk.files) + walk.ignored.total
        names, other = _sort_out(walk, listed, tables)
        self.names = Packed.of(map(os.fsencode, [*listed, *sorted(names)]))
        self.listed = len(listed)
        self.captions = Packed.of(json.dumps(caption).encode() for caption in listed.values())
        self._account = Account(there, other)
        if not len(self.names):
            raise UserError(f"folder {options.path}: no images ({', '.join(SUFFIXES)}) below it")
        hashes = (hash64("entry", name) for name in map(os.fsdecode, self.names))
        entries = np.fromiter(hashes, dtype=np.uint64, count=len(self.names))
        self.rows = split_rows(entries, options.split, options.held_out)

    def account(self) -> Account:
        return self._account

    def understood(self) -> list[str]:
        return [
            f"text: column '{column}' of {table}"
            for table, column in self.columns.items()
            if column != self.options.text_column
        ]

    def key(self, row: int) -> str:
        return short(self.names[row])

    def read(self, row: int, image: bool) -> Parts:
        path, key = self.folder / os.fsdecode(self.names[row]), self.key(row)
        parts = Parts(image=_bytes(path, key) if image else None)
        if self.kind != "image":
            parts.captions = json.loads(self.captions[row]) if row < self.listed else self._beside(path, key)
        codes = path.with_suffix(".codes.npy")
        if image and self.options.patches and codes.is_file():
            parts.codes = decode_codes(_bytes(codes, key), key)
        return parts

    def _beside(self, path: Path, key: str) -> Any:
        for suffix in (".txt", ".TXT"):
            if path.with_suffix(suffix).is_file():
                return decode_text(_bytes(path.with_suffix(suffix), key), key)
        for suffix in (".json", ".JSON"):
            if path.with_suffix(suffix).is_file():
                return decode_json(_bytes(path.with_suffix(suffix), key), key).get(self.options.text_column)
        stem = short(os.fsencode(path.stem))
        raise BadSample(key, f"no caption: expected {stem}.txt or {stem}.json beside it")


def _sort_out(walk: Walk, listed: Mapping[str, Any], tables: Tables | None) -> tuple[list[str], Ignored]:
    """Images that no table is in charge of, and the files that are no part of a sample."""
    names: list[str] = []
    beside: list[str] = []
    other = walk.ignored
    for name in walk.files:
        suffix = name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""
        if suffix not in SUFFIXES:
            beside.append(name)
        elif tables is not None and tables.above(name) is not None:
            if name not in listed:
                other.add("an image that the table does not list", os.fsencode(name))
        else:
            names.append(name)
    used = {name.rpartition(".")[0] for name in (*names, *listed)}
    for name in beside:
        stem, _, suffix = name.rpartition(".")
        part = suffix.lower() in {"txt", "json"} or name.lower().endswith(".codes.npy")
        if tables is not None and name in tables.files:
            continue
        if not part:
            other.add(no_picture(os.fsencode(suffix if "/" not in suffix and stem else "")), os.fsencode(name))
        elif (stem if suffix.lower() != "npy" else stem.rpartition(".")[0]) not in used:
            other.add(f".{suffix.lower()}: no image beside it", os.fsencode(name))
    return names, other


def _bytes(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise BadSample(key, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


class TextLines(FileSource):
    """Texts for text-only training: the lines of a .txt file, or of all .txt files below a folder. Blank lines are no
    samples.

    Raises UserError when there is no such file or no line.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        root = existing(options.path, "text")
        if root.is_file():
            self.paths = [root]
        else:
            self.paths = sorted(root / name for name in walk_files(root).files if name.lower().endswith(".txt"))
        lines = [_line_places(path) for path in self.paths]
        self.offsets = np.concatenate([*(starts for starts, _, _ in lines), np.zeros(0, dtype=np.int64)])
        self.numbers = np.concatenate([*(numbers for _, numbers, _ in lines), np.zeros(0, dtype=np.int32)])
        self.starts = np.cumsum([0, *(len(starts) for starts, _, _ in lines)])
        if not len(self.offsets):
            raise UserError(f"folder {options.path}: no .txt file with text below it")
        self.base = root.parent if root.is_file() else root
        names = [path.relative_to(self.base).as_posix() for path in self.paths]
        self.blank = sum(blank for _, _, blank in lines)
        hashes = [hash_entries(name, len(starts)) for name, (starts, _, _) in zip(names, lines, strict=True)]
        self.rows = split_rows(np.concatenate(hashes), options.split, options.held_out)

    def _path(self, row: int) -> Path:
        return self.paths[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def key(self, row: int) -> str:
        name = os.fsencode(self._path(row).relative_to(self.base).as_posix())
        return f"{short(name)}:{self.numbers[row]}"

    def account(self) -> Account:
        found = account_of_files(self.options.path, self.paths, ".txt")
        found.ignored_lines = self.blank
        return found

    def read(self, row: int, image: bool) -> Parts:
        key = self.key(row)
        try:
            with self._path(row).open("rb") as file:
                file.seek(int(self.offsets[row]))
                raw = file.readline(MAX_TEXT_BYTES + 1)
        except OSError as error:
            raise BadSample(key, f"cannot be read: {error}") from None
        return Parts(captions=decode_text(raw, key))


def _line_places(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Offset (int64) and number from 1 (int32) of every line that holds more than its end, and how many do not."""
    ends = [np.full(1, -1, dtype=np.int64)]
    feed_only = 1  # bytes from one line's end to the next when there is nothing between them
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            at = file.tell() - len(chunk)
            ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + at)
            feed_only = 2 if b"\r\n" in chunk else feed_only
        ends.append(np.array([file.tell()], dtype=np.int64))
    every = np.concatenate(ends)
    kept = np.flatnonzero(np.diff(every) > feed_only)
    lines = len(every) - 1 - bool(every[-1] == every[-2] + 1)  # what follows the last line's end is no line
    return every[kept] + 1, (kept + 1).astype(np.int32), lines - len(kept)
