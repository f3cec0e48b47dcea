"""What `vlmoe report` does: findings of a run, of two runs, or of a model of transformers, and their page."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlmoe.config import UserError
from vlmoe.interpret.findings import find_run, find_two
from vlmoe.interpret.gather import Progress as Say
from vlmoe.interpret.gather import find
from vlmoe.interpret.report.build import build
from vlmoe.model.device import pick_device

PAGE = "report.html"
SAMPLES = 256  # of each kind of data, or texts
SHOWN = 12  # samples that the page shows in full
BATCH = 8  # texts at a time


def report(
    run: Path | None,
    *,
    compare: Path | None = None,
    hf: Path | None = None,
    texts: Path | None = None,
    images: Path | None = None,
    out: Path | None = None,
    samples: int | None = None,
    device: str = "auto",
) -> tuple[list[dict[str, Any]], Path]:
    """Findings (of `run`, or of `run` and `compare`, or of the model in the folder `hf`) and the page's path.

    samples: held-out ones of each kind of data, or texts, to measure on. out: default `run`/report.html.
    Raises UserError: options that do not go together, a run or model that cannot be read, a file that is missing.
    """
    _check(run, compare, hf, texts, images, out, samples)
    count = samples or SAMPLES
    with _bar() as say:
        if hf is not None:
            assert texts is not None and out is not None
            found = [_of_transformers(hf, texts, images, count, device, say)]
            return found, build(found[0], out)
        assert run is not None
        page = out or run / PAGE
        if compare is None:
            found = [find_run(run, count, SHOWN, device=device, progress=say)]
            return found, build(found[0], page)
        both = find_two(run, compare, samples=count, shown=SHOWN, device=device, progress=say)
        return list(both), build(both[0], page, both[1])


def _check(
    run: Path | None, compare: Path | None, hf: Path | None, texts: Path | None, images: Path | None,
    out: Path | None, samples: int | None,
) -> None:  # fmt: skip
    if (run is None) == (hf is None):
        raise UserError(f"report: expected either a run's folder or --hf PATH, got {'both' if run else 'neither'}")
    if samples is not None and samples < 1:
        raise UserError(f"--samples: expected at least 1, got {samples}")
    if hf is None:
        extra = [name for name, value in (("--texts", texts), ("--images", images)) if value is not None]
        if extra:
            raise UserError(f"{extra[0]}: goes with --hf; a run is looked at with its own held-out data")
        for folder in (run, compare):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
        return
    if compare is not None:
        raise UserError("--compare: goes with a run, not with --hf")
    if texts is None:
        raise UserError("--hf: expected the texts to look at as --texts FILE, one on a line")
    if out is None:
        raise UserError("--hf: expected the page to write as --out FILE.html")


def _of_transformers(
    folder: Path, texts: Path, images: Path | None, samples: int, device: str, say: Say
) -> dict[str, Any]:
    from vlmoe.interpret.hf import load_hf, read_images, read_texts

    said, files = read_texts(texts), None if images is None else read_images(images)
    if files is not None and len(files) != len(said):
        raise UserError(f"{images}: expected an image for each of the {len(said)} texts of {texts}, found {len(files)}")
    say("reading the model", 0, 1)
    subject = load_hf(folder, str(pick_device(device, "--device")))
    batches = subject.batches(said[:samples], None if files is None else files[:samples], BATCH)
    about = {
        "model": str(folder),
        "kind of model": subject.config.model_type,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "texts": texts.name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return find(subject, batches, title=folder.resolve().name, about=about, shown=SHOWN, progress=say)


@contextlib.contextmanager
def _bar() -> Iterator[Say]:
    """A bar on the standard error, which goes when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading the run", total=None)
        yield lambda what, done, total: progress.update(bar, description=what, completed=done, total=total)
