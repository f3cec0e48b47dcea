"""MNLI (Williams et al. 2018): its own .jsonl, GLUE's .tsv, or parquet as Hugging Face stores it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmoe.config import FilesConfig, UserError, json_lines
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.files import FileExamples, need, read_text

LABELS = ("entailment", "neutral", "contradiction")
NO_CONSENSUS = "-"  # of the annotators; such lines are left out, as in MNLI's own evaluation
COLUMNS = ("sentence1", "sentence2")
PARQUET_COLUMNS = ("premise", "hypothesis")


class MNLI(FileExamples):
    """files.file: the split's file. skipped: lines left out because the annotators agreed on no label."""

    task = "nli"

    def __init__(self, files: FilesConfig, image_size: int = 0, max_pixels: int = 0) -> None:
        super().__init__(files, image_size, max_pixels)
        self.labels, self.skipped = LABELS, 0
        suffix = Path(files.file).suffix.lower()
        readers = {".jsonl": _jsonl, ".tsv": _tsv, ".parquet": _parquet}
        if suffix not in readers:
            raise UserError(f"{files.file}: expected a file named .jsonl, .tsv or .parquet")
        seen: dict[str, str] = {}
        for where, key, premise, hypothesis, label, genre in readers[suffix](files.file):
            if label == NO_CONSENSUS:
                self.skipped += 1
                continue
            if label is not None and label not in LABELS:
                raise UserError(f"{where}: label is {label!r}, expected {', '.join(LABELS)}, or - for no consensus")
            number = None if label is None else LABELS.index(label)
            factors = {"genre": genre} if genre else {}
            self.add(Example(key, (), premise, hypothesis, (), number, "", factors), where, seen)
        self.check_filled()

    def paths(self, index: int) -> list[Path]:
        return []


Row = tuple[str, str, str, str, str | None, str]  # where, key, premise, hypothesis, label (None: not public), genre


def _jsonl(path: str) -> Iterator[Row]:
    for where, line in json_lines(path):
        premise, hypothesis = (need(line, column, str, where) for column in COLUMNS)
        label = line.get("gold_label")
        hidden = label is None or label == "hidden"
        key = str(line.get("pairID", where.rpartition(" ")[2]))
        yield where, key, premise, hypothesis, None if hidden else str(label), str(line.get("genre", ""))


def _tsv(path: str) -> Iterator[Row]:
    """Fields are split at tabs alone: quotes are part of the texts."""
    lines = read_text(path).split("\n")
    header = lines[0].rstrip("\r").split("\t")
    for column in COLUMNS:
        if column not in header:
            raise UserError(f"{path}, line 1: no column '{column}'; there are {', '.join(header)}")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        where, fields = f"{path}, line {number}", line.rstrip("\r").split("\t")
        if len(fields) != len(header):
            raise UserError(f"{where}: {len(fields)} columns, the header has {len(header)}")
        row = dict(zip(header, fields, strict=True))
        key = row.get("pairID") or row.get("index") or str(number)
        yield where, key, row["sentence1"], row["sentence2"], row.get("gold_label"), row.get("genre", "")


def _parquet(path: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from None
    for column in PARQUET_COLUMNS:
        if column not in table.column_names:
            raise UserError(f"{path}: no column '{column}'; there are {', '.join(table.column_names)}")
    rows: list[dict[str, Any]] = table.to_pylist()
    for number, row in enumerate(rows):
        where, label = f"{path}, row {number}", row.get("label")
        premise, hypothesis = (need(row, column, str, where) for column in PARQUET_COLUMNS)
        name: str | None = None if label is None else str(label)
        if isinstance(label, int):
            name = {-1: NO_CONSENSUS, **dict(enumerate(LABELS))}.get(label, str(label))
        yield where, str(row.get("idx", number)), premise, hypothesis, name, str(row.get("genre") or "")
