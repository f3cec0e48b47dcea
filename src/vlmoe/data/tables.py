"""Tables of captions in a folder of images, as Hugging Face's imagefolder has them: captions.jsonl, metadata.jsonl,
metadata.csv.

Each line has "file_name", a path from the table's own folder, and a caption. An image listed twice has both captions.
Where the default column of captions is not there, the one of a usual name is taken, as of parquet.
"""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vlmoe.config import UserError, json_lines
from vlmoe.data.columns import USUAL

NAMES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")  # of several in a folder the first counts


class Tables:
    """captions: image -> caption (a text, a list or whatever stands there), paths from the root, in the tables' order.
    files: the tables read, likewise. columns: each one's column of captions.

    Raises UserError naming file and line, or a table that has no column of captions.
    """

    def __init__(self, root: Path, files: list[str], text_column: str) -> None:
        folders: dict[str, list[str]] = {}
        for name in files:
            folder, _, file = name.rpartition("/")
            if file in NAMES:
                folders.setdefault(folder, []).append(file)
        self.folders = {folder: min(found, key=NAMES.index) for folder, found in sorted(folders.items())}
        self.files = {f"{folder}/{file}".lstrip("/") for folder, file in self.folders.items()}
        self.captions: dict[str, Any] = {}
        self.columns: dict[str, str] = {}
        for folder, file in self.folders.items():
            lines = functools.partial(_lines, root, folder, file)
            column = _column(lines, text_column, root / folder / file)
            self.columns[f"{folder}/{file}".lstrip("/")] = column
            for name, entry in lines():
                old, new = self.captions.get(name), entry.get(column)
                self.captions[name] = new if old is None else [*_listed(old), *_listed(new)]

    def above(self, name: str) -> str | None:
        """The nearest folder with a table that an image lies in or below; None where there is none."""
        folder = name.rpartition("/")[0]
        while folder not in self.folders:
            if not folder:
                return None
            folder = folder.rpartition("/")[0]
        return folder


def _lines(root: Path, folder: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(image's path from the root, columns) for each line of a table."""
    path = root / folder / file
    for where, entry in csv_lines(path, "file_name") if file.endswith(".csv") else json_lines(path):
        yield _name(entry, folder, where), entry


def _column(lines: Callable[[], Iterator[tuple[str, dict[str, Any]]]], wanted: str, path: Path) -> str:
    """The column of captions. A name that a recipe gives must be there; the default one may be called otherwise."""
    first = next(lines(), None)
    if first is None or wanted in first[1]:
        return wanted
    names = dict.fromkeys(name for _, entry in lines() for name in entry)
    if wanted in names:
        return wanted
    usual = [name for name in USUAL["text"] if name in names] if wanted == USUAL["text"][0] else []
    if len(usual) == 1:
        return usual[0]
    could = f"; it could be {' or '.join(usual)}" if usual else ""
    raise UserError(
        f"{path}: no column '{wanted}'; there are {', '.join(map(str, names))}{could}: name the captions' column with "
        "text_column (--text-column), or read the images alone with kind: image (--kind image)"
    )


def _name(entry: dict[str, Any], folder: str, where: str) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f'{where}: expected "file_name", the path of an image')
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{where}: file_name {name!r} is not a path below the folder")
    return str(PurePosixPath(folder, path))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def csv_lines(path: Path, needed: str = "", delimiter: str = ",") -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", columns) for each line of a table with a header; a quoted field may span lines.

    needed: a column that must be there. Raises UserError naming file and line.
    """
    csv.field_size_limit(min(sys.maxsize, 1 << 26))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            names = list(reader.fieldnames or ())
            if needed and needed not in names:
                raise UserError(f"{path}, line 1: no column '{needed}'; there are {', '.join(names)}")
            if len(set(names)) < len(names):
                raise UserError(f"{path}, line 1: a column is there twice: {', '.join(names)}")
            for entry in reader:
                where = f"{path}, line {reader.line_num}"
                if None in entry:
                    raise UserError(f"{where}: more columns than the header has")
                yield where, entry
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
