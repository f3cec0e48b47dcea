"""The `vlmoe` command: parses, calls, prints. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmoe.config import (
    TASKS,
    FinetuneRecipe,
    Recipe,
    UserError,
    home,
    init_of,
    load_finetune,
    load_recipe,
    recipe_names,
    to_yaml,
)
from vlmoe.study.declare import load_study, study_names
from vlmoe.train.output import forgiving_output

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
recipe_app = typer.Typer(help="What can stand in a recipe.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")

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


@app.command()
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
    _judge(result)


@app.command()
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
    _print_json(report) if as_json else print_report(report)


@app.command()
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
    from vlmoe.evaluate.downstream import evaluate_task, print_task_report
    from vlmoe.tasks.export import load
    from vlmoe.train.finetune import finetune as run

    start = str(init) if init is not None else init_of(recipe, overrides)
    plan = load_finetune(task, recipe, load(start).recipe, start, overrides)
    result = run(plan)
    if result.stopped_by is not None:
        raise typer.Exit(128 + result.stopped_by)
    folder = Path(plan.run.dir)
    print_task_report(evaluate_task(folder, progress=True), folder)
    _judge(result)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="A run's folder.")],
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="What a fine-tuned run must be fine-tuned for.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,  # are refused, in words
    device: Device = "auto",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Held-out samples of each split; default: the recipe's.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Of a fine-tuned run: a split; may be repeated.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of a fine-tuned run: examples at a time.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Of a fine-tuned run: data processes.")] = None,
    step: Annotated[int | None, typer.Option(help="A kept checkpoint's step; default: the model at the end.")] = None,
    as_json: Json = False,
) -> None:
    """Scores on held-out data.

    Of a fine-tuned run: its task's official metrics with 95% intervals, beside the best constant guess and the score
    with another example's image or text. Of a pre-trained run: masked prediction, text with and without the image,
    images, balance of the experts.

    The scores are written to eval.json in the run's folder; with --step N to eval-step-N.json.
    """
    from vlmoe.evaluate.downstream import evaluate_task, print_task_report
    from vlmoe.evaluate.report import evaluate_run, print_report
    from vlmoe.model.device import pick_device
    from vlmoe.tasks.export import Finetuned, is_finetuned
    from vlmoe.train.kept import load_step

    for word in (task or "", *(overrides or ())):
        if "=" in word:
            key, _, value = word.partition("=")
            option = {"eval.samples": "--samples", "eval.batch": "--batch", "data.workers": "--workers"}.get(key)
            hint = f"{option} {value}" if option else "the recipe is the run's own, see its recipe.yaml"
            raise UserError(f"'{word}': vlmoe eval takes no overrides: {hint}")
    if overrides:
        raise UserError(f"'{overrides[0]}': vlmoe eval takes one run and one task")
    kept = None if step is None else load_step(run, step, pick_device(device, "--device"))
    tag = "" if kept is None else f"-step-{step}"
    if isinstance(kept, Finetuned) or (kept is None and (task is not None or is_finetuned(run))):
        report = evaluate_task(
            run, task, device=device, splits=split, samples=samples, batch=batch, workers=workers,
            progress=not as_json, trained=kept, tag=tag,
        )  # fmt: skip
        _print_json(report) if as_json else print_task_report(report, run, tag=tag)
        return
    if task is not None:
        raise UserError(f"{run}: is pre-trained only, and answers no {task} yet")
    report = evaluate_run(run, device=device, samples=samples, trained=kept, tag=tag)
    _print_json(report) if as_json else print_report(report, run, tag=tag)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="A fine-tuned run's folder.")],
    task: TaskName,
    image: Annotated[
        list[Path] | None,
        typer.Option(parser=path, help="An image; for nlvr2 give two, for retrieval a folder to search."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="The question, sentence or query; for nli premise and hypothesis.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """One answer to your own images and texts, with probabilities and the experts that served it."""
    from vlmoe.evaluate.predict import predict as answer
    from vlmoe.evaluate.predict import print_prediction

    result = answer(run, task, image or [], text or [], device)
    _print_json(result) if as_json else print_prediction(result)


@app.command()
def report(
    run: Annotated[Path | None, typer.Argument(parser=path, metavar="[RUN]", help="A run's folder.")] = None,
    compare: Annotated[
        Path | None, typer.Option(parser=path, metavar="RUN", help="A second run, to set beside the first.")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option(
            "--hf", parser=path, metavar="PATH", help="In place of a run: the folder of a transformers model."
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="With --hf: texts, one on a line.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="DIR", help="With --hf: an image for each text, in the order of their names."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="The page to write; default: RUN/report.html.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Held-out samples of each kind of data, or texts, to measure on; default: 256.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What each expert does, as one HTML file to open in a browser, offline.

    Which tokens it takes, what breaks without it, paths through the layers, balance over training. Takes every expert
    away once, so it runs the held-out data once for each. Prints the page's path, or with --json the findings.
    """
    from vlmoe.interpret.report.command import report as make

    found, page = make(run, compare=compare, hf=hf, texts=texts, images=images, out=out, samples=samples, device=device)
    if as_json:
        _print_json(found[0] if len(found) == 1 else {"a": found[0], "b": found[1]})
    else:
        print(page)


