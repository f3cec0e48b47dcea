"""What it brings that a training process on the CPU keeps the memory it frees (`vlmoe.train.allocator`).

    python benchmarks/allocator.py --json benchmarks/results/allocator.json

Steps of a recipe (forward, backward, AdamW) in processes of their own, with and without, in turn. Processor time a step
with / without, of each pair of processes; below 1: keeping is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from provenance import provenance
from vlmoe.config import load_recipe
from vlmoe.data.loader import StepData
from vlmoe.data.text_tokenizer import build_text_tokenizer
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.allocator import keep_freed_memory

WARM = 5  # steps


def step_time(recipe_name: str, steps: int, threads: int) -> float:
    """Processor seconds of a step in this process."""
    torch.set_num_threads(threads)
    recipe = load_recipe(recipe_name, ["data.text_tokenizer.samples=2000"])
    data = StepData(recipe, build_text_tokenizer(recipe))
    m, vq = recipe.model, recipe.data.visual_tokenizer
    torch.manual_seed(0)
    task = MaskedDataModelling(m, VQTokenizer(m.image_size, m.patch, m.codes, vq.dim, vq.width))
    optimizer = torch.optim.AdamW(task.parameter_groups(0.0), lr=1e-4, fused=True)
    batches = [data[n].batches for n in range(4)]
    began = 0.0
    for n in range(WARM + steps):
        if n == WARM:
            began = time.process_time()
        optimizer.zero_grad()
        task(batches[n % len(batches)]).loss.backward()
        optimizer.step()
    return (time.process_time() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="characters")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=["plain", "kept"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker == "kept" and not keep_freed_memory():
            sys.exit("this C library has no mallopt: nothing to measure")
        print(step_time(args.recipe, args.steps, args.threads))
        return

    def measure(how: str) -> float:
        options = ["--recipe", args.recipe, "--steps", str(args.steps), "--threads", str(args.threads)]
        command = [sys.executable, __file__, *options, "--worker", how]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pairs = [(measure("plain"), measure("kept")) for _ in range(args.repeats)]
    ratios = sorted(kept / plain for plain, kept in pairs)
    print(f"processor time a step, kept / plain: {statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]")
    if args.json:
        about = {
            "ratio": {"median": round(statistics.median(ratios), 3), "values": [round(r, 3) for r in ratios]},
            "seconds_plain": [round(plain, 4) for plain, _ in pairs],
        } | provenance()
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
