"""Anyone's own questions and captions, from lines of JSON or a table: .jsonl, .csv or .tsv.

One line, one question (vqa) or one image with captions (retrieval, caption). Columns are found by their usual names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmoe.config import FilesConfig, UserError, json_lines
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.files import FileExamples, below, path_list
from vlmoe.data.tables import csv_lines

GROUP = "group"  # the column of groups where a recipe names none
NO_GROUP = "(none)"
ANNOTATORS = 10  # so many answers of one question or more are annotators', as VQAv2's; fewer are all right
COLUMNS = {  # what columns may be called; of several in a file the first counts
    "id": ("id", "question_id", "key"),
    "image": ("image", "image_path", "file_name", "filename", "img", "path"),
    "question": ("question", "query", "prompt"),
    "answers": ("answers", "answer", "label"),
    "captions": ("captions", "caption", "texts", "text", "sentences", "sentence"),
}
_BETWEEN = "|"  # of several answers or captions in one field of a table


class OwnFiles(FileExamples):
    """files.file: the lines. files.images: the folder that paths of images start from; empty: that of the file.
    files.part: read only lines whose column "split" is one of these. files.group: columns whose values are scored
    apart.
    """

    def __init__(self, files: FilesConfig, image_size: int, max_pixels: int) -> None:
        super().__init__(files, image_size, max_pixels)
        folder = Path(files.images) if files.images else Path(files.file).parent
        if not folder.is_dir():
            raise UserError(f"folder {folder}: no such folder")
        self.folder = str(folder)
        self._images = path_list()

    def paths(self, index: int) -> list[Path]:
        return [self._images[index]]

    def lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """("file, line n", columns) of the part that is read. Raises UserError: the file has no such part."""
        path = Path(self.files.file)
        suffix = path.suffix.lower()
        found = json_lines(path) if suffix == ".jsonl" else _table(path, "\t" if suffix == ".tsv" else ",")
        wanted = {part.strip() for part in self.files.part.split(",") if part.strip()}
        met: set[str] = set()
        for where, line in found:
            if wanted:
                met.add(_said(line, ("split",), where))
                if _said(line, ("split",), where) not in wanted:
                    continue
            yield where, line
        if wanted - met:
            raise UserError(
                f"{path}: has no split {', '.join(sorted(wanted - met))}; there are {', '.join(sorted(met))}"
            )

    def image(self, line: dict[str, Any], where: str) -> tuple[str, Path]:
        """The image's path as it is written, and where that leads."""
        name = _said(line, COLUMNS["image"], where)
        return name, below(self.folder, name, where)

    def factors(self, line: dict[str, Any], where: str) -> dict[str, str]:
        names = [name.strip() for name in (self.files.group or GROUP).split(",") if name.strip()]
        if not self.files.group and GROUP not in line:
            return {}
        return {name: _said(line, (name,), where, empty=True) or NO_GROUP for name in names}


class OwnQuestions(OwnFiles):
    """Questions with one answer or several (none: a test set). Of fewer than ten answers each is right; ten and more
    are those of annotators, and an answer counts by how many agree, as in VQAv2. Answers are compared as they are, but
    for case and white space.

    labels: None takes the `answers` most frequent; equals in alphabetical order. unanswerable: questions none of whose
    answers is among the labels.
    """

    task = "vqa"

    def __init__(
        self, files: FilesConfig, image_size: int, max_pixels: int, labels: tuple[str, ...] | None, answers: int
    ) -> None:
        super().__init__(files, image_size, max_pixels)
        counts: Counter[str] = Counter()
        seen: dict[str, str] = {}
        for where, line in self.lines():
            written, path = self.image(line, where)
            has_id = any(name in line for name in COLUMNS["id"])
            key = _said(line, COLUMNS["id"], where) if has_id else f"{where.rpartition(' ')[2]}: {written}"
            given = [" ".join(a.lower().split()) for a in _several(line, COLUMNS["answers"], where, optional=True)]
            if not given and labels is None:
                raise UserError(f"{where}: no answer to train on: expected one of {', '.join(COLUMNS['answers'])}")
            counts.update(set(given))
            references = tuple(given if len(given) >= ANNOTATORS else given * ANNOTATORS)
            question = _said(line, COLUMNS["question"], where)
            factors = self.factors(line, where)
            self.add(Example(key, (), question, None, references, None, "", factors, exact=True), where, seen)
            self._images.append(path)
        self.check_filled()
        often = sorted(counts, key=lambda answer: (-counts[answer], answer))
        self.labels = tuple(often[:answers]) if labels is None else labels
        known = set(self.labels)
        self.unanswerable = sum(bool(e.references) and not known & set(e.references) for e in self.entries)


class OwnCaptions(OwnFiles):
    """Images with their captions; those of several lines with the same image are put together."""

    def __init__(self, task: str, files: FilesConfig, image_size: int, max_pixels: int) -> None:
        super().__init__(files, image_size, max_pixels)
        self.task = task
        found: dict[str, tuple[str, Path, dict[str, str], list[str]]] = {}
        for where, line in self.lines():
            written, path = self.image(line, where)
            factors = self.factors(line, where)
            first, _, of_first, captions = found.setdefault(written, (where, path, factors, []))
            if factors != of_first:
                raise UserError(f"{where}: {written} is of another group here than at {first}")
            captions += [" ".join(text.split()) for text in _several(line, COLUMNS["captions"], where)]
        for written, (_, path, factors, captions) in found.items():
            self.entries.append(Example(written, (), None, None, tuple(captions), factors=factors))
            self._images.append(path)
        self.check_filled()


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a table; a field whose column's name is plural may hold several values."""
    many = {name for names in COLUMNS.values() for name in names if name.endswith("s")}
    for where, line in csv_lines(path, delimiter=delimiter):
        yield where, {k: v.split(_BETWEEN) if k in many and v is not None else v for k, v in line.items()}


def _said(line: dict[str, Any], names: tuple[str, ...], where: str, empty: bool = False) -> str:
    """The text or number in the first of these columns that there is, as text."""
    name = next((n for n in names if n in line), None)
    if name is None:
        raise UserError(f"{where}: no '{' or '.join(names)}'; there are {', '.join(map(str, line)) or 'no columns'}")
    value = line[name]
    if value is None or isinstance(value, (dict, list)):
        if value is None and empty:
            return ""
        raise UserError(f"{where}: '{name}' is {value!r}, expected a text or a number")
    text = _plain(value)
    if not text and not empty:
        raise UserError(f"{where}: '{name}' is empty")
    return text


def _several(line: dict[str, Any], names: tuple[str, ...], where: str, optional: bool = False) -> list[str]:
    """The values in the first of these columns that there is, at least one unless optional."""
    name = next((n for n in names if n in line), None)
    if name is None and not optional:
        raise UserError(f"{where}: no '{' or '.join(names)}'; there are {', '.join(map(str, line)) or 'no columns'}")
    value = line.get(name or "")
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(v, (dict, list)) for v in listed):
        raise UserError(f"{where}: '{name}' is {value!r}, expected a text or a list of texts")
    texts = [text for text in (_plain(v) for v in listed if v is not None) if text]
    if not texts and not optional:
        raise UserError(f"{where}: '{name}' is empty")
    return texts


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).strip()
