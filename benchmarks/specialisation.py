"""What experts specialise in, and whether they are its cause: several runs of one recipe, one for each seed.

    python benchmarks/specialisation.py runs/characters-[012] --json results/specialisation.json

Of each run: its findings on held-out data (`vlmoe.interpret.findings.find_run`, every expert taken away in turn, tokens
going to the next best). Printed: for each layer, modality and factor the mutual information of a token's first expert
and the factor's value, less what is told when whole samples exchange their values, as a share of the factor's entropy
(mean and all seeds); and how many pairs of an expert and a value look specialised, are causes, or look specialised and
are no cause. Then the planted model, in which the truth is known.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from downstream import table
from provenance import provenance
from vlmoe.interpret.findings import find_run
from vlmoe.interpret.planted import validate


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's findings that is kept."""
    experts = {
        site: {
            "worst": max(e["ablation"]["loss"]["delta"] for e in rows),  # nats that the mean loss rises by without it
            "least": min(e["ablation"]["loss"]["delta"] for e in rows),
        }
        for site, rows in found["experts"].items()
        if rows and rows[0]["ablation"]
    }
    keep = ("bits", "chance", "chance_high", "sample_chance", "sample_chance_high", "share", "tokens")
    information = {
        site: {factor: {key: row[key] for key in keep} for factor, row in rows.items()}
        for site, rows in found["information"].items()
    }
    return {"information": information, "experts": experts, "agreement": found["agreement"]}


def tables(runs: list[dict[str, Any]]) -> str:
    sites = list(runs[0]["information"])
    information = []
    for site in sites:
        for factor in runs[0]["information"][site]:
            rows = [run["information"].get(site, {}).get(factor) for run in runs]
            known = [row for row in rows if row]
            if len(known) < len(runs):
                continue
            shares = [100 * row["share"] for row in known]
            above = sum(row["bits"] > max(row["chance_high"], row.get("sample_chance_high", 0)) for row in known)
            each = ", ".join(f"{share:.1f}" for share in shares)
            information.append([site, factor, f"{statistics.fmean(shares):.1f} ({each})", f"{above} of {len(known)}"])
    agreement = []
    for site in sites:
        rows = [run["agreement"][site] for run in runs if site in run["agreement"]]
        if rows:
            keys = ("pairs", "causes", "looks_specialised_but_is_not", "cause_without_lift")
            counts = [[len(r[k]) if isinstance(r.get(k), list) else r.get(k, 0) for r in rows] for k in keys]
            rank = ", ".join("-" if r["spearman"] is None else f"{r['spearman']:.2f}" for r in rows)
            agreement.append([site, rank, *(", ".join(map(str, row)) for row in counts)])
    head = ["layer", "rank correlation of lift and harm", "pairs", "causes", "looks specialised, no cause",
            "cause without preference"]  # fmt: skip
    return "\n\n".join(
        [
            table(["layer", "factor", "share of the factor's entropy, %", "above chance"], information),
            table(head, agreement),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--samples", type=int, default=512, help="held-out ones, of each kind")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, help="print the tables of a results file, run nothing")
    args = parser.parse_args()
    if args.show:
        print(tables(list(json.loads(args.show.read_text())["runs"].values())))
        return
    if not args.runs:
        parser.error("give the folders of one or more finished runs, or --show FILE")
    runs = {run.name: summary(find_run(run, samples=args.samples)) for run in args.runs}
    print(tables(list(runs.values())))
    planted = validate()
    print(json.dumps(planted, indent=1, default=str))
    if args.json:
        about = {"runs": runs, "planted": planted, "samples": args.samples} | provenance()
        args.json.write_text(json.dumps(about, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
