"""What is held out and occurs in training all the same, against pictures and captions themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmoe.config import Recipe, RecipeError, WorldConfig, load_recipe
from vlmoe.data.duplicates import seen_in_training
from vlmoe.data.loader import HELD_OUT_SEED
from vlmoe.data.world import World
from vlmoe.data.world.scene import is_held_out

BASE = "characters"


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(BASE, ["data.batch={pair: 40, image: 0, text: 0}", *overrides])


def drawn(recipe: Recipe, split: str, seed: int, count: int) -> list[tuple[bytes, str]]:
    """Picture and caption of the first samples of a split."""
    world = World(recipe.data.world, "pair", split=split, seed=seed)
    samples = [world[i] for i in range(count)]
    return [(s.image.tobytes(), s.text) for s in samples if s.image is not None and s.text is not None]


def shares(held: list[tuple[bytes, str]], train: list[tuple[bytes, str]]) -> dict[str, float]:
    """The same by comparing every picture."""
    pairs, pictures, captions = set(train), {picture for picture, _ in train}, {caption for _, caption in train}
    return {
        "samples": len(held),
        "pairs": float(np.mean([pair in pairs for pair in held])),
        "pictures": float(np.mean([pair[0] in pictures for pair in held])),
        "captions": float(np.mean([pair[1] in captions for pair in held])),
    }


def test_shares_are_those_of_the_pictures_and_captions_themselves() -> None:
    recipe = recipe_of("data.world={concepts: 11, max_objects: 1, colours: 1, grid: 2}", "train.accumulate=2", "seed=3")
    found = seen_in_training(recipe, ["val", "font"], 60, 25)
    train = drawn(recipe, "train", recipe.seed, 25 * 2 * 40)
    for split in ("val", "font"):
        assert found[split] == pytest.approx(shares(drawn(recipe, split, HELD_OUT_SEED, 60), train)), split
    assert found["val"]["captions"] > found["val"]["pictures"]  # places vary by pixels, words do not
    assert found["font"]["pictures"] == 0  # a face of its own


def test_in_a_narrow_world_longer_runs_see_more_of_what_is_held_out() -> None:
    """One icon, one colour, the whole picture: few pictures are left to hold out."""
    recipe = recipe_of("data.world={concepts: 0, icons: 2, max_objects: 1, colours: 1, grid: 2}")
    short, long = (seen_in_training(recipe, ["val"], 100, steps)["val"] for steps in (5, 500))
    assert 0 < short["pictures"] < long["pictures"]
    assert long["captions"] > 0.9
    assert long["pairs"] <= min(long["pictures"], long["captions"])


def test_scenes_kept_apart_never_occur_in_training() -> None:
    world = "data.world={concepts: 0, icons: 2, max_objects: 1, colours: 1, grid: 2"
    apart = recipe_of(world + ", held_out_scenes: 0.25}")
    found = seen_in_training(apart, ["val"], 200, 500)["val"]
    assert found["pictures"] == 0
    assert found["captions"] > 0.9  # the same words for other pictures
    train = World(apart.data.world, "pair", "train")
    free = World(recipe_of(world + "}").data.world, "pair", "train")
    count = 2000
    kept = np.mean([not is_held_out(free.scene(i), 0.25) for i in range(count)])
    assert kept == pytest.approx(0.75, abs=0.05)  # of the scenes that are drawn, not of different ones
    assert not any(is_held_out(train.scene(i), 0.25) for i in range(count))
    told = World(dataclasses.replace(apart.data.world, captions_in_text=1.0), "text", "train")
    assert not any(is_held_out(told.scene(i), 0.25) for i in range(200))


def test_a_world_with_no_scene_to_hold_out_says_so() -> None:
    few = WorldConfig(image_size=12, concepts=0, icons=1, max_objects=1, colours=1, grid=1, held_out_scenes=1e-6)
    with pytest.raises(RecipeError, match=r"data.world.held_out_scenes.*none is one of the split 'val'"):
        World(few, "image", "val")[0]


def test_equal_identities_are_equal_pictures() -> None:
    world = World(WorldConfig(image_size=48, concepts=2, max_objects=2, colours=2, grid=2), "pair")
    of: dict[object, bytes] = {}
    met = 0
    for i in range(4000):
        picture, caption = world.identity(i)
        assert caption == world.text(i)
        if picture in of:
            met += 1
            sample = world[i]
            assert sample.image is not None and sample.image.tobytes() == of[picture]
        elif len(of) < 400:
            image = world[i].image
            assert image is not None
            of[picture] = image.tobytes()
    assert met


def test_files_are_compared_by_their_pixels(tmp_path: Path) -> None:
    """Ten pictures over a hundred files: what is held out of the files is in training under another name."""
    for i in range(400):
        pixels = np.full((48, 48, 3), 20 * (i % 10), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:03}.png")
        (tmp_path / f"{i:03}.txt").write_text(f"number {i % 10} of {i}")
    source = f"data.sources=[{{type: folder, kind: pair, path: {tmp_path}}}]"
    found = seen_in_training(recipe_of(source), ["val"], 50, 50)["val"]
    assert found["samples"] >= 1
    assert found["pictures"] == 1
    assert found["pairs"] == found["captions"] == 0
