"""What a sparse step costs on the clock beside the dense step of the same FLOPs, by the width of the model.

    python benchmarks/step_width.py --json benchmarks/results/step_width.json

The models of the study `world`, at each width: dense, and sparse of equal FLOPs per token. A step is forward, backward
and AdamW on the study's batches (80 samples), with one thread, or on the device asked for. Each repeat times every
model of a width in turn, so that the ratio compares neighbours in time; reported are the median over repeats and the
quartiles, and the ratio of FLOPs, which routers and padding keep from being 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from downstream import table
from provenance import provenance
from vlmoe.config import Recipe
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.model.accounting import account
from vlmoe.study.declare import Grid, load_study
from vlmoe.study.grid import make_plan, mean_account
from vlmoe.study.measure import ReadyModel, data_shapes

STUDY, DENSE = "world", "dense"


def recipes(widths: list[int], models: list[str], device: str) -> dict[int, dict[str, Recipe]]:
    """width -> model -> recipe; the dense one first."""
    # Routers are a larger share of a narrow model than the study allows; here the ratio of FLOPs is reported.
    study = load_study(STUDY, ["sweep.rates=[]", "downstream.tasks=[]", "reference=''", "tolerance=10"])
    named = {grid.name: grid for grid in study.sparse}
    unknown = [name for name in models if name not in named]
    if unknown:
        raise SystemExit(f"--models: the study '{STUDY}' has {', '.join(named)}, not {', '.join(unknown)}")
    study.dense = [Grid(name=DENSE, width=widths)]
    study.sparse = [Grid(**(vars(named[name]) | {"width": widths})) for name in models]
    study.set.append(f"train.device={device}")
    plan = make_plan(study)
    found: dict[int, dict[str, Recipe]] = {width: {} for width in widths}
    for name, model in plan.models.items():
        width = model.settings["width"]
        found[width][name.removesuffix(f"-w{width}")] = model.recipe
    return found


def ready(recipe: Recipe, text: TextTokenizer) -> ReadyModel:
    """The model with a visual tokenizer as it is drawn: what its codes are changes no step's cost."""
    m, vq = recipe.model, recipe.data.visual_tokenizer
    return ReadyModel(recipe, text, VQTokenizer(m.image_size, m.patch, m.codes, vq.dim, vq.width))


def measure(models: dict[str, Recipe], repeats: int) -> dict[str, dict[str, Any]]:
    first = next(iter(models.values()))
    text = build_text_tokenizer(first)
    trained = {name: ready(recipe, text) for name, recipe in models.items()}
    took: dict[str, list[float]] = {name: [] for name in models}
    for n in range(repeats + 1):
        for name, model in trained.items():
            seconds = model.timed_step(n)
            if n:  # the first one warms up
                took[name].append(seconds)
    shapes = data_shapes(first, text, micro_batches=4)
    flops = {name: mean_account(r, shapes).step.total for name, r in models.items()}
    found: dict[str, dict[str, Any]] = {}
    for name in models:
        ratios = [a / b for a, b in zip(took[name], took[DENSE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if name != DENSE else (1.0, 1.0, 1.0)
        found[name] = {
            "seconds": round(statistics.median(took[name]), 4),
            "over_dense": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "flops_over_dense": round(flops[name] / flops[DENSE], 3),
            "parameters": sum(p.numel() for p in trained[name].task.parameters()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 128, 256, 512])
    parser.add_argument("--models", nargs="+", default=["top1-shared-e16", "fine-e64"], help="sparse, of the study")
    parser.add_argument("--largest", type=float, default=3e8, help="parameters; larger models are left out")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for width, models in recipes(args.widths, args.models, args.device).items():
        small = {n: r for n, r in models.items() if n == DENSE or account(r).sizes.params_total <= args.largest}
        for name, found in measure(small, args.repeats).items():
            rows.append({"width": width, "model": name} | found)
            print(rows[-1], flush=True)
    head = ["width", "model", "parameters", "FLOPs over dense", "step, s", "over dense", "quartiles"]
    cells = [
        [
            str(r["width"]),
            r["model"],
            f"{r['parameters'] / 1e6:.2f}M",
            f"{r['flops_over_dense']:.2f}",
            f"{r['seconds']:.3f}",
            f"{r['over_dense']:.2f}",
            "{} to {}".format(*r["quartiles"]),
        ]
        for r in rows
    ]
    print(table(head, cells))
    if args.json:
        results = {"rows": rows, "repeats": args.repeats, "threads": 1, "device": args.device}
        results |= provenance(torch.device(args.device).type)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
