"""What pre-training is worth: six downstream tasks on the embedded world, over several seeds.

    python benchmarks/downstream.py --recipe small --seeds 0 1 2 --jobs 2 --json benchmarks/results/downstream.json

For each seed the recipe is pre-trained; then each task is fine-tuned from these weights, from random weights, and blind
(from pre-trained weights, without the image, or without the premise), with the same recipe, data and steps; NLI also
from these weights but for the words' embeddings. Runs land
in --runs and finished ones are not repeated, so an interrupted study goes on. With --jobs each run has one thread.
The interval over seeds is Student's t at 95%. Ends with the tables of docs/results-tasks.md;
`--show FILE` prints them again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from provenance import provenance
from vlmoe.config import TASKS, UserError
from vlmoe.evaluate.downstream import UNITS

BLIND = {"vqa": "image", "nli": "text", "caption": "image"}  # NLVR2 is at 50% without images by construction
METRICS = {"vqa": "accuracy", "nlvr2": "accuracy", "retrieval": "mean_recall", "classify": "accuracy",
           "nli": "accuracy", "caption": "CIDEr"}  # fmt: skip
KINDS_OF = {"pretrained": "", "scratch": "scratch "}  # reported by kind of example: what their names begin with
VARIANTS = ("pretrained", "scratch", "fresh words", "blind", "another's input", "best guess")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # of n values, n - 1 degrees of freedom


def vlmoe(*arguments: str, threads: int, log: Path) -> None:
    """One command in a process of its own, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "160"}
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "vlmoe.cli", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        raise UserError(f"vlmoe {shlex.join(arguments)} ended with {done.returncode}; see {log}")


def plan(seeds: Iterable[int], tasks: Iterable[str]) -> list[tuple[str, str, int, list[str]]]:
    """(task, variant, seed, overrides) of every fine-tuning run."""
    found = []
    for seed in seeds:
        for task in tasks:
            variants = {"pretrained": [], "scratch": ["train.scratch=true"]}
            if task in BLIND:
                variants["blind"] = [f"data.blind={BLIND[task]}"]
            if task == "nli":
                variants["fresh words"] = ["train.fresh=[text.tokens]"]
            found += [(task, variant, seed, changes) for variant, changes in variants.items()]
    return found


def folder_of(runs: Path, task: str, variant: str, seed: int) -> Path:
    return runs / f"{task}-{variant.replace(' ', '-')}-{seed}"


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half the width of the 95% interval over seeds; None for a single seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def collect(runs: Path, seeds: list[int], tasks: list[str]) -> dict[str, Any]:
    """task -> split -> variant or baseline -> metric -> {mean, half_width, values}."""
    table: dict[str, Any] = {}
    for task, variant, seed, _ in plan(seeds, tasks):
        file = folder_of(runs, task, variant, seed) / "eval.json"
        if not file.is_file():
            continue
        report = json.loads(file.read_text())
        for split, row in report["splits"].items():
            named = {variant: row["scores"]}
            if variant == "pretrained":
                named |= {"best guess": row["guess"], "another's input": row.get("swapped", {}).get("scores", {})}
            if variant in KINDS_OF:
                for factor, values in row["by"].items():
                    for value, found in values.items():
                        named |= {f"{KINDS_OF[variant]}{factor}={value}": found["scores"]}
                        named |= {f"guess {factor}={value}": found["guess"]}
            for name, scores in named.items():
                for metric, score in scores.items():
                    if score["n"]:
                        cell = table.setdefault(task, {}).setdefault(split, {}).setdefault(name, {})
                        value = score["value"] * UNITS.get(metric, 100.0)
                        cell.setdefault(metric, {"values": {}})["values"][str(seed)] = round(value, 3)
    for task in table.values():
        for split in task.values():
            for variant in split.values():
                for cell in variant.values():
                    mean, half = interval(list(cell["values"].values()))
                    cell |= {"mean": round(mean, 2), "half_width": None if half is None else round(half, 2)}
    return table


def cell(score: dict[str, Any] | None, digits: int = 1) -> str:
    if score is None:
        return ""
    half = score["half_width"]
    return f"{score['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "-|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def tables(tasks: dict[str, Any]) -> str:
    """Markdown: every variant on the first split; the pre-trained model on all splits, and by kind on the first."""
    compared, by_split, by_kind = [], [], []
    for task, splits in tasks.items():
        metric = METRICS[task]
        for split in [next(iter(splits))] + (["mismatched"] if "mismatched" in splits else []):
            cells = [cell(splits[split].get(variant, {}).get(metric)) for variant in VARIANTS]
            compared.append([f"{task}, {metric}" + ("" if split == "val" else f", {split}"), *cells])
        by_split += [
            [task, split, cell(rows["pretrained"][metric]), cell(rows.get("scratch", {}).get(metric))]
            for split, rows in splits.items()
        ]
        first = next(iter(splits.values()))
        for name in [name for name in first if "=" in name and not name.startswith(("guess ", "scratch "))]:
            others = [cell(first.get(f"{of} {name}", {}).get(metric)) for of in ("scratch", "guess")]
            by_kind.append([task, name.replace("=", " "), cell(first[name][metric]), *others])
    return "\n\n".join(
        [
            table(["val", *VARIANTS], compared),
            table(["task", "split", "pretrained", "scratch"], by_split),
            table(["task", "examples", "pretrained", "scratch", "best guess"], by_kind),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="small", help="of the pre-training run")
    parser.add_argument("--pretrain", nargs="+", default=[], metavar="KEY=VALUE", help="changes to that recipe")
    parser.add_argument("--finetune", default="world", help="recipe of the fine-tuning runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS[:4]), choices=VARIANTS[:4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--runs", type=Path, default=Path("runs/downstream"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, help="print the tables of a results file, run nothing")
    args = parser.parse_args()
    if args.show:
        print(tables(json.loads(args.show.read_text())["tasks"]))
        return
    threads = 1 if args.jobs > 1 else torch.get_num_threads()
    logs = args.runs / "logs"

    def pretrain(seed: int) -> None:
        folder = args.runs / f"pretrain-{seed}"
        if not (folder / "eval.json").is_file():
            vlmoe("pretrain", args.recipe, f"seed={seed}", f"run.dir={folder}", *args.pretrain, threads=threads,
                  log=logs / f"{folder.name}.txt")  # fmt: skip

    def finetune(run: tuple[str, str, int, list[str]]) -> None:
        task, variant, seed, changes = run
        folder = folder_of(args.runs, task, variant, seed)
        if not (folder / "eval.json").is_file():
            vlmoe("finetune", task, args.finetune, "--init", str(args.runs / f"pretrain-{seed}"), f"seed={seed}",
                  f"run.dir={folder}", *changes, threads=threads, log=logs / f"{folder.name}.txt")  # fmt: skip
        print(folder.name, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:  # first in, first out: a run never waits for one that has not begun
        ready = {seed: pool.submit(pretrain, seed) for seed in args.seeds}

        def when_ready(run: tuple[str, str, int, list[str]]) -> None:
            ready[run[2]].result()
            finetune(run)

        list(pool.map(when_ready, [run for run in plan(args.seeds, args.tasks) if run[1] in args.variants]))
    results = {
        "tasks": collect(args.runs, args.seeds, args.tasks),
        "seeds": args.seeds,
        **provenance(),
    }
    print(tables(results["tasks"]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
