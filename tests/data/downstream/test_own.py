"""One's own questions and captions: lines of JSON and tables, with any ids and groups."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.downstream.test_files import BLUE, RED, paint, read
from vlmoe.config import UserError
from vlmoe.data.downstream.own import OwnQuestions
from vlmoe.data.sample import BadSample
from vlmoe.metrics import soft_scores, vqa_accuracy

QUESTIONS: list[dict[str, Any]] = [
    {"id": "x-1", "image": "a.png", "question": "What colour?", "answers": ["Red", "crimson"], "group": "colour"},
    {"id": 7, "image": "b.png", "question": "How many?", "answer": 2, "group": "count"},
    {"id": "x-3", "image": "b.png", "question": "Which letter?", "answer": "A", "group": None},
    {"id": "x-4", "image": "a.png", "question": "Red?", "answers": ["yes"] * 7 + ["no"] * 3, "group": "count"},
]


def jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "a.png", RED)
    paint(tmp_path / "b.png", BLUE)
    return tmp_path


def test_questions_with_any_ids(folder: Path) -> None:
    source = read("vqa", file=jsonl(folder / "q.jsonl", QUESTIONS))
    assert isinstance(source, OwnQuestions)
    assert [e.key for e in source.entries] == ["x-1", "7", "x-3", "x-4"]
    assert source.labels == ("2", "a", "crimson", "no", "red", "yes")
    assert [e.factors["group"] for e in source.entries] == ["colour", "count", "(none)", "count"]
    first, second, third, fourth = (source[i] for i in range(4))
    assert first.images[0].shape == (16, 16, 3)
    assert {a: vqa_accuracy(a, first.references, first.exact) for a in ("red", "crimson", "blue")} == {
        "red": 1, "crimson": 1, "blue": 0,
    }  # fmt: skip
    assert soft_scores(second.references, second.exact) == {"2": 1.0}
    assert soft_scores(third.references, third.exact) == {"a": 1.0}  # no article here
    assert vqa_accuracy("no", fourth.references, fourth.exact) == pytest.approx(0.9)  # ten annotators: by agreement
    few = read("vqa", labels=("red", "2"), file=folder / "q.jsonl")
    assert isinstance(few, OwnQuestions)
    assert few.unanswerable == 2


def test_a_table_says_the_same(folder: Path) -> None:
    rows = ['a.png,"What, and\nwhere?",red|dark red,x,train', "b.png,What?,blue,y,val", ""]
    table = "\n".join(["image_path,question,answers,site,split", *rows])
    (folder / "q.csv").write_text("\ufeff" + table)
    (folder / "q.tsv").write_text(table.replace(",", "\t").replace("What\t and", "What, and"))
    for name in ("q.csv", "q.tsv"):
        source = read("vqa", file=folder / name, group="site")
        assert (source[0].text, source.labels) == ("What, and\nwhere?", ("blue", "dark red", "red"))
        assert [e.factors for e in source.entries] == [{"site": "x"}, {"site": "y"}]
        assert [e.key for e in source.entries] == ["3: a.png", "4: b.png"]
        assert [e.text for e in read("vqa", file=folder / name, part="val").entries] == ["What?"]
    with pytest.raises(UserError, match="has no split test; there are train, val"):
        read("vqa", file=folder / "q.csv", part="val,test")


def test_captions_of_one_image_are_put_together(folder: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"image": "a.png", "caption": "a  red square", "group": "g"},
        {"image": "b.png", "captions": ["blue", "a blue square"], "group": "h"},
        {"image": "a.png", "caption": "red", "group": "g"},
    ]
    for task in ("retrieval", "caption"):
        source = read(task, file=jsonl(folder / "c.jsonl", lines))
        assert [e.key for e in source.entries] == ["a.png", "b.png"]
        assert [e.references for e in source.entries] == [("a red square", "red"), ("blue", "a blue square")]
        assert source[1].factors == {"group": "h"}
    lines[2]["group"] = "h"
    with pytest.raises(UserError, match=r"c\.jsonl, line 3: a\.png is of another group here than at .*line 1"):
        read("retrieval", file=jsonl(folder / "c.jsonl", lines))


def test_images_lie_beside_the_file_or_in_the_folder_that_is_named(folder: Path) -> None:
    elsewhere = folder / "lists"
    elsewhere.mkdir()
    lines = [{"image": str(folder / "a.png"), "caption": "x"}, {"image": "b.png", "caption": "y"}]
    file = jsonl(elsewhere / "c.jsonl", lines)
    assert read("retrieval", file=file, images=folder)[0].images[0].shape == (16, 16, 3)
    with pytest.raises(UserError, match=r"c\.jsonl, line 1: .*is not a path below the images' folder"):
        read("retrieval", file=file)
    with pytest.raises(BadSample, match=r"b\.png: cannot be read"):
        read("retrieval", file=jsonl(elsewhere / "c.jsonl", lines[1:]))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "line 2: 'question' is None, expected a text or a number"),
        ({"image": ""}, "line 2: 'image' is empty"),
        ({"id": "x-1"}, r"line 2: id 'x-1' is there twice, first at .*line 1"),
        ({"answer": {"a": 1}}, "line 2: 'answer' is {'a': 1}, expected a text or a list of texts"),
        ({"answer": None}, "line 2: no answer to train on: expected one of answers, answer, label"),
        ({"image": "../a.png"}, "line 2: .* is not a path below the images' folder"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(folder: Path, change: dict[str, Any], message: str) -> None:
    lines = [QUESTIONS[0], QUESTIONS[1] | change]
    with pytest.raises(UserError, match=rf"q\.jsonl, {message}"):
        read("vqa", file=jsonl(folder / "q.jsonl", lines))


def test_missing_columns_are_named_beside_those_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: no 'question or query or prompt'; there are image, text, answer"):
        read("vqa", file=jsonl(folder / "q.jsonl", [{"image": "a.png", "text": "x", "answer": "y"}]))
    with pytest.raises(UserError, match=r"line 1: no 'site'; there are image, caption"):
        read("retrieval", file=jsonl(folder / "c.jsonl", [{"image": "a.png", "caption": "x"}]), group="site")
    (folder / "c.csv").write_text("image,caption,image\na.png,x,y\n")
    with pytest.raises(UserError, match="a column is there twice: image, caption, image"):
        read("retrieval", file=folder / "c.csv")
    test_set = read("vqa", labels=("y",), file=jsonl(folder / "q.jsonl", [{"image": "a.png", "question": "x"}]))
    assert test_set[0].references == ()
    with pytest.raises(UserError, match="holds no examples"):
        read("retrieval", file=jsonl(folder / "e.jsonl", []))
