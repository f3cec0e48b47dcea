"""What the codes of the visual tokenizer are worth: how distinct they are, how well used, and what they restore.

    python benchmarks/visual_codes.py --json benchmarks/results/visual_codes.json

Trains the tokenizer of a recipe as `vlmoe pretrain` does, once for each seed, and looks at held-out images. A patch of
one colour is "plain"; in the world of `characters` four of five are, so that figures over all patches say little about
the rest, the "figures". Leave one part out with `--without whitening` or `--without scatter`; results are joined to
the file by label.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream import table
from provenance import provenance
from vlmoe.config import Recipe, load_recipe
from vlmoe.data import visual_tokenizer
from vlmoe.data.loader import held_out
from vlmoe.data.text_tokenizer import build_text_tokenizer
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.data.visual_training import code_use, train_vq
from vlmoe.train.pretrain import _images

BF16, FP32 = 2**-8, 2**-20  # rounding of a cosine near 1

COLUMNS = {
    "unexplained": "pixels' variance unexplained",
    "unexplained_figures": "of figures",
    "used": "codes in use",
    "perplexity": "perplexity",
    "perplexity_figures": "of figures",
    "perplexity_plain": "of plain patches",
    "directions": "directions of 16",
    "rivals": "codes within bf16 rounding of the best",
    "gap": "gap, median",
    "tied_bf16": "gap within bf16 rounding",
    "tied_fp32": "within fp32 rounding",
    "differ_bf16": "codes others in bf16",
    "seconds": "seconds to train",
}


def patches(image_BCHW: Tensor, patch: int) -> Tensor:
    """(B, P, C): pixels of each patch."""
    return F.pixel_unshuffle(image_BCHW, patch).flatten(2).transpose(1, 2)


@torch.no_grad()
def measure(tokenizer: VQTokenizer, image_BCHW: Tensor) -> dict[str, float]:
    target_BPC = patches(image_BCHW.float() / 127.5 - 1.0, tokenizer.patch)
    by_colour = target_BPC.unflatten(2, (3, -1))
    plain_BP = (by_colour.amax(-1) == by_colour.amin(-1)).all(-1)
    z_BPZ = tokenizer.features(image_BCHW)
    cosine_BPV = z_BPZ @ tokenizer.codebook_VZ.T
    best_BP2, codes_BP = cosine_BPV.topk(2, dim=-1).values, tokenizer.nearest(z_BPZ)
    gap_BP = best_BP2[..., 0] - best_BP2[..., 1]
    restored_BPC = patches(tokenizer.pixels(F.embedding(codes_BP, tokenizer.codebook_VZ)), tokenizer.patch)
    error_BP = (restored_BPC - target_BPC).square().mean(-1)
    figures_NC = target_BPC[~plain_BP]
    with torch.autocast("cpu", torch.bfloat16):  # the encoder as autocast would run it, if it were let
        rounded_BPZ = inspect.unwrap(type(tokenizer).features)(tokenizer, image_BCHW)
        rounded_BP = (rounded_BPZ @ tokenizer.codebook_VZ.T).argmax(-1)
    share_Z = torch.linalg.eigvalsh(torch.cov(z_BPZ.flatten(0, 1).T))
    return {
        "unexplained": float(error_BP.mean() / target_BPC.var()),
        "unexplained_figures": float(error_BP[~plain_BP].mean() / figures_NC.var()),
        **code_use(codes_BP, tokenizer.codes),
        "perplexity_figures": code_use(codes_BP[~plain_BP], tokenizer.codes)["perplexity"],
        "perplexity_plain": code_use(codes_BP[plain_BP], tokenizer.codes)["perplexity"],
        "directions": float(share_Z.sum() ** 2 / share_Z.square().sum()),
        "rivals": float((cosine_BPV >= best_BP2[..., :1] - BF16).sum(-1).float().mean()) - 1,
        "gap": float(gap_BP.median()),
        "gap_1_percent": float(gap_BP.flatten().quantile(0.01)),
        "tied_bf16": float((gap_BP <= BF16).float().mean()),
        "tied_fp32": float((gap_BP <= FP32).float().mean()),
        "differ_bf16": float((rounded_BP != codes_BP).float().mean()),
    }


def run(recipe: Recipe, image_BCHW: Tensor, seed: int) -> dict[str, float]:
    text = build_text_tokenizer(recipe)
    images = list(_images(recipe, text, "pair", torch.device("cpu")))
    began = time.perf_counter()
    tokenizer, _ = train_vq(
        recipe.data.visual_tokenizer, recipe.model, iter(images), image_BCHW, seed, torch.device("cpu")
    )
    return {"seed": seed, **measure(tokenizer, image_BCHW), "seconds": time.perf_counter() - began}


def leave_out(part: str) -> None:
    if part == "whitening":
        visual_tokenizer._whitener = lambda covariance_ZZ: torch.eye(len(covariance_ZZ))
    elif part == "scatter":
        VQTokenizer._scatter = lambda self, z_NZ, generator: None  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="characters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without", choices=["whitening", "scatter"])
    parser.add_argument("--label", help="of these rows; default: what is left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    leave_out(args.without or "")
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        recipe = load_recipe(args.recipe, ["data.workers=0", f"seed={seed}"])
        unseen = held_out(recipe, build_text_tokenizer(recipe), "val", "pair", 0, 512).image_BCHW
        assert unseen is not None
        rows.append(run(recipe, unseen, seed))
        print({name: round(value, 5) for name, value in rows[-1].items()}, flush=True)
    label = args.label or (f"without {args.without}" if args.without else "as it is")
    results = {label: {"recipe": args.recipe, "rows": rows, **provenance()}}
    if args.json and args.json.exists():
        results = json.loads(args.json.read_text()) | results
    means = {name: {key: statistics.mean(r[key] for r in found["rows"]) for key in COLUMNS}
             for name, found in results.items()}  # fmt: skip
    cells = [[title, *(f"{mean[key]:.4g}" for mean in means.values())] for key, title in COLUMNS.items()]
    print(table(["mean over seeds", *means], cells))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
