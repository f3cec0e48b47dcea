"""Is a sparse model better started from a dense one half-way (sparse upcycling) than from nothing, for the same FLOPs?

    vlmoe study world-names
    python benchmarks/upcycle.py runs/study-world-names --json benchmarks/results/upcycle.json

Takes a study's finished dense runs of the shorter length, fills the sparse model's experts with each (`init=RUN`) and
trains it for as many steps on other samples, at the study's settings; with the study's gates and with sigmoid ones,
which start larger. Beside it stand the study's own runs of the longer length: the dense model and the sparse model from
nothing, each of about the FLOPs of both parts together. Loss is that of the study's report, on the same held-out pairs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

from downstream import table
from provenance import provenance
from vlmoe.study.declare import Budget
from vlmoe.study.plan import read_report
from vlmoe.study.schedule import Job, Meter, run_jobs

OTHER_SAMPLES = 1000  # added to the seed
GATES = ("softmax", "sigmoid")


def job_of(study: Path, out: Path, dense: str, sparse: str, steps: int, seed: int, gates: str) -> Job:
    """Training of `sparse`, as the study did it, but from the dense run's weights."""
    start, own = (study / "runs" / f"{model}-{steps}-seed{seed}" for model in (dense, sparse))
    for folder in (start, own):
        if not (folder / "result.json").is_file():
            raise SystemExit(f"{folder}: no finished run; run the study first")
    spec = copy.deepcopy(json.loads((own / "job.json").read_text()))
    name = f"{gates}-{steps}-seed{seed}"
    spec["recipe"] |= {"init": str(start), "seed": seed + OTHER_SAMPLES, "run": {"dir": str(out / name)}}
    spec["recipe"]["init_allow_inexact"] = True  # gates of one expert a token are not those of the dense layer
    for side in ("vision", "text"):
        spec["recipe"]["model"][side]["router"]["type"] = gates
    return Job(name, out / name, spec, steps=steps)


def say(event: str, left: list[Job]) -> None:
    if event:
        print(f"{event}; {len(left)} left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("--dense", default="dense-w64-d4")
    parser.add_argument("--sparse", default="top1-shared-e16")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[1200, 2400], help="of each part; of the study's longer runs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/upcycle"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    half, whole = args.steps
    jobs = {
        (gates, seed): job_of(args.study, args.out, args.dense, args.sparse, half, seed, gates)
        for gates in args.gates
        for seed in args.seeds
    }
    for job in jobs.values():
        job.check()
    args.out.mkdir(parents=True, exist_ok=True)
    run_jobs(list(jobs.values()), args.jobs, Meter(args.out, Budget()), say)
    unfinished = [job.id for job in jobs.values() if not job.done]
    if unfinished:
        raise SystemExit(f"{args.out}: not finished: {', '.join(unfinished)}; see their log.txt")

    ran = {(r["model"], r["steps"], r["seed"]): r for r in read_report(args.study)["runs"] if r["stage"] == "main"}
    rows: list[dict[str, Any]] = []

    def add(what: str, losses: list[float], flops: list[float]) -> None:
        row = {"model": what, "flops": statistics.fmean(flops), "loss": statistics.fmean(losses), "by_seed": losses}
        rows.append(row)

    for model in (args.dense, args.sparse):
        found = [ran[model, whole, seed] for seed in args.seeds]
        add(f"{model}, {whole:,} steps", [r["loss"] for r in found], [r["flops"] for r in found])
    both = [ran[args.dense, half, s]["flops"] + ran[args.sparse, half, s]["flops"] for s in args.seeds]
    for gates in args.gates:
        what = f"{args.dense} for {half:,}, then {args.sparse} for {half:,}, {gates} gates"
        add(what, [jobs[gates, seed].read()["loss"] for seed in args.seeds], both)
    cells = [
        [r["model"], f"{r['flops'] / 1e12:.2f}", f"{r['loss']:.3f}", ", ".join(f"{x:.3f}" for x in r["by_seed"])]
        for r in rows
    ]
    print(table(["model", "TFLOPs", "loss", "by seed"], cells))
    if args.json:
        results = {"rows": rows, "seeds": args.seeds} | provenance()
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
