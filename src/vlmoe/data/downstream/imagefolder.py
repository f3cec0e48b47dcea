"""Images in one folder for each class, as ImageNet is usually laid out."""

from __future__ import annotations

import os
from pathlib import Path

from vlmoe.config import FilesConfig, UserError
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.files import FileExamples
from vlmoe.data.images import SUFFIXES


class ClassFolders(FileExamples):
    """files.file: a folder of folders, one for each class, named after it; images may lie in folders below.

    labels: the classes; None takes the folders' names in alphabetical order. A folder that is no known class is an
    error; a class without a folder is none.
    """

    task = "classify"

    def __init__(self, files: FilesConfig, image_size: int, max_pixels: int, labels: tuple[str, ...] | None) -> None:
        super().__init__(files, image_size, max_pixels)
        root = Path(files.file)
        if not root.is_dir():
            raise UserError(f"folder {root}: no such folder")
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise UserError(f"folder {root}: expected one folder for each class in it, found none")
        self.labels = tuple(folders) if labels is None else labels
        number = {name: i for i, name in enumerate(self.labels)}
        for name in folders:
            if name not in number:
                raise UserError(f"folder {root / name}: the model knows no class '{name}'")
            for key in _images(root, name):
                self.entries.append(Example(key, label=number[name]))
        if not self.entries:
            raise UserError(f"folder {root}: no images ({', '.join(SUFFIXES)}) in its folders")
        self._root = root

    def paths(self, index: int) -> list[Path]:
        return [self._root / self.entries[index].key]


def _images(root: Path, folder: str) -> list[str]:
    found = []
    for where, _, names in os.walk(root / folder):
        for name in names:
            if name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith("."):
                found.append((Path(where) / name).relative_to(root).as_posix())
    return sorted(found)
