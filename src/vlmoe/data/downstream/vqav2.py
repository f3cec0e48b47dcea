"""VQAv2 (Goyal et al. 2017): questions and annotations as JSON, images named as COCO names them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vlmoe.config import FilesConfig, UserError
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.files import FileExamples, images_folder, need, path_list, read_list
from vlmoe.metrics import normalize_answer

MIN_COUNT = 9  # an answer given less often in training is not learned (the usual 3,129 of VQAv2 are those with more)


class VQAv2(FileExamples):
    """files.file: questions; files.annotations: their answers, none for test sets; files.images: the folder.

    labels: None takes the `answers` most frequent of the annotations' `multiple_choice_answer` (where it lacks, of the
    annotators' most common answers), normalised, of those given at least nine times if there are any; equals in
    alphabetical order. This is how BEiT-3 and VLMo build theirs. unanswerable: questions none of whose answers is among
    the labels.
    """

    task = "vqa"

    def __init__(
        self, files: FilesConfig, image_size: int, max_pixels: int, labels: tuple[str, ...] | None, answers: int
    ) -> None:
        super().__init__(files, image_size, max_pixels)
        folder = images_folder(files)
        document, questions = read_list(files.file, "questions")
        annotations = _annotations(files.annotations) if files.annotations else {}
        subtype = str(document.get("data_subtype", ""))
        self._images = path_list()
        majors: list[str] = []
        seen: dict[str, str] = {}
        for number, question in enumerate(questions):
            where = f"{files.file}: questions[{number}]"
            key = str(need(question, "question_id", (int, str), where))
            image = need(question, "image_id", int, where)
            references: tuple[str, ...] = ()
            factors: dict[str, str] = {}
            if files.annotations:
                if key not in annotations:
                    raise UserError(f"{where}: question {key} has no annotation in {files.annotations}")
                at, found = annotations.pop(key)
                if found.get("image_id") != image:
                    raise UserError(f"{at}: image_id is {found.get('image_id')!r}, its question's is {image}")
                references = tuple(_answers(found, at))
                majors.append(_major(found, references))
                factors = {"kind": str(found.get("answer_type", "")), "type": str(found.get("question_type", ""))}
            text = need(question, "question", str, where)
            self.add(Example(key, (), text, None, references, None, "", factors), where, seen)
            self._images.append(_image_path(Path(folder), subtype, image))
        if annotations:
            key, (at, _) = next(iter(annotations.items()))
            raise UserError(f"{at}: question {key} is not in {files.file}")
        self.check_filled()
        if labels is None and not files.annotations:
            raise UserError(f"{files.file}: set 'annotations' beside it, the answers to train on")
        self.labels = _frequent(majors, answers) if labels is None else labels
        known = set(self.labels)
        self.unanswerable = sum(not known & {normalize_answer(r) for r in e.references} for e in self.entries)

    def paths(self, index: int) -> list[Path]:
        return [self._images[index]]


def _annotations(path: str) -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, entry in enumerate(read_list(path, "annotations")[1]):
        where = f"{path}: annotations[{number}]"
        key = str(need(entry, "question_id", (int, str), where))
        if key in found:
            raise UserError(f"{where}: question {key} is there twice, first at {found[key][0]}")
        found[key] = where, entry
    return found


def _answers(annotation: dict[str, Any], where: str) -> list[str]:
    answers = need(annotation, "answers", list, where)
    if not answers or not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in answers):
        raise UserError(f"{where}: 'answers' must be a list of objects with 'answer', at least one")
    return [a["answer"] for a in answers]


def _major(annotation: dict[str, Any], references: tuple[str, ...]) -> str:
    """The answer, normalised, that stands for a question among the labels."""
    chosen = annotation.get("multiple_choice_answer")
    if isinstance(chosen, str):
        return normalize_answer(chosen)
    return Counter(map(normalize_answer, references)).most_common(1)[0][0]


def _frequent(majors: list[str], answers: int) -> tuple[str, ...]:
    counts = Counter(answer for answer in majors if answer)
    often = {a: n for a, n in counts.items() if n >= MIN_COUNT} or counts
    return tuple(sorted(often, key=lambda a: (-often[a], a))[:answers])


def _image_path(folder: Path, subtype: str, image: int) -> Path:
    """COCO_train2014_000000000009.jpg, or 000000000009.jpg as COCO names them since 2017."""
    plain = folder / f"{image:012d}.jpg"
    return plain if not subtype or plain.is_file() else folder / f"COCO_{subtype}_{image:012d}.jpg"
