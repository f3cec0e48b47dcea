"""Samples in a folder of plain files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from vlmoe.config import UserError
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
from vlmoe.data.sample import BadSample

TABLES = ("captions.jsonl", "metadata.jsonl")
_CHUNK = 1 << 24


def _folder(path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"folder {path}: no such folder")
    return folder


class ImageFolder(FileSource):
    """Images below a folder, in the order of their names; for pairs with captions.

    Captions come from captions.jsonl or metadata.jsonl in the folder (lines with "file_name" and `text_column`; only
    the images listed there are samples), or else from the file beside each image: NAME.txt, whose text is one caption,
    or NAME.json with `text_column`. A caption may be a list of texts. Codes: NAME.codes.npy beside the image.

    Raises UserError when the folder does not exist, holds no images, or a table has a broken line.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self.folder = _folder(options.path)
        table = next((self.folder / name for name in TABLES if (self.folder / name).is_file()), None)
        self.captions: dict[str, Any] | None = None
        if table is not None and self.kind == "pair":
            self.captions = _read_table(table, options.text_column)
            self.names = list(self.captions)
        else:
            self.names = sorted(_image_names(self.folder))
        if not self.names:
            raise UserError(f"folder {options.path}: no images ({', '.join(SUFFIXES)}) below it")
        hashes = np.array([hash64("entry", name) for name in self.names], dtype=np.uint64)
        self.rows = split_rows(hashes, options.split)

    def key(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int, image: bool) -> Parts:
        path, key = self.folder / self.names[row], self.names[row]
        parts = Parts(image=_bytes(path, key) if image else None)
        if self.kind != "image":
            parts.captions = self.captions[key] if self.captions is not None else self._beside(path, key)
        if image and self.options.patches and path.with_suffix(".codes.npy").is_file():
            parts.codes = decode_codes(_bytes(path.with_suffix(".codes.npy"), key), key)
        return parts

    def _beside(self, path: Path, key: str) -> Any:
        if path.with_suffix(".txt").is_file():
            return decode_text(_bytes(path.with_suffix(".txt"), key), key)
        if path.with_suffix(".json").is_file():
            return decode_json(_bytes(path.with_suffix(".json"), key), key).get(self.options.text_column)
        raise BadSample(key, f"no caption: expected {path.stem}.txt or {path.stem}.json beside it")


def _image_names(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if not file.startswith(".") and file.rpartition(".")[2].lower() in SUFFIXES:
                names.append((Path(root) / file).relative_to(folder).as_posix())
    return names


def _read_table(path: Path, text_column: str) -> dict[str, Any]:
    captions: dict[str, Any] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = entry["file_name"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: expected a JSON object with "file_name"') from None
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path}, line {number}: file_name {name!r} is not a path below the folder")
        old, new = captions.get(name), entry.get(text_column)
        captions[name] = new if old is None else [*_listed(old), *_listed(new)]  # listed twice: both captions count
    return captions


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _bytes(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample(key, f"cannot be read: {error.strerror or error}") from None


class TextLines(FileSource):
    """Texts for text-only training: the lines of a .txt file, or of all .txt files below a folder. Blank lines are no
    samples.

    Raises UserError when there is no such file or no line.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        root = Path(options.path)
        if root.is_file():
            self.paths = [root]
        else:
            self.paths = sorted(p for p in _folder(options.path).rglob("*.txt") if p.is_file())
        lines = [_line_places(path) for path in self.paths]
        self.offsets = np.concatenate([*(starts for starts, _ in lines), np.zeros(0, dtype=np.int64)])
        self.numbers = np.concatenate([*(numbers for _, numbers in lines), np.zeros(0, dtype=np.int32)])
        self.starts = np.cumsum([0, *(len(starts) for starts, _ in lines)])
        if not len(self.offsets):
            raise UserError(f"folder {options.path}: no .txt file with text below it")
        self.base = root.parent if root.is_file() else root
        names = [path.relative_to(self.base).as_posix() for path in self.paths]
        hashes = [hash_entries(name, len(starts)) for name, (starts, _) in zip(names, lines, strict=True)]
        self.rows = split_rows(np.concatenate(hashes), options.split)

    def _path(self, row: int) -> Path:
        return self.paths[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def key(self, row: int) -> str:
        return f"{self._path(row).relative_to(self.base).as_posix()}:{self.numbers[row]}"

    def read(self, row: int, image: bool) -> Parts:
        key = self.key(row)
        try:
            with self._path(row).open("rb") as file:
                file.seek(int(self.offsets[row]))
                raw = file.readline(MAX_TEXT_BYTES + 1)
        except OSError as error:
            raise BadSample(key, f"cannot be read: {error}") from None
        return Parts(captions=decode_text(raw, key))


def _line_places(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offset (int64) and number from 1 (int32) of every line that holds more than its end."""
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
    return every[kept] + 1, (kept + 1).astype(np.int32)
