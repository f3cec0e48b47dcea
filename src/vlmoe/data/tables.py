"""Tables of captions in a folder of images, as Hugging Face's imagefolder has them: captions.jsonl, metadata.jsonl,
metadata.csv.

Each line has "file_name", a path from the table's own folder, and a caption. An image listed twice has both captions.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vlmoe.config import UserError, json_lines

NAMES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")  # of several in a folder the first counts


class Tables:
    """captions: image -> caption (a text, a list or whatever stands there), paths from the root, in the tables' order.
    files: the tables read, likewise.

    Raises UserError naming file and line.
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
        for folder, file in self.folders.items():
            path = root / folder / file
            for where, entry in csv_lines(path, "file_name") if file.endswith(".csv") else json_lines(path):
                name = _name(entry, folder, where)
                old, new = self.captions.get(name), entry.get(text_column)
                self.captions[name] = new if old is None else [*_listed(old), *_listed(new)]

    def above(self, name: str) -> str | None:
        """The nearest folder with a table that an image lies in or below; None where there is none."""
        folder = name.rpartition("/")[0]
        while folder not in self.folders:
            if not folder:
                return None
            folder = folder.rpartition("/")[0]
        return folder


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
