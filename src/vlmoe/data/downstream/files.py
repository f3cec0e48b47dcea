"""The genuine files of downstream data sets: what their readers share, and which reader serves which task.

Opening reads annotations only and judges their structure: what is wrong there is a UserError with file and line (or the
entry's number). Images are read one by one; a missing or broken one is a BadSample, which training replaces and counts
and evaluation leaves out and lists.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmoe.config import FilesConfig, UserError, read_json
from vlmoe.data.accounts import short
from vlmoe.data.augment import Views
from vlmoe.data.downstream.example import Example
from vlmoe.data.images import decode_image
from vlmoe.data.packed import Records
from vlmoe.data.sample import BadSample

OWN = (".jsonl", ".csv", ".tsv")  # endings of one's own files for vqa, retrieval and caption
_KEPT = ("key", "text", "text_pair", "references", "label", "group", "factors", "exact")  # all but images


def _write(entry: Example) -> bytes:
    return json.dumps([getattr(entry, name) for name in _KEPT]).encode()


def _read(raw: bytes) -> Example:
    values = dict(zip(_KEPT, json.loads(raw), strict=True))
    return Example(**values | {"references": tuple(values["references"])})


class FileExamples(ABC):
    """Examples in files. Subclasses fill `entries` (examples without images) and say where an entry's images are."""

    task: str

    def __init__(self, files: FilesConfig, image_size: int, max_pixels: int) -> None:
        self.files, self.image_size, self.max_pixels = files, image_size, max_pixels
        self.name = files.file
        self.labels: tuple[str, ...] = ()
        self.entries = Records(_write, _read)

    @abstractmethod
    def paths(self, index: int) -> list[Path]:
        """The images of an entry."""

    def __len__(self) -> int:
        return len(self.entries)

    def truth(self, index: int) -> Example:
        return self.entries[index]

    def __getitem__(self, index: int) -> Example:
        return self.draw(index)

    def draw(self, index: int, views: Views | None = None) -> Example:
        """An example. views: what of its images is shown; None: the centre squares."""
        return replace(self.entries[index], images=tuple(self._image(path, views) for path in self.paths(index)))

    def _image(self, path: Path, views: Views | None) -> np.ndarray:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise BadSample(short(os.fsencode(path)), f"cannot be read: {error.strerror or error}") from None
        return decode_image(raw, short(os.fsencode(path)), self.image_size, self.max_pixels, views() if views else None)

    def add(self, entry: Example, where: str, seen: dict[str, str]) -> None:
        """Take an entry. seen: key -> where it was. Raises UserError for a key that was there before."""
        if entry.key in seen:
            raise UserError(f"{where}: id {entry.key!r} is there twice, first at {seen[entry.key]}")
        seen[entry.key] = where
        self.entries.append(entry)

    def check_filled(self) -> None:
        if not self.entries:
            raise UserError(f"{self.name}: holds no examples")


def open_files(
    task: str,
    files: FilesConfig,
    *,
    image_size: int,
    max_pixels: int,
    labels: tuple[str, ...] | None = None,
    answers: int = 3129,
) -> FileExamples:
    """The reader of a task's files. labels: the classes of a trained model, None to take the files' own. answers: how
    many the vqa labels hold.

    Raises UserError: a file is missing or not of the format, an id is there twice, a label is unknown.
    """
    from vlmoe.data.downstream.imagefolder import ClassFolders
    from vlmoe.data.downstream.karpathy import Karpathy
    from vlmoe.data.downstream.mnli import MNLI
    from vlmoe.data.downstream.nlvr2 import NLVR2Files
    from vlmoe.data.downstream.own import OwnCaptions, OwnQuestions
    from vlmoe.data.downstream.vqav2 import VQAv2

    own = files.file.lower().endswith(OWN)
    if task == "vqa" and own:
        return OwnQuestions(files, image_size, max_pixels, labels, answers)
    if task in {"retrieval", "caption"} and own:
        return OwnCaptions(task, files, image_size, max_pixels)
    if task == "vqa":
        return VQAv2(files, image_size, max_pixels, labels, answers)
    if task == "nlvr2":
        return NLVR2Files(files, image_size, max_pixels)
    if task == "classify":
        return ClassFolders(files, image_size, max_pixels, labels)
    if task == "nli":
        return MNLI(files, image_size, max_pixels)
    return Karpathy(task, files, image_size, max_pixels)


# ------------------------------------------------------------------------------------------------------------- reading
def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def read_list(path: str, key: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A JSON object with a list of objects under `key`. Returns both."""
    try:
        document = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(document.get(key), list):
        raise UserError(f"{path}: expected a JSON object with a list '{key}'")
    for number, entry in enumerate(document[key]):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {key}[{number}] is {type(entry).__name__}, expected an object")
    return document, document[key]


def need(entry: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """entry[key] of the right type. Raises UserError naming place and key."""
    if key not in entry:
        raise UserError(f"{where}: no '{key}'; there are {', '.join(map(str, entry)) or 'no keys'}")
    if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join({"str": "a text", "int": "a whole number", "list": "a list"}[k.__name__] for k in kinds)
        raise UserError(f"{where}: '{key}' is {entry[key]!r}, expected {wanted}")
    return entry[key]


def below(folder: str, name: str, where: str) -> Path:
    """A path below the images' folder. Raises UserError for one that leads out of it."""
    elsewhere = Path(name).is_absolute() and not Path(name).is_relative_to(Path(folder).absolute())
    if elsewhere or ".." in Path(name).parts or "\0" in name:
        raise UserError(f"{where}: {name!r} is not a path below the images' folder")
    return Path(folder) / name


def _path(raw: bytes) -> Path:
    return Path(os.fsdecode(raw))


def path_list() -> Records[Path]:
    return Records(os.fsencode, _path)


def images_folder(files: FilesConfig) -> str:
    if not files.images:
        raise UserError(f"{files.file}: set 'images' beside it, the folder of its images")
    if not Path(files.images).is_dir():
        raise UserError(f"folder {files.images}: no such folder")
    return files.images
