"""The `vlmoe` command: parses, calls, prints. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmoe.config import Recipe, UserError, load_recipe, recipe_names

app = typer.Typer(
    name="vlmoe",
    help="Sparse mixture-of-experts vision-language models: pre-train, measure, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make, check and look at data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help=f"A packaged recipe ({', '.join(recipe_names())}) or a YAML file's path."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example train.steps=100.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]


@app.command()
def pretrain(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Masked data modelling from scratch, or on from where the run in run.dir stopped.

    Ends with held-out scores, completions in words and pictures, all in the run's folder.
    """
    from vlmoe.evaluate.report import evaluate_run, print_report
    from vlmoe.train.pretrain import pretrain as run

    plan = load_recipe(recipe, overrides)
    result = run(plan)
    if result.stopped_by is not None:  # the signal's number, by the shell's convention
        raise typer.Exit(128 + result.stopped_by)
    print_report(evaluate_run(Path(plan.run.dir)), Path(plan.run.dir))


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    device: Annotated[str, typer.Option(help="cpu or cuda; auto picks.")] = "auto",
    samples: Annotated[int | None, typer.Option(help="Held-out samples of each split; default: the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Held-out masked prediction: text with and without the image, images, balance of the experts."""
    from vlmoe.evaluate.report import evaluate_run, print_report

    report = evaluate_run(run, device=device, samples=samples)
    if as_json:
        _print_json(report)
    else:
        print_report(report, run)


@app.command()
def info(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False) -> None:
    """What a recipe's model weighs and costs, before anything runs."""
    from vlmoe.model import describe, sizes

    plan: Recipe = load_recipe(recipe, overrides)
    if as_json:
        _print_json({"recipe": plan.name, **sizes(plan.model).as_dict()})
    else:
        print(describe(plan.name, plan.model))


@data_app.command("make")
def data_make(
    recipe: RecipeName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards; must not hold any yet.")],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    split: Annotated[str, typer.Option(help="train, val, handwriting, font or attributes.")] = "train",
    samples: Annotated[int, typer.Option(help="How many.")] = 10_000,
    per_shard: Annotated[int, typer.Option(help="Samples in a shard.")] = 1_000,
) -> None:
    """Write a recipe's data (the embedded world by default) as WebDataset shards."""
    from vlmoe.data.make import make_shards

    paths = make_shards(
        load_recipe(recipe, overrides), out, kind=kind, split=split, samples=samples, per_shard=per_shard, progress=True
    )
    print(f"{samples} samples in {len(paths)} shards: {out}")


@data_app.command("check")
def data_check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Shards (brace or glob pattern), a folder or parquet.")],
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    type_: Annotated[str, typer.Option("--type", help="shards, folder or parquet; auto tells by the path.")] = "auto",
    as_json: Json = False,
) -> None:
    """Validate anyone's data: counts, broken images, caption lengths, first errors with file and key.

    Exits with 1 when something is wrong with it.
    """
    from vlmoe.data.check import check_data, print_check

    report = check_data(path, kind=kind, type=type_, progress=not as_json)
    if as_json:
        _print_json(report)
    else:
        print_check(report)
    if report["errors"]:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    split: Annotated[str, typer.Option(help="train, or a held-out split.")] = "train",
    samples: Annotated[int, typer.Option(help="How many.")] = 16,
) -> None:
    """Save a contact sheet of samples as they enter the model: resized, masked, tokenized."""
    from vlmoe.data.show import show_data

    show_data(load_recipe(recipe, overrides), out, kind=kind, split=split, samples=samples)
    print(out)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def main() -> None:
    """Entry point: our own errors become one line and exit code 2; anything else is a bug and shows its trace."""
    try:
        app()
    except UserError as error:
        print(f"vlmoe: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
