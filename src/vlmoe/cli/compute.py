"""Commands about what compute costs and buys: info, study, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmoe.cli.options import Json, Overrides, RecipeName, path, print_json
from vlmoe.config import Recipe, UserError, load_recipe
from vlmoe.study.declare import load_study, study_names


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
        print_json({"recipe": plan.name, **found.as_dict()})
    else:
        print(describe_account(plan.name, plan, found))


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
        print_json(report)


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
    print_json(found) if as_json else print_plan(found)
