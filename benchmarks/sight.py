"""Does a pre-trained model see which character a patch shows? A linear classifier on the patch's features, by depth.

    python benchmarks/sight.py runs/A runs/B --json benchmarks/results/sight.json

Scenes of one object, on patches as large as a cell of the world's grid, so that one patch holds the object. For the
pixels of that patch, what the projection makes of it and what each block makes of it: a logistic regression fitted on
some scenes, its accuracy on others. What it can tell is there for the model to use; chance is one over the number of
concepts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from downstream import table
from provenance import provenance
from vlmoe.data.world import World
from vlmoe.model.embed import patchify
from vlmoe.tasks.export import load_pretrained

FIRST = 10**7  # far from what training saw


def features(folder: str, scenes: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Where -> (scenes, width) of the patch that shows the object; and which concept it is."""
    trained = load_pretrained(folder)
    config, model = trained.recipe.data.world, trained.recipe.model
    if config.image_size != 3 * model.patch or config.max_objects != 1:
        raise SystemExit(f"{folder}: wanted one object a scene and patches of a third of the image")
    world = World(config, "image", "train")
    drawn = [world.scene(FIRST + i) for i in range(scenes)]
    things = [scene.objects[0] for scene in drawn]
    cell = torch.tensor([3 * row + column for row, column in (thing.cell for thing in things)])
    found: dict[str, list[Tensor]] = {"pixels": [], "projection": []}
    backbone = trained.model.backbone
    for depth, block in enumerate(backbone.blocks):
        seen = found.setdefault(f"block {depth}", [])
        block.register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        for start in range(0, scenes, 250):
            pictures = np.stack([world.picture(scene) for scene in drawn[start : start + 250]])
            image_BCHW = torch.from_numpy(pictures).permute(0, 3, 1, 2)
            part = backbone.image(image_BCHW, None)
            found["pixels"].append(patchify(image_BCHW.float(), model.patch))
            found["projection"].append(part.x_BTD[:, 1:])
            backbone([part])
    rows = torch.arange(scenes)
    at = {where: torch.cat(values)[:, -9:][rows, cell].numpy() for where, values in found.items()}
    return at, np.array([thing.concept.index for thing in things])


def scores(folder: str, scenes: int) -> dict[str, float]:
    at, label = features(folder, scenes)
    fitted = scenes * 4 // 5
    result = {}
    for where, values in at.items():
        scaled = StandardScaler().fit_transform(values)
        model = LogisticRegression(max_iter=300, C=0.1).fit(scaled[:fitted], label[:fitted])
        result[where] = round(float(model.score(scaled[fitted:], label[fitted:])), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of pre-trained runs")
    parser.add_argument("--scenes", type=int, default=5000, help="four fifths of them to fit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {Path(run).name: scores(run, args.scenes) for run in args.runs}
    places = list(next(iter(found.values())))
    print(table(["run", *places], [[name, *(f"{row.get(p, 0):.1%}" for p in places)] for name, row in found.items()]))
    if args.json:
        results = {"accuracy": found, "scenes": args.scenes} | provenance()
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
