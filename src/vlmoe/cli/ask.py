"""Commands about a trained model: eval, predict, report, seal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmoe.cli.options import Device, Json, TaskName, path, print_json
from vlmoe.config import UserError


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
        print_json(report) if as_json else print_task_report(report, run, tag=tag)
        return
    if task is not None:
        raise UserError(f"{run}: is pre-trained only, and answers no {task} yet")
    report = evaluate_run(run, device=device, samples=samples, trained=kept, tag=tag)
    print_json(report) if as_json else print_report(report, run, tag=tag)


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
    print_json(result) if as_json else print_prediction(result)


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
        print_json(found[0] if len(found) == 1 else {"a": found[0], "b": found[1]})
    else:
        print(page)


def seal(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="FOLDER", help="A run's folder or its model folder.")],
) -> None:
    """Take a model's and its tokenizers' files as they are: write their digests anew after a change by hand.

    Loading compares every file with the digest it was written with, and refuses what differs.
    """
    from vlmoe.tasks.export import seal as write

    for file in write(folder):
        print(file)
