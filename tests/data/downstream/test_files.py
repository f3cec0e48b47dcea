"""Readers of genuine files: what they read, and what they say of files that are wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vlmoe.config import FilesConfig, UserError
from vlmoe.data.downstream.files import FileExamples, open_files
from vlmoe.data.downstream.mnli import MNLI
from vlmoe.data.downstream.vqav2 import VQAv2
from vlmoe.data.sample import BadSample

RED, BLUE = (255, 0, 0), (0, 0, 255)


def paint(path: Path, colour: tuple[int, int, int] = RED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path)


def read(task: str, labels: tuple[str, ...] | None = None, answers: int = 3129, **files: Any) -> FileExamples:
    given = FilesConfig(**{k: str(v) for k, v in files.items()})
    return open_files(task, given, image_size=16, max_pixels=10_000, labels=labels, answers=answers)


# ----------------------------------------------------------------------------------------------------------------- vqa
def vqa(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None) -> dict[str, Any]:
    for image in (9, 25):
        paint(folder / "train2014" / f"COCO_train2014_{image:012d}.jpg", RED if image == 9 else BLUE)
    questions = {
        "data_subtype": "train2014",
        "questions": [
            {"image_id": 9, "question": "What color is it?", "question_id": 9000},
            {"image_id": 25, "question": "How many dogs?", "question_id": 25000},
            {"image_id": 25, "question": "Is it blue?", "question_id": 25001},
        ],
    }
    given = {9000: ["red"] * 8 + ["orange"] * 2, 25000: ["two"] * 6 + ["2"] * 4, 25001: ["yes"] * 10}
    annotations = {
        "annotations": [
            {
                "question_id": key, "image_id": 9 if key == 9000 else 25, "answer_type": "other",
                "question_type": "what color", "multiple_choice_answer": answers[0],
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, start=1)
                ],
            }
            for key, answers in given.items()
        ]
    }  # fmt: skip
    if change:
        change(questions, annotations)
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return {
        "file": folder / "questions.json", "annotations": folder / "annotations.json", "images": folder / "train2014",
    }  # fmt: skip


def test_vqav2(tmp_path: Path) -> None:
    source = read("vqa", **vqa(tmp_path))
    assert isinstance(source, VQAv2)
    assert source.labels == ("2", "red", "yes")  # "two" and "2" are one answer; equals in alphabetical order
    example = source[1]
    assert (example.key, example.text, example.references) == (
        "25000", "How many dogs?", ("two",) * 6 + ("2",) * 4,
    )  # fmt: skip
    assert example.factors == {"kind": "other", "type": "what color"}
    assert example.images[0].shape == (16, 16, 3)
    assert np.abs(example.images[0].mean((0, 1)) - BLUE).max() < 6
    assert source.truth(1).images == ()
    assert source.unanswerable == 0
    few = read("vqa", answers=1, **vqa(tmp_path))
    assert isinstance(few, VQAv2)
    assert (few.labels, few.unanswerable) == (("2",), 2)
    assert read("vqa", labels=("blue",), **vqa(tmp_path)).labels == ("blue",)


def test_answers_given_often_are_the_labels_when_there_are_any(tmp_path: Path) -> None:
    def many(questions: dict[str, Any], annotations: dict[str, Any]) -> None:
        for i in range(9):
            questions["questions"].append({"image_id": 9, "question": "Which?", "question_id": i})
            annotations["annotations"].append({**annotations["annotations"][0], "question_id": i})

    assert read("vqa", **vqa(tmp_path, many)).labels == ("red",)


def test_labels_are_the_chosen_answers_normalised(tmp_path: Path) -> None:
    """As BEiT-3 and VLMo build them: from `multiple_choice_answer`, or where it lacks from the most common answer."""

    def chosen(questions: dict[str, Any], annotations: dict[str, Any]) -> None:
        first, second, third = annotations["annotations"]
        first.update(multiple_choice_answer="12:30")
        second.update(multiple_choice_answer="dont know!")
        del third["multiple_choice_answer"]

    assert read("vqa", **vqa(tmp_path, chosen)).labels == ("12:30", "don't know", "yes")


def test_vqav2_test_sets_have_no_answers(tmp_path: Path) -> None:
    files = vqa(tmp_path)
    del files["annotations"]
    assert read("vqa", labels=("red",), **files)[0].references == ()
    with pytest.raises(UserError, match="set 'annotations'"):
        read("vqa", **files)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, a: q["questions"].append(q["questions"][0]), r"questions\[3\]: question 9000 has no annotation"),
        (lambda q, a: a["annotations"].append(a["annotations"][0]), r"annotations\[3\]: question 9000 is there twice"),
        (lambda q, a: a["annotations"].pop(1), r"questions\[1\]: question 25000 has no annotation in"),
        (lambda q, a: q["questions"].pop(0), r"annotations\[0\]: question 9000 is not in"),
        (lambda q, a: q["questions"][2].pop("question"), r"questions\[2\]: no 'question'; there are image_id"),
        (lambda q, a: q["questions"][2].update(image_id="x"), r"questions\[2\]: 'image_id' is 'x', expected a whole"),
        (lambda q, a: a["annotations"][0].update(image_id=7), r"annotations\[0\]: image_id is 7, its question's is 9"),
        (lambda q, a: a["annotations"][0].update(answers=[]), r"annotations\[0\]: 'answers' must be a list"),
        (lambda q, a: q.pop("questions"), "expected a JSON object with a list 'questions'"),
        (lambda q, a: (q.update(questions=[]), a.update(annotations=[])), "holds no examples"),
    ],
)
def test_vqav2_files_that_are_wrong(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read("vqa", **vqa(tmp_path, change))


def test_missing_files_folders_and_images_are_named(tmp_path: Path) -> None:
    files = vqa(tmp_path)
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read("vqa", **(files | {"file": tmp_path / "none.json"}))
    with pytest.raises(UserError, match="no such folder"):
        read("vqa", **(files | {"images": tmp_path / "none"}))
    with pytest.raises(UserError, match="set 'images'"):
        read("vqa", **(files | {"images": ""}))
    (tmp_path / "broken.json").write_text('{"questions": [')
    with pytest.raises(UserError, match=r"broken\.json: not valid JSON"):
        read("vqa", **(files | {"file": tmp_path / "broken.json"}))
    (files["images"] / "COCO_train2014_000000000009.jpg").unlink()
    (files["images"] / "COCO_train2014_000000000025.jpg").write_bytes(b"no image")
    source = read("vqa", **files)
    for i, reason in ((0, "cannot be read"), (1, "not an image")):
        with pytest.raises(BadSample, match=reason) as error:
            source[i]
        assert "COCO_train2014" in error.value.key
    paint(files["images"] / "000000000009.jpg")  # as COCO names them since 2017
    assert read("vqa", **files)[0].images[0].shape == (16, 16, 3)


# --------------------------------------------------------------------------------------------------------------- nlvr2
def nlvr2(folder: Path, **change: Any) -> dict[str, Any]:
    lines: list[dict[str, Any]] = [
        {"sentence": "Both are red.", "left_url": "l", "right_url": "r", "label": "True", "identifier": "dev-850-0-0"},
        {"sentence": "Both are red.", "left_url": "l", "right_url": "r", "label": "False", "identifier": "dev-850-1-0"},
        {"sentence": "One is blue.", "left_url": "l", "right_url": "r", "label": "False", "identifier": "dev-7-0-1",
         "directory": 42},
    ]  # fmt: skip
    lines[1] |= change
    for stem in ("dev-850-0", "dev-850-1", "42/dev-7-0"):
        paint(folder / "dev" / f"{stem}-img0.png", RED)
        paint(folder / "dev" / f"{stem}-img1.png", BLUE)
    (folder / "dev.json").write_text("\n".join(json.dumps({k: v for k, v in line.items() if v is not None})
                                               for line in lines))  # fmt: skip
    return {"file": folder / "dev.json", "images": folder / "dev"}


def test_nlvr2(tmp_path: Path) -> None:
    source = read("nlvr2", **nlvr2(tmp_path))
    assert source.labels == ("False", "True")
    assert [e.label for e in source.entries] == [1, 0, 0]
    assert [e.group for e in source.entries] == ["dev-850-0", "dev-850-0", "dev-7-1"]
    left, right = source[2].images
    assert (left[0, 0].tolist(), right[0, 0].tolist()) == ([255, 0, 0], [0, 0, 255])
    assert read("nlvr2", **nlvr2(tmp_path, label=None)).truth(1).label is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "maybe"}, "line 2: label is 'maybe', expected True or False"),
        ({"identifier": "dev-850-0-0"}, "line 2: id 'dev-850-0-0' is there twice, first at .*line 1"),
        ({"identifier": "dev-850"}, "line 2: identifier 'dev-850': expected"),
        ({"sentence": None}, "line 2: no 'sentence'"),
        ({"directory": "../.."}, "line 2: .*is not a path below"),
    ],
)
def test_nlvr2_lines_that_are_wrong(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read("nlvr2", **nlvr2(tmp_path, **change))


# ------------------------------------------------------------------------------------------------- retrieval, captions
def karpathy(folder: Path, **change: Any) -> dict[str, Any]:
    images = [
        {"filepath": "val2014", "filename": f"{i}.jpg", "imgid": i, "split": split,
         "sentences": [{"raw": f" A dog {i}. ", "tokens": ["a"]}, {"raw": "Dogs.", "tokens": ["dogs"]}]}
        for i, split in enumerate(("train", "test", "restval"))
    ]  # fmt: skip
    images[1] |= change
    for i in range(3):
        paint(folder / "val2014" / f"{i}.jpg")
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return {"file": folder / "dataset_coco.json", "images": folder}


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_karpathys_splits(tmp_path: Path, task: str) -> None:
    source = read(task, part="train, restval", **karpathy(tmp_path))
    assert [e.key for e in source.entries] == ["val2014/0.jpg", "val2014/2.jpg"]
    assert source[1].references == ("A dog 2.", "Dogs.")
    assert source[1].images[0].shape == (16, 16, 3)
    assert len(read(task, **karpathy(tmp_path))) == 3
    assert source.task == task


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sentences": []}, r"images\[1\]: 'sentences' must be"),
        ({"sentences": [{"raw": ""}]}, r"images\[1\]: 'sentences' must be"),
        ({"filename": "0.jpg"}, r"images\[1\]: id 'val2014/0.jpg' is there twice"),
        ({"filepath": "/etc"}, r"images\[1\]: '/etc/1.jpg' is not a path below"),
        ({"split": 3}, r"images\[1\]: 'split' is 3, expected a text"),
    ],
)
def test_karpathy_entries_that_are_wrong(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read("caption", **karpathy(tmp_path, **change))
    with pytest.raises(UserError, match="has no split dev; there are"):
        read("caption", part="dev", **karpathy(tmp_path))


# ------------------------------------------------------------------------------------------------------------- classes
def test_class_folders(tmp_path: Path) -> None:
    for name in ("n02/b.JPEG", "n01/deep/a.png", "n01/z.jpg", "n02/notes.txt"):
        paint(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("x")
    source = read("classify", file=tmp_path)
    assert source.labels == ("n01", "n02")
    assert [(e.key, e.label) for e in source.entries] == [("n01/deep/a.png", 0), ("n01/z.jpg", 0), ("n02/b.JPEG", 1)]
    assert source[2].images[0].shape == (16, 16, 3)
    known = read("classify", labels=("n00", "n01", "n02"), file=tmp_path)
    assert [e.label for e in known.entries] == [1, 1, 2]
    with pytest.raises(UserError, match="n02: the model knows no class 'n02'"):
        read("classify", labels=("n01",), file=tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read("classify", file=tmp_path / "none")
    (tmp_path / "empty" / "c").mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        read("classify", file=tmp_path / "empty")
    with pytest.raises(UserError, match="one folder for each class"):
        read("classify", file=tmp_path / "empty" / "c")


# ---------------------------------------------------------------------------------------------------------------- mnli
ROWS = [("Dogs run.", "Animals move.", "entailment"), ('He said "no".', "He agreed.", "contradiction"),
        ("It rains.", "It is cold.", "-"), ("A.", "B.", "neutral")]  # fmt: skip


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(
        json.dumps({"sentence1": a, "sentence2": b, "gold_label": label, "pairID": f"{i}e", "genre": "fiction"})
        for i, (a, b, label) in enumerate(ROWS)
    ))  # fmt: skip


def write_tsv(path: Path) -> None:
    header = "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
    path.write_text("\n".join([header, *(f"{i}\t1\t{i}e\tfiction\t{a}\t{b}\t{label}\t{label}"
                                         for i, (a, b, label) in enumerate(ROWS))]) + "\n")  # fmt: skip


def write_parquet(path: Path) -> None:
    number = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}
    rows = [{"premise": a, "hypothesis": b, "label": number[label], "idx": i} for i, (a, b, label) in enumerate(ROWS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("write", "suffix"), [(write_jsonl, "jsonl"), (write_tsv, "tsv"), (write_parquet, "parquet")])
def test_mnli_in_three_formats(tmp_path: Path, write: Callable[[Path], None], suffix: str) -> None:
    path = tmp_path / f"dev_matched.{suffix}"
    write(path)
    source = read("nli", file=path)
    assert isinstance(source, MNLI)
    assert source.labels == ("entailment", "neutral", "contradiction")
    assert source.skipped == 1
    assert [e.label for e in source.entries] == [0, 2, 1]
    assert (source[1].text, source[1].text_pair) == ('He said "no".', "He agreed.")
    assert source[1].factors == ({} if suffix == "parquet" else {"genre": "fiction"})


def test_mnli_files_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("index\tsentence1\tgold_label\n0\ta\tneutral\n")
    with pytest.raises(UserError, match="line 1: no column 'sentence2'; there are index"):
        read("nli", file=path)
    path.write_text("index\tsentence1\tsentence2\tgold_label\n0\ta\tb\n")
    with pytest.raises(UserError, match="line 2: 3 columns, the header has 4"):
        read("nli", file=path)
    path.write_text("index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tmaybe\n")
    with pytest.raises(UserError, match="line 2: label is 'maybe', expected entailment"):
        read("nli", file=path)
    path.write_text("index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n0\tc\td\tneutral\n")
    with pytest.raises(UserError, match="line 3: id '0' is there twice"):
        read("nli", file=path)
    path = tmp_path / "x.jsonl"
    path.write_text('{"sentence1": "a"}\n')
    with pytest.raises(UserError, match="line 1: no 'sentence2'"):
        read("nli", file=path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no examples"):
        read("nli", file=path)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read("nli", file=path)
    with pytest.raises(UserError, match=r"\.jsonl, \.tsv or \.parquet"):
        read("nli", file=tmp_path / "x.csv")
