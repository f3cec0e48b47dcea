"""Commands that train: new, pretrain, finetune, stress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmoe.cli.options import Json, Overrides, RecipeName, TaskName, path, print_json
from vlmoe.config import UserError, home, init_of, load_finetune, load_recipe, recipe_names


def new(
    images: Annotated[
        str, typer.Option(metavar="DIR", help="A folder of images; captions beside them or in a table.")
    ] = "",
    shards: Annotated[str, typer.Option(metavar="PATTERN", help="WebDataset shards: 'data/{000..017}.tar'.")] = "",
    parquet: Annotated[str, typer.Option(metavar="FILE", help="A parquet file, a pattern or a folder of them.")] = "",
    arrow: Annotated[
        str, typer.Option(metavar="DIR", help="A Hugging Face data set's split, as save_to_disk writes it.")
    ] = "",
    out: Annotated[Path, typer.Option(parser=path, help="The recipe to write; must not be there yet.")] = Path(
        "recipe.yaml"
    ),
    kind: Annotated[str, typer.Option(help="pair or image; auto: pairs where there are captions.")] = "auto",
    minutes: Annotated[float, typer.Option(min=0.1, help="That the training may take, about.")] = 30,
    image_column: Annotated[str, typer.Option(help="Of parquet and arrow: the images' column.")] = "image",
    text_column: Annotated[
        str, typer.Option(help="Of parquet, arrow, tables and .json members: where captions are.")
    ] = "text",
) -> None:
    """A recipe for your own images and captions: looks at the data, chooses sizes that fit them and this machine.

    Every choice stands in the recipe, with its reason. Trains a few steps to say how long a run takes.
    """
    from vlmoe.data.survey import survey
    from vlmoe.study.new import describe, new_recipe, refuse_to_overwrite

    options = {"folder": images, "shards": shards, "parquet": parquet, "arrow": arrow}
    given = [(type_, where) for type_, where in options.items() if where]
    if len(given) != 1:
        raise UserError(
            "wanted one of --images DIR, --shards PATTERN, --parquet FILE and --arrow DIR: vlmoe new --images my/photos"
        )
    ((type_, where),) = given
    refuse_to_overwrite(out)
    found = survey(type_, home(where), kind, image_column, text_column, progress=sys.stdout.isatty())
    draft = new_recipe(found, out, minutes)
    print(*describe(draft), f"{out}: written. Train: vlmoe pretrain {out}", sep="\n")


def pretrain(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Masked data modelling from scratch, or on from where the run in run.dir stopped.

    Ends with held-out scores, completions in words and pictures, all in the run's folder.
    """
    from vlmoe.distributed import is_first
    from vlmoe.evaluate.report import evaluate_run, print_report
    from vlmoe.train.pretrain import pretrain as run

    plan = load_recipe(recipe, overrides)
    result = run(plan)
    if result.stopped_by is not None:  # the signal's number, by the shell's convention
        raise typer.Exit(128 + result.stopped_by)
    if not is_first():
        return
    print_report(evaluate_run(Path(plan.run.dir)), Path(plan.run.dir))
    _judge(result)


def finetune(
    task: TaskName,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help=f"A packaged recipe ({', '.join(recipe_names('finetune'))}), a YAML file's path or a run's folder.",
        ),
    ],
    overrides: Overrides = None,
    init: Annotated[
        Path | None, typer.Option(parser=path, metavar="RUN", help="The run to start from; default: the recipe's.")
    ] = None,
) -> None:
    """Fine-tune a pre-trained run for a task, or go on from where the run in run.dir stopped.

    Keeps the weights that validated best, and ends with the scores on every split.
    """
    from vlmoe.distributed import is_first
    from vlmoe.evaluate.downstream import evaluate_task, print_task_report
    from vlmoe.tasks.export import load
    from vlmoe.train.finetune import finetune as run

    start = str(init) if init is not None else init_of(recipe, overrides)
    plan = load_finetune(task, recipe, load(start).recipe, start, overrides)
    result = run(plan)
    if result.stopped_by is not None:
        raise typer.Exit(128 + result.stopped_by)
    if not is_first():
        return
    folder = Path(plan.run.dir)
    print_task_report(evaluate_task(folder, progress=True), folder)
    _judge(result)


def stress(
    recipe: RecipeName,
    overrides: Overrides = None,
    fault: Annotated[list[str] | None, typer.Option(help="Only this fault, by its name; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(parser=path, help="Folder of the runs; empty: runs/NAME-stress.")] = None,
    as_json: Json = False,
) -> None:
    """Put faults into short runs of a recipe, with the autopilot on and off, and compare with the undisturbed run.

    Writes stress.md, stress.json and stress.png. Finished runs in the folder are not repeated.
    """
    from vlmoe.study.stress import print_report
    from vlmoe.study.stress import stress as run

    plan = load_recipe(recipe, overrides)
    report = run(plan, out or Path("runs") / f"{plan.name}-stress", fault)
    print_json(report) if as_json else print_report(report)


def _judge(result: Any) -> None:
    """A run that has made fewer than half of its updates is no success, whatever its scores."""
    if result.mostly_held_back:
        print(
            f"vlmoe: error: {result.held_back} of {result.steps} updates were held back, so the model is hardly "
            "trained; a lower train.lr or a longer train.warmup in a new run.dir usually helps",
            file=sys.stderr,
        )
        raise typer.Exit(1)
