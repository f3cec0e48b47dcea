"""Routers and balancers at equal compute and equal steps on the embedded world, over several seeds.

    python benchmarks/routers.py --seeds 0 1 2 --jobs 2 --json benchmarks/results/routers.json

Every variant pre-trains the recipe `demo` (two of eight experts a token, or what costs the same) on the same data in
the same order. Reported on held-out pairs: loss (hidden words + hidden patches, nats), and its difference to the first
variant's under the same seed; over the last quarter of training, worst layer: largest over mean load, share of dropped choices, tokens no expert served, and churn, the share
of a probe's tokens that changed expert in 50 steps. Throughput only means something with --jobs 1. Finished runs are
not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from downstream import cell, interval, table, vlmoe
from moe_layer import machine
from vlmoe.train.runlog import read_lines

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
COLUMNS = {"loss": "held-out loss", "excess": "over the first, same seed", "max_load": "largest/mean load", "dropped": "dropped, %", "unserved": "unserved, %",
           "churn": "churn, %", "tokens_per_second": "tokens/s"}  # fmt: skip


def overrides(changes: list[str]) -> list[str]:
    return [f"model.{side}.{change}" for change in changes for side in ("vision", "text")]


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
    metrics = read_lines(run / "metrics.jsonl")
    found["tokens_per_second"] = statistics.median(record["tokens_per_second"] for record in metrics)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--runs", type=Path, default=Path("runs/routers"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = 1 if args.jobs > 1 else torch.get_num_threads()

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
        for key in COLUMNS:
            values = [round(found[key], 4) for found in each]
            mean, half = interval(values)
            rows[variant][key] = {"values": values, "mean": mean, "half_width": half}
    head = ["router, balancing", *COLUMNS.values()]
    digits = {"loss": 3, "excess": 3, "max_load": 2, "tokens_per_second": 0}
    print(table(head, [[name, *(cell(row[key], digits.get(key, 1)) for key in COLUMNS)] for name, row in rows.items()]))
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "variants": rows,
                    "overrides": {name: overrides(VARIANTS[name]) for name in args.variants},
                    "steps": args.steps,
                    "seeds": args.seeds,
                    "machine": machine("cpu"),
                    "torch": torch.__version__,
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "command": shlex.join(["python", *sys.argv]),
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
