"""The figure that a study was declared for, from its report to benchmarks/results/headline.json.

    python benchmarks/headline.py runs/study/NAME

The setting is the study's own key `headline`, written down before its runs; here is none to choose.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlmoe.config import UserError
from vlmoe.study.headline import headline_of
from vlmoe.study.plan import read_report

RESULT = Path(__file__).parent / "results" / "headline.json"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study's folder, or its study.json")
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write it")
    args = parser.parse_args(words)
    try:
        found = headline_of(read_report(args.study))
    except UserError as error:
        sys.exit(f"{args.study}: {error}")
    args.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if found["low"] is not None else " (no interval)"
    bound = f"{found['bound']} " if found["bound"] else ""
    value = "unknown" if found["flops_saved"] is None else f"{bound}{found['flops_saved']:.2f}"
    print(f"FLOPs saved: {value}{interval}, {len(found['setting']['seeds'])} seeds; {args.json}")


if __name__ == "__main__":
    main()
