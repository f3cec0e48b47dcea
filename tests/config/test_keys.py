"""What is said of each key comes from the dataclasses and the comments beside their fields, and covers all of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmoe.cli import app
from vlmoe.config import FinetuneRecipe, Recipe, RecipeError, flat, to_mapping
from vlmoe.config.keys import as_page, as_text, groups, meanings, select

PAGE = Path(__file__).parents[2] / "docs" / "recipe-keys.md"


@pytest.mark.parametrize("schema", [Recipe, FinetuneRecipe])
def test_every_key_and_group_says_what_it_means(schema: type) -> None:
    found = groups(schema)
    assert not [g.name for g in found if not g.about]
    assert not [k.name for g in found for k in g.keys if not k.meaning]
    named = {k.name for g in found for k in g.keys if "[]" not in k.name}
    assert named == set(flat(to_mapping(schema())))


def test_types_and_defaults_are_those_of_the_dataclasses() -> None:
    keys = {k.name: k for g in groups() for k in g.keys}
    found = keys["model.width"]
    assert (found.type, found.default, found.meaning) == ("whole number", "192", "of a token; a multiple of heads")
    assert (keys["train.patch_lr"].type, keys["train.patch_lr"].default) == ("number or null", "null")
    assert (keys["train.guard.on"].type, keys["train.guard.on"].default) == ("true or false", "true")
    assert (keys["run.dir"].type, keys["run.dir"].default) == ("text", '""')
    assert keys["data.world.languages"].default == "[en]"
    assert keys["data.sources"].default == "3 groups"
    assert keys["data.sources[].path"].meaning.startswith("shards: brace or glob pattern")
    for key, value in flat(to_mapping(Recipe())).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert float(keys[key].default) == value, key


@dataclass
class Below:
    first: int = 1  # one
    second: float = (  # two,
        2.0
    )
    # and more of two
    bare: str = ""
    tricky: str = "# no comment"  # four


@dataclass
class Derived(Below):
    own: int = 0  # of its own


def test_a_comment_belongs_to_the_field_it_stands_beside_or_below() -> None:
    expected = {"first": "one", "second": "two, and more of two", "bare": "", "tricky": "four"}
    assert meanings(Below) == expected
    assert meanings(Derived) == expected | {"own": "of its own"}


@pytest.mark.parametrize(
    ("prefix", "first", "count"),
    [
        ("train.lr", "train.lr", 1),
        ("train.guard", "train.guard.on", 8),
        ("data.sources", "data.sources", 10),
        ("data.sources[0].path", "data.sources[].path", 1),
        ("data.sources.0.path", "data.sources[].path", 1),
        ("model.vision.", "model.vision.sparse", 24),
    ],
)
def test_a_prefix_chooses_a_key_or_a_group(prefix: str, first: str, count: int) -> None:
    names = [k.name for g in select(groups(), prefix) for k in g.keys]
    assert (names[0], len(names)) == (first, count)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("lr", ["train.lr", "data.visual_tokenizer.lr"]),
        ("train.gard", ["train.guard"]),
        ("guard", ["did you mean train.guard?"]),
        ("zzzz", ["at the top there are", "train", "data"]),
    ],
)
def test_an_unknown_prefix_is_refused_with_what_is_near(prefix: str, words: list[str]) -> None:
    with pytest.raises(RecipeError, match=f"no key or group of keys '{prefix}'") as error:
        select(groups(), prefix)
    for word in words:
        assert word in str(error.value)


def test_the_command_prints_a_line_a_key() -> None:
    output = CliRunner().invoke(app, ["recipe", "keys", "train.guard"]).output
    assert len(output.strip().splitlines()) == 9
    assert "train.guard.patience" in output
    found = json.loads(CliRunner().invoke(app, ["recipe", "keys", "caption", "--finetune", "--json"]).output)
    assert [k["name"] for k in found][:2] == ["caption.mask", "caption.beam"]
    assert len(as_text(groups()).splitlines()) > 150


def test_the_page_is_as_the_command_writes_it() -> None:
    written = CliRunner().invoke(app, ["recipe", "keys", "--markdown"]).output
    assert written == as_page()
    assert PAGE.read_text() == written, "write it anew: vlmoe recipe keys --markdown > docs/recipe-keys.md"
