"""Images in one folder for each class, as ImageNet is usually laid out."""

from __future__ import annotations

import os
from pathlib import Path

from vlmoe.config import FilesConfig, UserError
from vlmoe.data.accounts import no_picture, short
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.files import FileExamples, path_list
from vlmoe.data.images import SUFFIXES
from vlmoe.data.walk import walk_files


class ClassFolders(FileExamples):
    """files.file: a folder of folders, one for each class, named after it; images may lie in folders below, links are
    followed. ignored: files that are no example, with the reason.

    labels: the classes; None takes the folders' names in alphabetical order. A folder that is no known class is an
    error; a class without a folder is none.
    """

    task = "classify"

    def __init__(self, files: FilesConfig, image_size: int, max_pixels: int, labels: tuple[str, ...] | None) -> None:
        super().__init__(files, image_size, max_pixels)
        root = Path(files.file)
        if not root.is_dir():
            raise UserError(f"folder {root}: no such folder")
        walk = walk_files(root)
        self._paths = path_list()
        by_class: dict[str, list[str]] = {name: [] for name in walk.folders if name and "/" not in name}
        for name in walk.files:
            folder, slash, _ = name.partition("/")
            file = name.rpartition("/")[2]
            if not slash:
                walk.ignored.add("in no class's folder", os.fsencode(name))
            elif "." in file and file.rpartition(".")[2].lower() in SUFFIXES:
                by_class[folder].append(name)
            else:
                suffix = os.fsencode(file.rpartition(".")[2] if "." in file else "")
                walk.ignored.add(no_picture(suffix), os.fsencode(name))
        folders = sorted(by_class)
        if not folders:
            raise UserError(f"folder {root}: expected one folder for each class in it, found none")
        self.labels = tuple(folders) if labels is None else labels
        number = {name: i for i, name in enumerate(self.labels)}
        for name in folders:
            if name not in number:
                raise UserError(f"folder {root / name}: the model knows no class '{name}'")
            for key in sorted(by_class[name]):
                self.entries.append(Example(short(os.fsencode(key)), label=number[name]))
                self._paths.append(root / key)
        if not self.entries:
            raise UserError(f"folder {root}: no images ({', '.join(SUFFIXES)}) in its folders")
        self.ignored = walk.ignored

    def paths(self, index: int) -> list[Path]:
        return [self._paths[index]]
