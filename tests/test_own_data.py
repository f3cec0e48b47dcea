"""docs/own-data.md, followed to the letter in an empty folder: every block runs, and what it shows is what comes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from tests.data.test_files import png
from tests.data.test_tables import save_to_disk
from tests.test_cli import error_of
from tests.test_docs import FENCE, ROOT
from vlmoe.cli import app
from vlmoe.config import load_finetune
from vlmoe.data.downstream.loader import open_split
from vlmoe.study import new
from vlmoe.tasks.export import load
from vlmoe.train.finetune import warnings_of

pytestmark = pytest.mark.usefixtures("no_plots")
PAGE = ROOT / "docs" / "own-data.md"
SIZES = ["model.width=16", "model.heads=2", "model.depth=2", "model.vision.experts=2", "model.text.experts=2"]
FEWER = {  # beside the words on the page, so that a command takes a second
    "pretrain": [
        *SIZES, "train.steps=2", "train.warmup=1", "data.visual_tokenizer.steps=2", "data.batch={pair: 4}",
        "data.workers=0", "eval.samples=8", "eval.pictures=1",
    ],
    "finetune": [
        "train.steps=2", "train.warmup=1", "data.batch=4", "data.workers=0", "eval.validate=8", "eval.batch=64",
    ],
    "report": ["--samples", "4"],
    "eval": ["--samples", "4"],
    "data show": ["--samples", "2"],
}  # fmt: skip
FAILS = {"data check pictures.yaml": 1}  # it finds problems, which the page speaks of
SHOWN_WHOLE = ("data check", "new")  # what these print depends on the data alone, but for numbers of the machine


def test_the_page_is_followed_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new, "seconds_of_a_step", lambda recipe, found: 0.1)  # tests of `vlmoe new` measure it
    output, commands = "", []
    for language, text in FENCE.findall(PAGE.read_text()):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {"__name__": "example"})
            if not (tmp_path / "saved").exists():
                save_hugging_face(tmp_path)
        elif language == "yaml" and text.startswith("# "):  # begins with its name
            Path(text.split()[1]).write_text(text)
        elif language == "sh":
            output = ""
            for line in text.replace("\\\n", " ").splitlines():
                command = shlex.split(line, comments=True)
                commands.append(" ".join(command[1:]))
                output += run(command)
        elif language == "text":
            assert_shown(text, output, commands[-1])
        elif language == "yaml":  # of the recipe that `vlmoe new` wrote
            assert_shown(text, Path("pictures.yaml").read_text(), "new")
    for word in ("data check", "new --images", "new --arrow", "data show", "pretrain", "eval", "finetune vqa",
                 "finetune retrieval", "predict", "report"):  # fmt: skip
        assert any(command.startswith(word) for command in commands), word
    assert Path("runs/pictures/report.html").stat().st_size > 100_000
    assert json.loads(Path("runs/pictures-vqa/eval.json").read_text())["splits"]["val"]["by"]["group"]
    assert "never seen the embedded world" in warned("world")
    assert "of the texts are cut at model.max_text=8 tokens" in warned("questions.yaml", "model.max_text=8")
    assert "in these texts are not in the vocabulary" in warned("questions.yaml") and "cut" not in warned(
        "questions.yaml"
    )


def warned(recipe: str, *overrides: str) -> str:
    """What `vlmoe finetune vqa` warns of."""
    start = load("runs/pictures")
    plan = load_finetune("vqa", recipe, start.recipe, "runs/pictures", list(overrides))
    return " ".join(warnings_of(plan, start, open_split(plan, "train")))


def run(command: list[str]) -> str:
    """What a command prints, with fewer steps."""
    assert command[0] == "vlmoe", command
    words = command[1:]
    fewer = next((more for name, more in FEWER.items() if " ".join(words).startswith(name)), [])
    result = CliRunner().invoke(app, [*words, *fewer], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert result.exit_code == FAILS.get(" ".join(words), 0), result.output
    return result.output


def assert_shown(text: str, output: str, command: str) -> None:
    """The lines on the page are among those that came, whatever their numbers are; of commands that train or score the
    first line. A line of three dots stands for any."""
    came = {plain(line) for line in output.splitlines()}
    lines = [line for line in text.splitlines() if line.strip() not in {"", "..."}]
    for line in lines if command.startswith(SHOWN_WHOLE) else lines[:1]:
        assert plain(line) in came, f"after {command!r}: {line}\n{output}"


def plain(line: str) -> str:
    return re.sub(r"[\d.,%]+", "#", re.sub(r"[\s━┃│┏┓┡┩┗┛┳╇┻└┘┴─]+", " ", line)).strip()


def save_hugging_face(folder: Path) -> None:
    """The page's pictures once more, as `datasets` saves them."""
    table = folder / "pictures" / "metadata.jsonl"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    images = [{"bytes": (folder / "pictures" / line["file_name"]).read_bytes(), "path": None} for line in lines]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, type=kind), "caption": pa.array([line["text"] for line in lines])}
    save_to_disk(folder / "saved" / "train", [pa.table(columns)])


@pytest.mark.parametrize("block", [text for language, text in FENCE.findall(PAGE.read_text()) if language == "console"])
def test_mistakes_are_answered_as_shown(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "a.png").write_bytes(png(0))
    (tmp_path / "shop" / "metadata.csv").write_text("file_name,title\na.png,a lamp\n")
    command, answer = block.splitlines()
    assert error_of(monkeypatch, capsys, *shlex.split(command)[2:]).strip() == answer
