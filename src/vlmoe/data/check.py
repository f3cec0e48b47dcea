"""Validate anyone's data before a run depends on it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from vlmoe.config import UserError
from vlmoe.data.accounts import short
from vlmoe.data.conversations import TURNS
from vlmoe.data.files import FileOptions, FileSource
from vlmoe.data.sample import KINDS, BadSample
from vlmoe.data.sources import open_files
from vlmoe.data.walk import walk_files

FIRST_ERRORS = 20
TYPES = ("shards", "folder", "parquet", "arrow")
SUFFIXES = {"tar": "shards", "parquet": "parquet", "arrow": "arrow"}  # by what a path ends with, the first that occurs


def check_data(
    path: str,
    kind: str = "pair",
    type: str = "auto",
    image_size: int = 224,
    max_pixels: int = 64_000_000,
    image_column: str = "image",
    text_column: str = "text",
    images: str = "",
    turns: str = "answer",
    progress: bool = False,
) -> dict[str, Any]:
    """Read every sample once, as a run would.

    path: shards (brace or glob pattern), a folder, parquet or arrow files. type: shards, folder, parquet or arrow; auto
    tells by the path. image_column, text_column, images, turns: as in a recipe.
    Every image is decoded in full (`image_size` only bounds the work of resizing).

    Every file and every member is accounted for: each is part of a sample, good or skipped, or ignored with a reason.

    Returns a report fit for JSON: `samples`, `good`, `errors` (how many), `reasons` (reason -> count), `first_errors`
    ([{key, reason}], the first 20), `duplicate_keys` (how many keys occur again, counted as errors too),
    `first_duplicates`, `understood` (what is taken for image and text, in words), `taken` (part of an entry -> how many
    samples are that part alone), `characters` and `words` (quantiles of caption lengths), `same_captions` (share of
    captions that occurred before), `files` (how many there are), `ignored_files` (how many of them are no part of a
    sample), `ignored_files_reasons` (reason -> {count, example}), `members`, `ignored_members` and
    `ignored_members_reasons` (of shards, likewise), `blank_lines` (of text files).

    Raises UserError when the data cannot be opened at all.
    """
    if kind not in KINDS:
        raise UserError(f"kind '{kind}': expected image, text or pair")
    type = tell_type(path) if type == "auto" else type
    if type not in TYPES:
        raise UserError(f"type '{type}': expected {', '.join(TYPES)}")
    if turns not in TURNS:
        raise UserError(f"turns '{turns}': expected {' or '.join(TURNS)}")
    options = FileOptions(
        kind, path, "all", image_size, max_pixels, image_column, text_column, images=images, turns=turns
    )
    source = open_files(type, options)
    reasons: Counter[str] = Counter()
    first: list[dict[str, str]] = []
    characters: list[int] = []
    words: list[int] = []
    captions: set[int] = set()
    taken: Counter[str] = Counter()
    same = 0
    rows = range(len(source))
    for index in track(rows, "Checking") if progress else rows:
        try:
            sample = source[index]
        except BadSample as error:
            reasons[reason_class(error.reason)] += 1
            if len(first) < FIRST_ERRORS:
                first.append({"key": error.key, "reason": error.reason})
            continue
        taken.update(sample.taken)
        if sample.text is not None:
            characters.append(len(sample.text))
            words.append(len(sample.text.split()))
            digest = hash(sample.text)
            same += digest in captions
            captions.add(digest)
    duplicates = _duplicates(source)
    account = source.account()
    bad = sum(reasons.values())
    if not len(source):
        reasons["no sample in it"] += 1
    return {
        "path": short(os.fsencode(path)),
        "type": type,
        "kind": kind,
        "understood": source.understood(),
        "taken": dict(taken.most_common()),
        "files": account.files,
        "ignored_files": account.ignored_files.total,
        "ignored_files_reasons": account.ignored_files.as_dict(),
        "members": account.members,
        "ignored_members": account.ignored_members.total,
        "ignored_members_reasons": account.ignored_members.as_dict(),
        "blank_lines": account.ignored_lines,
        "samples": len(source),
        "good": len(source) - bad,
        "errors": bad + len(duplicates) + (not len(source)),
        "reasons": dict(reasons.most_common()),
        "first_errors": first,
        "duplicate_keys": len(duplicates),
        "first_duplicates": duplicates[:FIRST_ERRORS],
        "characters": _quantiles(characters),
        "words": _quantiles(words),
        "same_captions": same / len(characters) if characters else 0.0,
    }


def tell_type(path: str) -> str:
    """shards, folder, parquet or arrow, by the path and what lies in it."""
    if Path(path).is_dir():
        suffixes = {name.rpartition(".")[2].lower() for name in walk_files(path).files}
        return next((type for suffix, type in SUFFIXES.items() if suffix in suffixes), "folder")
    if (found := SUFFIXES.get(path.rpartition(".")[2].lower())) is not None:
        return found
    if ".tar" in Path(path).name.lower():
        return "shards"
    if Path(path).is_file() and Path(path).suffix.lower() == ".txt":
        return "folder"
    raise UserError(f"{path}: no such folder, and neither .tar, .parquet nor .arrow: say what it is with --type")


def reason_class(reason: str) -> str:
    """A reason without its particulars, for counting."""
    return reason.split(":")[0].split(" (")[0] if not reason[:1].isdigit() else "too many pixels"


def _duplicates(source: FileSource) -> list[str]:
    seen: set[str] = set()
    again: list[str] = []
    for row in source.rows:
        key = source.key(int(row))
        if key in seen:
            again.append(key)
        seen.add(key)
    return again


def _quantiles(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    values = np.quantile(lengths, [0, 0.05, 0.5, 0.95, 1]).tolist()
    return dict(zip(("min", "5%", "median", "95%", "max"), values, strict=True))


def print_check(report: dict[str, Any], console: Console | None = None) -> None:
    """A report of `check_data` as tables."""
    console = console or Console()
    summary = Table(title=Text(f"{report['path']} ({report['type']}, {report['kind']})"), title_justify="left")
    summary.add_column("what")
    summary.add_column("count", justify="right")
    for name in ("files", "ignored_files", "members", "ignored_members", "blank_lines"):
        if report[name] or name == "files":
            summary.add_row(name.replace("_", " "), f"{report[name]:,}")
        for reason, found in report.get(f"{name}_reasons", {}).items():
            summary.add_row(Text(f"  {reason}, for one {found['example']}"), f"{found['count']:,}")
    for name in ("samples", "good", "errors", "duplicate_keys"):
        summary.add_row(name.replace("_", " "), f"{report[name]:,}")
    for reason, count in report["reasons"].items():
        summary.add_row(Text(f"  {reason}"), f"{count:,}")
    console.print(summary)
    for line in report["understood"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for part, count in report["taken"].items():
        console.print(f"{count:,} samples are {part}", markup=False, highlight=False)
    if report["words"]:
        lengths = Table(title="Caption lengths", title_justify="left")
        for column in ("", *report["words"]):
            lengths.add_column(column, justify="right" if column else "left")
        for unit in ("characters", "words"):
            lengths.add_row(unit, *(f"{value:g}" for value in report[unit].values()))
        console.print(lengths)
        console.print(f"captions that occurred before: {100 * report['same_captions']:.1f}%")
    for error in report["first_errors"]:
        console.print(f"{error['key']}: {error['reason']}", markup=False, highlight=False, soft_wrap=True)
    for key in report["first_duplicates"]:
        console.print(f"{key}: key occurs again", markup=False, highlight=False, soft_wrap=True)
    if not report["errors"]:
        console.print("No errors.")
