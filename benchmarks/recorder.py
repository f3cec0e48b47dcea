"""What recording every routing decision costs over a plain forward pass.

    python benchmarks/recorder.py --threads 1 --json benchmarks/results/recorder.json

A model of the recipe (trained, with --run; else with random weights, which cost the same) runs batches of 64 held-out
pairs with their factors, made beforehand, with and without the recorder at its default settings: all layers, all
samples, all factors. Opening, writing and closing the files is in the time. Both are run in turn, in changing order,
so that a slow phase of the machine meets both alike; ratios are taken within a repeat, and their median and quartiles
reported: of the time that passes, and of the processor's time of all threads, the writing one included, which other
work on the machine hardly touches. Every repeat starts afresh, with no word known. A second row records a tenth of the
samples.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

import vlmoe
from provenance import provenance
from vlmoe.config import load_recipe
from vlmoe.data.batch import Batch
from vlmoe.data.loader import held_out
from vlmoe.data.visual_tokenizer import StoredCodes
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.recorder import Recorder
from vlmoe.interpret.recording import Recording
from vlmoe.tasks.export import Pretrained
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.pretrain import prepare_text_tokenizer

RATES = (1.0, 0.1)


def untrained(name: str, folder: Path) -> Pretrained:
    recipe = load_recipe(name, [f"run.dir={folder}"])
    text = prepare_text_tokenizer(recipe, folder / "tokenizers", Console(quiet=True))
    torch.manual_seed(recipe.seed)
    codes = StoredCodes(recipe.model.codes)  # not asked for in a forward pass
    return Pretrained(MaskedDataModelling(recipe.model, codes).eval(), text, codes, recipe, folder)


def plain(subject: OwnSubject, batches: list[Batch]) -> None:
    for batch in batches:
        subject.run(batch)


def recorded(subject: OwnSubject, batches: list[Batch], folder: Path, rate: float) -> None:
    with Recorder(subject, folder, rate=rate) as recorder:
        for batch in batches:
            recorder.run(batch)


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds that pass, and seconds of processor."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(trained: Pretrained, batches: list[Batch], folder: Path, repeats: int, rate: float) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "recorded": []}
    for repeat in range(-1, repeats):
        subject = OwnSubject(trained)
        shutil.rmtree(folder, ignore_errors=True)
        steps = {
            "plain": lambda s=subject: plain(s, batches),
            "recorded": lambda s=subject: recorded(s, batches, folder, rate),
        }
        for name in steps if repeat % 2 else reversed(steps):
            spent = timed(steps[name])
            if repeat >= 0:
                times[name].append(spent)
    found = Recording.load(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "rate": rate,
        "ratio": ratio(times, 0),
        "processor_ratio": ratio(times, 1),
        "plain_ms_per_batch": round(1e3 * statistics.median(t for t, _ in times["plain"]) / len(batches), 2),
        "tokens": found.tokens,
        "samples": found.samples,
        "factors": len(found.factors),
        "bytes_per_token": round(size / max(found.tokens, 1), 1),
    }


def ratio(times: dict[str, list[tuple[float, float]]], which: int) -> dict[str, float]:
    ratios = [r[which] / p[which] for r, p in zip(times["recorded"], times["plain"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    best = min(r[which] for r in times["recorded"]) / min(p[which] for p in times["plain"])
    found = {"median": median, "quartile1": low, "quartile3": high, "of_best": best}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="characters")
    parser.add_argument("--run", type=Path, help="a trained run's folder, in the place of a model with random weights")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="pairs in a batch")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice if not given")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trained = vlmoe.load(args.run) if args.run else untrained(args.recipe, folder / "run")
        assert isinstance(trained, Pretrained)
        batches = [
            held_out(trained.recipe, trained.text_tokenizer, "val", "pair", n * args.size, args.size, factors=True)
            for n in range(args.batches)
        ]
        rows = [measure(trained, batches, folder / "recording", args.repeats, rate) for rate in RATES]
    results = {
        "model": str(args.run or args.recipe),
        "pairs_in_a_batch": args.size,
        "batches": args.batches,
        "recorder": rows,
        "arrow_peak_bytes": pa.default_memory_pool().max_memory(),
        **provenance(),
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    print(f"{results['machine']}, torch {results['torch']}, {results['threads']} threads, {args.repeats} repeats")
    for row in rows:
        print(
            f"rate {row['rate']:g}: {row['plain_ms_per_batch']:.1f} ms a batch plain; {row['tokens']} tokens of "
            f"{row['samples']} samples, {row['factors']} factors, {row['bytes_per_token']} bytes a token"
        )
        for name in ("ratio", "processor_ratio"):
            r = row[name]
            print(
                f"  {name}: {r['median']:.3f} [{r['quartile1']:.3f}, {r['quartile3']:.3f}], of best {r['of_best']:.3f}"
            )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
