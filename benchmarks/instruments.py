"""What the routing instruments and the autopilot cost: their share of the time of training steps.

    python benchmarks/instruments.py --json benchmarks/results/instruments.json

A recipe trains for --steps; every call into the instruments (`Watch`, the routing records) and into the autopilot
(`Guard`) is timed where it happens, on a CPU, where nothing runs on after a call returns. The share is of the time of
whole steps, without the first 50. Repeated with one seed each; median, least and most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from provenance import provenance
from vlmoe.config import load_recipe
from vlmoe.data.loader import StepData
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.guard import Guard
from vlmoe.train.loop import Trainer, train
from vlmoe.train.pretrain import prepare_text_tokenizer, prepare_visual_tokenizer
from vlmoe.train.runlog import RunLog
from vlmoe.train.watch import Watch

PARTS: dict[str, list[tuple[type, str]]] = {
    "instruments": [(Watch, "see"), (Watch, "look"), (Watch, "warnings"), (RunLog, "routing")],
    "autopilot": [(Guard, "admit"), (Guard, "count"), (Guard, "look")],
    "steps": [(Trainer, "_step")],
}
WARM = 50  # steps


def timed(part: str, owner: type, name: str, clock: dict[str, float]) -> Callable[[], None]:
    """Add the time of each call to clock[part]; returns what undoes it."""
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            clock[part] += time.perf_counter() - began

    setattr(owner, name, call)
    return lambda: setattr(owner, name, plain)


def measure(recipe_name: str, steps: int, seed: int) -> dict[str, float]:
    clock = dict.fromkeys(PARTS, 0.0)
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(recipe_name, [f"seed={seed}", f"train.steps={steps + WARM}", f"run.dir={folder}/run",
                                           "data.visual_tokenizer.steps=20"])  # fmt: skip
        text = prepare_text_tokenizer(recipe, Path(folder) / "tokenizers", console)
        visual = prepare_visual_tokenizer(recipe, text, Path(folder) / "tokenizers", torch.device("cpu"), console)
        torch.manual_seed(seed)
        task = MaskedDataModelling(recipe.model, visual)

        def after_warm_up(trainer: Trainer, micro_step: int) -> None:
            if micro_step == WARM:
                clock.update(dict.fromkeys(PARTS, 0.0))

        undo = [timed(part, owner, name, clock) for part, calls in PARTS.items() for owner, name in calls]
        try:
            train(recipe, task, StepData(recipe, text), Path(folder) / "run", disturb=after_warm_up)
        finally:
            for back in undo:
                back()
    return {part: clock[part] / clock["steps"] for part in PARTS if part != "steps"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="characters")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = [measure(args.recipe, args.steps, seed) for seed in args.seeds]
    shares = {}
    for part in found[0]:
        values = [f[part] for f in found]
        shares[part] = {"median": round(statistics.median(values), 4), "values": [round(v, 4) for v in values]}
        print(f"{part}: {statistics.median(values):.2%} of step time [{min(values):.2%}, {max(values):.2%}]")
    if args.json:
        about = {"share_of_step_time": shares, "threads": torch.get_num_threads(), "steps": args.steps} | provenance()
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
