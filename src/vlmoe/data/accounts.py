"""Accounts of what lies in a source: how many files and members there are, and why some are no part of a sample."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmoe.data.images import OTHER_PICTURES

_SHOWN = 200  # characters of a name in messages


class Ignored:
    """What is left out, by reason: how many, and the first of them."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    @classmethod
    def of(cls, given: dict[str, Any]) -> Ignored:
        made = cls()
        made._found = {reason: (int(said["count"]), str(said["example"])) for reason, said in given.items()}
        return made

    def add(self, reason: str, name: bytes) -> None:
        count, example = self._found.get(reason, (0, ""))
        self._found[reason] = count + 1, example or short(name)

    def merge(self, other: Ignored, where: str = "") -> None:
        """Add another's counts. where: goes before its names."""
        for reason, (count, example) in other._found.items():
            mine, first = self._found.get(reason, (0, ""))
            self._found[reason] = mine + count, first or (f"{where}/{example}" if where else example)

    @property
    def total(self) -> int:
        return sum(count for count, _ in self._found.values())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        ordered = sorted(self._found.items(), key=lambda item: -item[1][0])
        return {reason: {"count": count, "example": example} for reason, (count, example) in ordered}


@dataclass
class Account:
    """files: there are so many; `ignored_files` are not read. members (of shards): likewise. ignored_lines: blank."""

    files: int
    ignored_files: Ignored = field(default_factory=Ignored)
    members: int = 0
    ignored_members: Ignored = field(default_factory=Ignored)
    ignored_lines: int = 0


def short(name: bytes) -> str:
    """A name for people and JSON: bytes that are no UTF-8 as \\xNN, cut in the middle when very long."""
    text = name.decode(errors="backslashreplace")
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 2 :]} ({len(name)} bytes)"
    return text


def hidden(name: bytes) -> str | None:
    """Why a path is passed over: a file or folder in it that systems leave behind, or whose name begins with a dot."""
    parts = [part for part in name.split(b"/") if part not in {b"", b".", b".."}]
    if any(part.startswith(b"._") or part in {b"__MACOSX", b".DS_Store"} for part in parts):
        return "left behind by macOS"
    return "hidden: its name begins with a dot" if any(part.startswith(b".") for part in parts) else None


def no_picture(suffix: bytes) -> str:
    """Why a file of an unknown suffix is ignored."""
    text = short(suffix.lower())
    if text in OTHER_PICTURES:
        return f".{text}: a picture of a format that the installed Pillow is not used to read"
    return f".{text}: neither image nor text" if text else "no suffix"


def shown_below(paths: list[Path]) -> list[str]:
    """How files are called in keys: by their names, or by their paths from where they part if two share a name."""
    names = [p.name for p in paths]
    if len(set(names)) < len(names):
        whole = [os.path.abspath(p) for p in paths]
        common = os.path.commonpath([os.path.dirname(p) for p in whole])
        names = [os.path.relpath(p, common) for p in whole]
    return [short(os.fsencode(name)) for name in names]


def account_of_files(path: str, used: list[Path], suffix: str) -> Account:
    """Of a source whose files have one suffix: of a folder all files count, of a pattern those that match."""
    from vlmoe.data.walk import walk_files

    if not os.path.isdir(path):
        return Account(len(used))
    walk = walk_files(path)
    taken = {os.fspath(p) for p in used}
    account = Account(len(walk.files) + walk.ignored.total, walk.ignored)
    for name in walk.files:
        if os.fspath(Path(path) / name) not in taken:
            reason = "not one of the data set's files" if name.lower().endswith(suffix) else f"not named {suffix}"
            account.ignored_files.add(reason, os.fsencode(name))
    return account
