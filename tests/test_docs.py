"""What README and docs show works: Python examples are run, commands are parsed, files they name exist."""

import re
import shlex
from pathlib import Path

import pytest

from tests.golden.record import OVERRIDES
from vlmoe.config import load_recipe
from vlmoe.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("no_plots")
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


@pytest.fixture(scope="module")
def folder_with_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it after `make demo`, with a run that took seconds."""
    folder = tmp_path_factory.mktemp("docs")
    short = ["train.steps=2", "data.visual_tokenizer.steps=2", f"run.dir={folder / 'runs' / 'demo'}"]
    pretrain(load_recipe("demo", [*OVERRIDES, *short]))
    return folder


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python") and p.name != "own-data.md"],  # test_own_data.py runs that page whole
    ids=lambda p: p.name,
)
def test_python_examples_run(page: Path, folder_with_a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_with_a_run)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_recipes_and_keys_that_exist(page: Path) -> None:
    from vlmoe.cli import app, data_app, recipe_app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    for block in blocks(page, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("vlmoe: "):  # what a command answered
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if not words or words[0] != "vlmoe":
                continue
            if words[1] in {"data", "recipe"}:
                group = data_app if words[1] == "data" else recipe_app
                assert words[2] in {str(c.name) for c in group.registered_commands}, line
                continue
            assert words[1] in known | {"--help"}, line
            if words[1] in {"pretrain", "info"}:
                overrides = [w for w in words[3:] if "=" in w and not w.startswith("-")]
                load_recipe(words[2] if not words[2].endswith(".yaml") else "demo", overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
