"""A short seeded run through the whole machine, whose losses are recorded.

Record anew, after a change that is meant to alter the numbers: python -m tests.golden.record
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from vlmoe.config import load_recipe
from vlmoe.train.pretrain import pretrain

CURVE = Path(__file__).parent / "curve.json"
KEYS = ("loss", "grad_norm", "pair/mlm", "pair/mim", "image/mim", "text/mlm", "vision/balance", "text/balance")
OVERRIDES = [
    "seed=7",
    "model.width=32",
    "model.depth=4",
    "model.heads=2",
    "model.codes=64",
    "model.vision.experts=4",
    "model.text.experts=4",
    "model.text.router.k=2",
    "data.batch.pair=8",
    "data.batch.image=4",
    "data.batch.text=4",
    "data.text_tokenizer.samples=500",
    "data.visual_tokenizer.steps=20",
    "data.workers=0",
    "train.steps=30",
    "train.warmup=5",
    "train.device=cpu",
]


def run(folder: Path) -> list[dict[str, float]]:
    """The recipe `characters`, shrunk, for 30 steps: the recorded metrics of each step."""
    pretrain(load_recipe("characters", [*OVERRIDES, f"run.dir={folder}"]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", *KEYS)} for line in lines]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curve = run(Path(folder) / "run")
    CURVE.write_text("[\n" + ",\n".join(json.dumps(line) for line in curve) + "\n]\n")
    print(f"{len(curve)} steps recorded, loss {curve[0]['loss']:.4f} -> {curve[-1]['loss']:.4f}: {CURVE}")
