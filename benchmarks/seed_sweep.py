"""How often training goes wrong: short runs over learning rates and seeds, the default against a naive router.

    python benchmarks/seed_sweep.py --jobs 2 --json benchmarks/results/seed_sweep.json

*default* is the recipe as it is. *naive* takes top-1 of a softmax without noise, balance loss or z-loss, and without
the autopilot. A run has *diverged* when it ended by an error, or the median loss of its last 32 steps is no number or
lies 10% above the lowest such median before. It has *collapsed* when on held-out data, in some layer, at least half of
the experts get less than a tenth of an even share, or one is 70% of the way from an even share to taking everything it
can. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from downstream import table, vlmoe
from provenance import provenance
from vlmoe.config import UserError, load_recipe
from vlmoe.train.runlog import read_lines

NAIVE = ["router.type=softmax", "router.k=1", "router.renormalize=false", "router.noise=0", "router.balance=0",
         "router.z=0", "router.bias_rate=0", "granularity=1", "shared_experts=0"]  # fmt: skip
SIDES = {
    "default": [],
    "naive": [*(f"model.{side}.{change}" for change in NAIVE for side in ("vision", "text")), "train.guard.on=false"],
}
WINDOW = 32  # steps


def judge(run: Path, k: int) -> dict[str, Any]:
    """What became of a run: its held-out loss, whether it diverged, which layers collapsed. k: of the router."""
    if not (run / "eval.json").is_file():
        return {"loss": None, "diverged": True, "collapsed": []}
    report = json.loads((run / "eval.json").read_text())
    values = [record["loss"] for record in read_lines(run / "metrics.jsonl")]
    medians = [statistics.median(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW // 2)]
    loss = report["splits"]["val"]["loss"]["sum"]
    diverged = not math.isfinite(loss) or not math.isfinite(medians[-1]) or medians[-1] > 1.1 * min(medians)
    collapsed = []
    for layer, found in report["experts"].items():
        share_E = found["share"]
        even = 1 / len(share_E)
        starved = sum(share < even / 10 for share in share_E)
        if starved >= len(share_E) / 2 or max(share_E) > even + 0.7 * (1 / k - even):
            collapsed.append(layer)
    return {"loss": loss, "diverged": diverged, "collapsed": collapsed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="characters")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--runs", type=Path, default=Path("runs/seed_sweep"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = 1 if args.jobs > 1 else torch.get_num_threads()

    def folder_of(side: str, rate: float, seed: int) -> Path:
        return args.runs / f"{side}-{rate:g}-{seed}"

    def pretrain(folder: Path, *changes: str) -> None:
        log = args.runs / "logs" / f"{folder.name}.txt"
        vlmoe("pretrain", args.recipe, f"run.dir={folder}", "eval.pictures=0", "eval.samples=128", *changes,
              threads=threads, log=log)  # fmt: skip

    tokenizers = args.runs / "tokenizers"
    if not (tokenizers / "eval.json").is_file():
        pretrain(tokenizers, "train.steps=1")

    def run(job: tuple[str, float, int]) -> None:
        side, rate, seed = job
        folder = folder_of(*job)
        if not (folder / "eval.json").is_file() and not (folder / "failed").is_file():
            path = f"data.visual_tokenizer.path={tokenizers / 'tokenizers'}"
            try:
                pretrain(folder, path, f"seed={seed}", f"train.steps={args.steps}", f"train.lr={rate}", *SIDES[side])
            except UserError:  # what the run says is in its log
                (folder / "failed").touch()
        print(folder.name, flush=True)

    jobs = [(side, rate, seed) for seed in args.seeds for rate in args.rates for side in SIDES]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, jobs))
    chosen = {side: load_recipe(args.recipe, changes).model.vision for side, changes in SIDES.items()}
    ks = {side: found.router.k * found.granularity for side, found in chosen.items()}
    found = [
        {"side": side, "lr": rate, "seed": seed, **judge(folder_of(side, rate, seed), ks[side])}
        for side, rate, seed in jobs
    ]
    shares = {}
    rows = []
    for side in SIDES:
        runs = [r for r in found if r["side"] == side]
        shares[side] = {
            "runs": len(runs),
            "diverged": sum(r["diverged"] for r in runs),
            "collapsed": sum(bool(r["collapsed"]) for r in runs),
        }
        for rate in args.rates:
            at = [r for r in runs if r["lr"] == rate]
            losses = [r["loss"] for r in at if r["loss"] is not None and math.isfinite(r["loss"])]
            span = f"{statistics.fmean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]" if losses else "-"
            bad = [sum(r["diverged"] for r in at), sum(bool(r["collapsed"]) for r in at)]
            rows.append([side, f"{rate:g}", *(f"{n} of {len(at)}" for n in bad), span])
    print(table(["router", "learning rate", "diverged", "collapsed", "held-out loss, mean [least, most]"], rows))
    if args.json:
        about = {"shares": shares, "runs": found, "steps": args.steps, "overrides": SIDES} | provenance()
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