@app.command()
def info(
    recipe: RecipeName,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(help="That share a step; data.batch is what each of them gets.")] = 1,
    shard: Annotated[bool, typer.Option(help="Cut weights, gradients and moments over the devices (FSDP).")] = False,
    expert_devices: Annotated[int, typer.Option(help="Of the devices, so many hold different experts.")] = 1,
    as_json: Json = False,
) -> None:
    """What a recipe's model weighs and a training step costs, before anything runs.

    Parameters in all and per token; FLOPs by part, forward and backward, per token and per sample; memory on a device
    for the recipe's batch (data.batch), precision (train.precision; auto counts as fp32) and model.recompute.
    """
    from vlmoe.model import Sharding, account, describe_account

    plan: Recipe = load_recipe(recipe, overrides)
    found = account(plan, sharding=Sharding(devices, shard, expert_devices))
    if as_json:
        _print_json({"recipe": plan.name, **found.as_dict()})
    else:
        print(describe_account(plan.name, plan, found))


@app.command()
def study(
    recipe: Annotated[
        str,
        typer.Argument(metavar="STUDY", help=f"A packaged study ({', '.join(study_names())}) or a YAML file's path."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example seeds=[0] jobs=1.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, metavar="DIR", help="The study's folder; default: runs/STUDY.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and the expected time; train the tokenizers, nothing else.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Do failed runs again.")] = False,
    as_json: Json = False,
) -> None:
    """Dense against sparse models at equal compute: runs, table, frontier, compute saved, scaling law, one HTML page.

    Shows the runs and the expected time first. Obeys the study's budget (budget.hours on the clock, budget.flops of
    training) over all launches. Stopped or killed, the same command goes on where it was; finished runs are not
    repeated; a failed one is recorded and the others go on. docs/fair-comparison.md says what is held equal.
    """
    from vlmoe.study.run import study as run

    declared = load_study(recipe, overrides)
    report = run(declared, out or Path("runs") / f"study-{declared.name}", dry_run=dry_run, retry=retry)
    if report is not None and as_json:
        _print_json(report)


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Overrides of the study's recipe: data.batch.pair=256 train.precision=bf16."
        ),
    ] = None,
    flops: Annotated[str, typer.Option(metavar="NUMBER", help="Training FLOPs to spend, for example 1e18.")] = "",
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of a device, for example 80GB or 64GiB.")] = "",
    study: Annotated[
        Path | None, typer.Option(parser=path, metavar="DIR", help="A study's folder or its study.json.")
    ] = None,
    devices: Annotated[int, typer.Option(help="That share a step; data.batch is what each of them gets.")] = 1,
    shard: Annotated[bool, typer.Option(help="Cut weights, gradients and moments over the devices (FSDP).")] = False,
    flops_per_second: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="What a device sustains in training; default: what the study measured."),
    ] = None,
    as_json: Json = False,
) -> None:
    """The model to train with given FLOPs and memory: predicted loss with its interval, time, alternatives.

    Judged by the scaling law of a study (`vlmoe study`). Says when it extrapolates beyond the study's runs.
    """
    from vlmoe.study.plan import make_plan, parse_size, print_plan, read_report

    for option, value in (("--flops", flops), ("--memory", memory), ("--study", study)):
        if not value:
            raise UserError(f"{option} is missing: vlmoe plan --flops 1e18 --memory 80GB --study runs/study-world")
    assert study is not None
    speed = None if flops_per_second is None else parse_size(flops_per_second, "--flops-per-second")
    found = make_plan(
        read_report(study), parse_size(flops, "--flops"), parse_size(memory, "--memory"), overrides or [],
        devices=devices, shard=shard, flops_per_second=speed,
    )  # fmt: skip
    _print_json(found) if as_json else print_plan(found)


@app.command()
def seal(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="FOLDER", help="A run's folder or its model folder.")],
) -> None:
    """Take a model's and its tokenizers' files as they are: write their digests anew after a change by hand.

    Loading compares every file with the digest it was written with, and refuses what differs.
    """
    from vlmoe.tasks.export import seal as write

    for file in write(folder):
        print(file)


