"""A run that goes on from a kept checkpoint of another, as that one would have gone on, to a length of its own.

Its folder gets what the other's held at that step: the checkpoint, logs, events and whatever stands beside them. From
there it is resumed like any other run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from vlmoe.config import Recipe, UserError
from vlmoe.train import checkpoint
from vlmoe.train.runlog import CHECKPOINTS, EVENTS, RunError, cut, note_event, read_lines

BRANCHED = "branched"  # the event of a run that began so


def kept_checkpoint(branch_from: str) -> Path:
    """The checkpoint that a recipe branches off from. Raises UserError where there is none."""
    source = Path(branch_from)
    if not (source / checkpoint.STATE).is_file():
        kept = checkpoint.steps_in(source if source.name == CHECKPOINTS else source / CHECKPOINTS)
        listed = f" (there are steps {', '.join(map(str, kept))})" if kept else ""
        there = source.exists() or (source.parent.name == CHECKPOINTS and source.parent.is_dir())
        what = "no checkpoint" if there else "no such folder"
        raise UserError(f"branch_from {source}: {what}, wanted RUN/{CHECKPOINTS}/step-N{listed}")
    return source


def branch_off(recipe: Recipe, run_dir: Path, beside: Sequence[str]) -> Path:
    """Fill the folder of a run that has no checkpoint yet from `recipe.branch_from`. The checkpoint comes last: without
    it the next launch begins anew.

    run_dir: locked by the caller. beside: names of folders to copy with it. Returns the run's checkpoint.

    Raises:
        UserError: no such checkpoint, it is damaged or of a recipe that would have led to other numbers, or it cannot
            be copied.
    """
    source = kept_checkpoint(recipe.branch_from)
    checkpoint.check_recipe(source, recipe)
    state, other = checkpoint.read_state(source), source.parent.parent
    try:
        for name in beside:
            if (other / name).is_dir():
                shutil.copytree(other / name, run_dir / name, dirs_exist_ok=True)
        for name, size in state.logs.items():
            if (other / name).is_file():
                shutil.copyfile(other / name, run_dir / name)
                cut(run_dir / name, size)
        before = [event for event in read_lines(other / EVENTS) if event.get("step", 0) <= state.step]
        (run_dir / EVENTS).write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in before))
    except OSError as error:
        raise RunError(f"branch_from {source}: cannot be copied to {run_dir}: {error}") from None
    note_event(run_dir, BRANCHED, step=state.step, source=str(source))
    (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    return checkpoint.copy(source, run_dir / CHECKPOINTS)


def began_at(run_dir: Path) -> int:
    """The step at which a run branched off, 0 for one that was trained from its beginning."""
    steps = [event["step"] for event in read_lines(run_dir / EVENTS) if event["event"] == BRANCHED]
    return steps[-1] if steps else 0
