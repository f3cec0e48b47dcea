"""Arguments and options that several commands take, and what they print alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmoe.config import TASKS, home, recipe_names

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help=f"A packaged recipe ({', '.join(recipe_names())}) or a YAML file's path."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example train.steps=100.")
]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help=", ".join(TASKS) + ".")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto picks.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]


def path(text: str) -> Path:
    """A path from the command line; shells put the home folder for ~ only at the beginning of a word."""
    return Path(home(text))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))