@recipe_app.command("keys")
def recipe_keys(
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only this key, or those of this group: model.vision.router.")
    ] = "",
    finetune: Annotated[bool, typer.Option("--finetune", help="The keys of a fine-tuning recipe.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of both kinds, as docs/recipe-keys.md.")] = False,
    as_json: Json = False,
) -> None:
    """Every key of a recipe: its type, its default and what it means. One line each."""
    from vlmoe.config.keys import as_page, as_text, groups, select

    if markdown:
        print(as_page(), end="")
        return
    found = select(groups(FinetuneRecipe if finetune else Recipe), prefix)
    _print_json([vars(key) for group in found for key in group.keys]) if as_json else print(as_text(found))


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """What a recipe comes to, with what it takes from others, every key written out as YAML."""
    print(to_yaml(load_recipe(recipe, overrides)), end="")


@data_app.command("make")
def data_make(
    recipe: RecipeName,
    out: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="Folder for the shards; must not hold any yet.")
    ],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    split: Annotated[str, typer.Option(help="train, or a split that the data offer (docs/world.md).")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="How many.")] = 10_000,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1_000,
) -> None:
    """Write a recipe's data (the embedded world by default) as WebDataset shards."""
    from vlmoe.data.make import make_shards

    paths = make_shards(
        load_recipe(recipe, overrides), out, kind=kind, split=split, samples=samples, per_shard=per_shard, progress=True
    )
    print(f"{samples} samples in {len(paths)} shards: {out}")


@data_app.command("check")
def data_check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH|RECIPE", help="Shards (brace or glob pattern), a folder, parquet or arrow files; or a recipe."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of a recipe: overrides.")
    ] = None,
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    type_: Annotated[
        str, typer.Option("--type", help="shards, folder, parquet or arrow; auto tells by the path.")
    ] = "auto",
    image_column: Annotated[str, typer.Option(help="Of parquet and arrow: images' column, as in a recipe.")] = "image",
    text_column: Annotated[
        str, typer.Option(help="Of parquet, arrow, tables and .json members: where captions are, as in a recipe.")
    ] = "text",
    images: Annotated[
        Path | None, typer.Option(parser=path, help="Of parquet and arrow: folder of images named by their path.")
    ] = None,
    turns: Annotated[str, typer.Option(help="Of conversations: answer, the first one; or all.")] = "answer",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of a recipe: samples looked at of each source; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate anyone's data: counts, broken images, caption lengths, first errors with file and key.

    Accounts for every file and member: part of a sample, or ignored with a reason. Exits with 1 when a sample cannot be
    used, a key occurs twice or there is no sample; files that are ignored are no errors.

    Of a recipe (a packaged one, a YAML file or a run's folder): source by source its share, how often it is repeated
    over the run, texts that are cut, unknown tokens, samples that occur twice, what of the held-out samples is in
    training, and a verdict. Its sources say what the other options say of a path. Exits with 1 when there are problems.
    """
    from vlmoe.data.check import check_data, print_check

    folder = Path(home(path))
    named = path in recipe_names() and (overrides or not folder.is_dir())  # a folder here goes before a packaged recipe
    if named or path.endswith((".yaml", ".yml")) or (folder / "recipe.yaml").is_file():
        from vlmoe.data.check_recipe import check_recipe, print_recipe_check

        found = check_recipe(load_recipe(path, overrides), samples=samples, progress=not as_json)
        _print_json(found) if as_json else print_recipe_check(found)
        if found["problems"]:
            raise typer.Exit(1)
        return
    if overrides:
        raise UserError(f"{path}: is no recipe, and only a recipe takes overrides like {overrides[0]}")
    report = check_data(
        home(path), kind=kind, type=type_, image_column=image_column, text_column=text_column,
        images=str(images or ""), turns=turns, progress=not as_json,
    )  # fmt: skip
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
    out: Annotated[Path, typer.Option(parser=path, help="The PNG to write.")] = Path("samples.png"),
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    split: Annotated[str, typer.Option(help="train, or a held-out split.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="How many.")] = 16,
) -> None:
    """Save a contact sheet of samples as they enter the model: resized, masked, tokenized."""
    from vlmoe.data.show import show_data

    show_data(load_recipe(recipe, overrides), out, kind=kind, split=split, samples=samples, say=print)
    print(out)


def _judge(result: Any) -> None:
    """A run that has made fewer than half of its updates is no success, whatever its scores."""
    if result.mostly_held_back:
        print(
            f"vlmoe: error: {result.held_back} of {result.steps} updates were held back, so the model is hardly "
            "trained; a lower train.lr or a longer train.warmup in a new run.dir usually helps",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


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


if __name__ == "__main__":
    main()
