"""Which files a source of tables reads: those of a path, a pattern or a folder, or of a data set that Hugging Face's
`datasets` saved with `save_to_disk`."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

import braceexpand

from vlmoe.config import UserError, read_json
from vlmoe.data.files import FileOptions
from vlmoe.data.urls import Stat, expand_url, is_url, local_path
from vlmoe.data.walk import walk_files

SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "val": "validation", "eval": "validation",
    "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip
STATE, DICT = "state.json", "dataset_dict.json"  # of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`


def expand_tables(pattern: str, suffix: str, listed: dict[str, Stat] | None = None) -> list[str]:
    """Files of a path, glob pattern or folder, in order; of parquet files also of URLs and of a pattern with braces.

    suffix: ".parquet" or ".arrow". listed: as of `expand_url`.

    Raises UserError: there are none, a folder holds several splits, or lacks a file that its data set names.
    """
    kind = suffix[1:]
    if os.path.exists(pattern) or suffix != ".parquet":
        names = [pattern]
    else:
        try:
            names = [local_path(name) for name in braceexpand.braceexpand(pattern, escape=False)]
        except ValueError as error:  # of a pattern with unbalanced braces
            raise UserError(f"{kind} {pattern}: {error}") from None
    found: list[str] = []
    for name in names:
        if is_url(name):
            found += _one_split(expand_url(name, suffix, listed=listed), name, kind)
        elif os.path.isdir(name):
            found += _in_folder(Path(name), suffix)
        elif glob.has_magic(name) and not os.path.exists(name):
            found += [p for p in sorted(glob.glob(name, recursive=True)) if os.path.isfile(p)]
        elif os.path.isfile(name):
            found.append(name)
        elif len(names) > 1:
            raise UserError(f"{kind} {pattern}: no file {name}")
    if not found:
        raise UserError(f"{kind} {pattern}: no such file, and nothing matches")
    return list(dict.fromkeys(found))


def roots_of(options: FileOptions, file: str) -> list[Path]:
    """The folders that paths of images in a file may be relative to, in the order in which they are tried; none for a
    file from elsewhere."""
    if options.images:
        return [Path(options.images)]
    if is_url(file):
        return []
    return [Path(file).parent, *([Path(options.path)] if os.path.isdir(options.path) else [])]


def _in_folder(folder: Path, suffix: str) -> list[str]:
    if suffix == ".arrow" and (folder / STATE).is_file():
        return _saved(folder)
    names = sorted(name for name in walk_files(folder).files if name.lower().endswith(suffix))
    if suffix == ".arrow":
        saved = sorted({os.path.dirname(n) for n in names if (folder / os.path.dirname(n) / STATE).is_file()})
        if len(saved) > 1 or (saved and (folder / DICT).is_file()):
            raise UserError(
                f"arrow {folder}: holds the data sets {', '.join(saved)}: name one of them, for example "
                f"{folder / _rather_train(saved)}"
            )
        if saved:
            return _saved(folder / saved[0])
        names = [name for name in names if not os.path.basename(name).startswith("cache-")]  # of a data set's `map`
    return _one_split([str(folder / name) for name in names], str(folder), suffix[1:])


def _one_split(files: list[str], folder: str, kind: str) -> list[str]:
    """The files that a folder or a URL stands for; a pattern in it may choose a split. Raises UserError."""
    if glob.has_magic(folder) and is_url(folder):
        return files
    below = {file: file.removeprefix(folder) for file in files}
    splits = sorted({split for split in map(split_of, below.values()) if split})
    if len(splits) > 1:
        example = next(file for file in files if split_of(below[file]) == _rather_train(splits))
        like = re.sub(r"\d{4,5}(-of-\d{5}.*)?(?=\.\w+$)", "*", example)
        raise UserError(
            f"{kind} {folder}: holds the splits {', '.join(splits)}, and a folder is read whole: name one of them by a "
            f"pattern, for example {like}"
        )
    return files


def split_of(name: str) -> str:
    """The split that a path below a folder speaks of, by its last word that names one; empty where there is none."""
    words = [SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS]
    return words[-1] if words else ""


def _rather_train(names: list[str]) -> str:
    return "train" if "train" in names else names[0]


def _saved(folder: Path) -> list[str]:
    """The files of a saved data set, in its own order."""
    listed = read_json(folder / STATE).get("_data_files")
    given = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed or ()]
    names = [name for name in given if isinstance(name, str) and name == os.path.basename(name)]
    if not names or len(names) < len(given):
        raise UserError(f"{folder / STATE}: expected '_data_files', a list of objects with the 'filename' of each")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"arrow {folder}: {name} is missing, which {STATE} names")
    return [str(folder / name) for name in names]
