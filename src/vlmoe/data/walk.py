"""Files below a folder, links followed, each real folder once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from vlmoe.data.accounts import Ignored, hidden


@dataclass
class Walk:
    """files, folders: paths below the folder, with "/", not sorted. ignored: those that are hidden, lead nowhere, or to
    a folder that is read under another name."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    ignored: Ignored = field(default_factory=Ignored)


def walk_files(folder: str | Path) -> Walk:
    """Every file below a folder. Links to files and folders are followed; real folders come first, then those behind
    links in the order of their names, so that a circle of links ends and no folder is read twice."""
    found = Walk()
    root = os.fspath(folder)
    seen = {_identity(root)}
    links: list[str] = []
    waiting = [""]
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
            name = links.pop()
            identity = _identity(os.path.join(root, name))
            if identity in seen:
                found.ignored.add("a link to a folder that is read already", os.fsencode(name))
                continue
            seen.add(identity)
            waiting = [name]
        below = waiting.pop()
        found.folders.append(below)
        waiting += _list(root, below, found, links, seen)
    return found


def _list(root: str, below: str, found: Walk, links: list[str], seen: set[tuple[int, int]]) -> list[str]:
    """One folder's files go to `found`, its links to folders to `links`; its real folders are returned."""
    folders = []
    try:
        entries = sorted(os.scandir(os.path.join(root, below)), key=lambda e: e.name)
    except OSError as error:
        found.ignored.add(f"a folder that cannot be read: {error.strerror}", os.fsencode(below))
        return []
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        try:
            if (reason := hidden(os.fsencode(entry.name))) is not None:
                found.ignored.add(reason, os.fsencode(name))
            elif entry.is_dir(follow_symlinks=False):
                seen.add(_identity(entry.path))
                folders.append(name)
            elif entry.is_symlink() and entry.is_dir():
                links.append(name)
            elif entry.is_file():
                found.files.append(name)
            else:
                broken = entry.is_symlink() and not os.path.exists(entry.path)
                found.ignored.add("a broken link" if broken else "neither file nor folder", os.fsencode(name))
        except OSError as error:  # a link to itself, for one
            found.ignored.add(f"cannot be read: {error.strerror}", os.fsencode(name))
    return folders


def _identity(path: str) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_dev, about.st_ino
