"""The `vlmoe` command: parses, calls, prints.

A function a command, in the file of its kind; this one lists them. What is slow to import is imported by the command
that needs it.
"""

from __future__ import annotations

import sys
from typing import Any

import typer

from vlmoe.cli import ask, compute, data, recipe, train
from vlmoe.config import UserError
from vlmoe.train.output import forgiving_output


def _group(help: str, name: str | None = None) -> typer.Typer:
    return typer.Typer(
        name=name, help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )  # fmt: skip


app = _group("Sparse mixture-of-experts vision-language models: pre-train, measure, look inside.", "vlmoe")
app.command()(train.new)
app.command()(train.pretrain)
app.command()(train.finetune)
app.command("eval")(ask.evaluate)
app.command()(ask.predict)
app.command()(ask.report)
app.command()(ask.seal)
app.command()(train.stress)
app.command()(compute.info)
app.command()(compute.study)
app.command()(compute.plan)

data_app = _group("Make, check and look at data.")
data_app.command("make")(data.make)
data_app.command("check")(data.check)
data_app.command("show")(data.show)
app.add_typer(data_app, name="data")

recipe_app = _group("What can stand in a recipe.")
recipe_app.command("keys")(recipe.keys)
recipe_app.command("show")(recipe.show)
app.add_typer(recipe_app, name="recipe")


def main() -> None:
    """Entry point: our own errors become one line and exit code 2; anything else is a bug and shows its trace.

    An output that is closed early is no error. One that is lost otherwise is, but only when the command has ended.
    """
    code: Any = 0
    with forgiving_output() as lost:
        try:
            app()
        except UserError as error:
            print(f"vlmoe: error: {error}", file=sys.stderr)
            code = 2
        except SystemExit as end:
            code = end.code
    if lost:
        print(f"vlmoe: error: the output could not be written: {lost[0]}", file=sys.stderr)
    sys.exit(code or (1 if lost else 0))
