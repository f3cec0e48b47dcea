"""Routers and balancers at equal compute and equal steps on the embedded world, over several seeds.

    python benchmarks/routers.py --seeds 0 1 2 --jobs 2 --json benchmarks/results/routers.json

Every variant pre-trains the recipe `characters` (two of eight experts a token, or what costs the same) on the same
data in the same order. Reported on held-out pairs: loss (hidden words + hidden patches, nats), and its difference to
the first variant's under the same seed. Over the last quarter of training, in the worst layer: largest over mean load,
share of dropped choices, tokens no expert served, and churn, the share of a probe's tokens that changed expert in 50
steps. Throughput is that of training steps (forward, backward, AdamW) in tokens per second of processor time on one
thread, all variants in turn, before the runs: so it does not depend on what else the machine does. Finished runs are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from downstream import cell, interval, table, vlmoe
from provenance import provenance
from vlmoe.config import load_recipe
from vlmoe.data.loader import StepData
from vlmoe.data.text_tokenizer import build_text_tokenizer
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.runlog import read_lines

PLAIN = ["granularity=1", "shared_experts=0", "router.k=2"]  # what the variants change, whatever the recipe's default
OFF = ["router.balance=0", "router.z=0"]
FINE = ["granularity=2", "shared_experts=2", "router.k=1"]  # two of 16 halves beside a shared one: the FLOPs of top-2
VARIANTS: dict[str, list[str]] = {
    "softmax, balance loss": [],
    "softmax, no balancing": OFF,
    "softmax, importance and load losses": ["router.balance=0", "router.importance=0.005", "router.load=0.005"],
    "softmax, LIMoE entropies": ["router.balance=0", "router.local_entropy=0.01", "router.global_entropy=0.01"],
    "softmax, selection bias": ["router.balance=0", "router.bias_rate=0.001"],
    "sigmoid, selection bias": [*OFF, "router.type=sigmoid", "router.bias_rate=0.001"],
    "cosine, balance loss": ["router.type=cosine"],
    "batch priority, capacity 1.25": ["router.capacity_factor=1.25"],
    "expert choice": ["router.type=expert_choice"],
    "soft": ["router.type=soft", "router.slots=4"],
    "hash": ["router.type=hash"],
    "fine-grained, shared expert": FINE,
    "fine-grained, shared expert, sigmoid, selection bias": [
        *FINE,
        *OFF,
        "router.type=sigmoid",
        "router.bias_rate=0.001",
    ],
}
COLUMNS = {"loss": "held-out loss", "excess": "over the first's", "max_load": "largest/mean load",
           "dropped": "dropped, %", "unserved": "unserved, %",
           "churn": "churn, %", "speed": "tokens/s"}  # fmt: skip


def overrides(changes: list[str]) -> list[str]:
    return [f"model.{side}.{change}" for change in [*PLAIN, *changes] for side in ("vision", "text")]


def folder_of(runs: Path, variant: str, seed: int) -> Path:
    return runs / f"{variant.replace(',', '').replace(' ', '-')}-{seed}"


def figures(run: Path) -> dict[str, float]:
    loss = json.loads((run / "eval.json").read_text())["splits"]["val"]["loss"]["sum"]
    looks = [record["layers"] for record in read_lines(run / "routing.jsonl") if "layers" in record]
    late = looks[-max(1, len(looks) // 4) :]
    found = {"loss": loss}
    for key, factor in (("max_load", 1.0), ("dropped", 100.0), ("unserved", 100.0), ("churn", 100.0)):
        layers = [[look[name][key] for look in late if key in look[name]] for name in late[-1]]
        found[key] = factor * max((statistics.fmean(values) for values in layers if values), default=float("nan"))
    return found


def speeds(recipe_name: str, variants: list[str], repeats: int = 5, steps: int = 8) -> dict[str, list[float]]:
    """variant -> tokens per processor second of training steps, one value a repeat."""
    torch.set_num_threads(1)
    recipe = load_recipe(recipe_name, ["data.text_tokenizer.samples=2000"])
    data = StepData(recipe, build_text_tokenizer(recipe))
    batches = [data[n].batches for n in range(steps)]
    m, vq = recipe.model, recipe.data.visual_tokenizer
    visual = VQTokenizer(m.image_size, m.patch, m.codes, vq.dim, vq.width)
    ready = {}
    for variant in variants:
        task = MaskedDataModelling(load_recipe(recipe_name, overrides(VARIANTS[variant])).model, visual)
        ready[variant] = task, torch.optim.AdamW(task.parameter_groups(0.0), lr=1e-4, fused=True)
    tokens = sum(ready[variants[0]][0].tokens(batch) for batch in batches)
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(repeats + 1):
        for variant, (task, optimizer) in ready.items():
            began = time.process_time()
            for batch in batches:
                optimizer.zero_grad()
                task(batch).loss.backward()
                optimizer.step()
            if repeat:  # the first one warms up
                found[variant].append(round(tokens / (time.process_time() - began), 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="characters")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--runs", type=Path, default=Path("runs/routers"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = 1 if args.jobs > 1 else torch.get_num_threads()
    speed = speeds(args.recipe, args.variants)

    def run(job: tuple[int, str]) -> None:
        """The first variant trains the seed's visual tokenizer, the others read it."""
        seed, variant = job
        folder, first = (folder_of(args.runs, v, seed) for v in (variant, args.variants[0]))
        if not (folder / "eval.json").is_file():
            tokenizer = [] if folder == first else [f"data.visual_tokenizer.path={first / 'tokenizers'}"]
            vlmoe("pretrain", args.recipe, f"seed={seed}", f"train.steps={args.steps}", f"run.dir={folder}",
                  "eval.pictures=0", *tokenizer, *overrides(VARIANTS[variant]), threads=threads,
                  log=args.runs / "logs" / f"{folder.name}.txt")  # fmt: skip
        print(folder.name, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [(seed, args.variants[0]) for seed in args.seeds]))
        list(pool.map(run, [(seed, variant) for seed in args.seeds for variant in args.variants[1:]]))
    rows: dict[str, Any] = {}
    first: list[float] = []
    for variant in args.variants:
        each = [figures(folder_of(args.runs, variant, seed)) for seed in args.seeds]
        first = first or [found["loss"] for found in each]
        for found, loss in zip(each, first, strict=True):
            found["excess"] = found["loss"] - loss
        rows[variant] = {}
        for key in each[0]:
            values = [round(found[key], 4) for found in each]
            mean, half = interval(values)
            rows[variant][key] = {"values": values, "mean": mean, "half_width": half}
        rows[variant]["speed"] = {
            "values": speed[variant],
            "mean": statistics.median(speed[variant]),
            "half_width": None,
        }
    head = ["router, balancing", *COLUMNS.values()]
    digits = {"loss": 3, "excess": 3, "max_load": 2, "speed": 0}
    print(table(head, [[name, *(cell(row[key], digits.get(key, 1)) for key in COLUMNS)] for name, row in rows.items()]))
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "variants": rows,
                    "overrides": {name: overrides(VARIANTS[name]) for name in args.variants},
                    "steps": args.steps,
                    "seeds": args.seeds,
                    **provenance(),
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
