"""The data of a recipe as a whole: counts made by hand on small files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.data.test_files import png
from tests.data.test_near import icons
from vlmoe.cli import app
from vlmoe.config import Recipe, from_mapping, to_yaml
from vlmoe.data.check_recipe import check_recipe


def pictures(folder: Path, numbers: list[int], captions: list[str]) -> str:
    """Pairs: the picture of each number with its caption."""
    folder.mkdir()
    lines = []
    for i, (number, caption) in enumerate(zip(numbers, captions, strict=True)):
        (folder / f"{i:03d}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def plan(folder: Path, **more: Any) -> Recipe:
    """Two sources to train on, 3 to 1, and one for validation that shares two pictures and a caption with them."""
    first = pictures(folder / "a", [*range(40), 0, 1], [f"red number {i}" for i in range(40)] + ["red number 0", "red"])
    second = pictures(folder / "b", list(range(50, 60)), ["red " * 30] * 10)
    val = pictures(folder / "v", [0, 1, *range(100, 138)], ["red number 3", *(f"blue {i}" for i in range(39))])
    sources = [
        {"type": "folder", "path": path, "held_out": share, "weight": weight}
        for path, share, weight in ((first, 0, 3), (second, 0, 1), (val, 1, 1))
    ]
    return from_mapping(
        {
            "model": {"image_size": 8, "patch": 4, "max_text": 12, "vocabulary": 200, "width": 8, "heads": 2},
            "data": {"sources": sources, "batch": {"image": 0, "text": 0, "pair": 8}, "workers": 0},
            "train": {"steps": 270, "warmup": 1},
            **more,
        }
    )


def test_a_recipes_data_are_counted_source_by_source(tmp_path: Path) -> None:
    report = check_recipe(plan(tmp_path))
    first, second = report["sources"]
    assert (first["share"], first["samples"], first["looked_at"], first["bad"]) == (0.75, 42, 42, 0)
    assert first["repeats"] == pytest.approx(270 * 8 * 0.75 / 42)
    assert second["repeats"] == pytest.approx(270 * 8 * 0.25 / 10)
    assert (first["cut"], second["cut"]) == (0, 1)
    assert first["same_captions"] == pytest.approx(1 / 42)
    assert first["same_images"] == pytest.approx(2 / 42)
    assert second["same_captions"] == pytest.approx(0.9)
    assert (first["unknown"], second["unknown"]) == (0, 0)
    held = report["held_out"]["pair"]
    assert (held["samples"], held["captions"], held["images"]) == (40, 1 / 40, 2 / 40)
    said = "\n".join(report["problems"])
    for words in (
        "each sample is shown 54 times", "100% of the texts are cut at model.max_text = 12", "90% of the captions",
        "held-out pair: 5.0% of its different images are in training, too",
    ):  # fmt: skip
        assert words in said
    assert "/a:" not in said  # the first source is sound
    json.dumps(report)


def test_images_nearly_the_same_are_told_apart_from_copies(tmp_path: Path) -> None:
    """Icons: one is in training twice, once as JPEG; another as JPEG among what is held out."""
    for name, first, last, again in (("a", 0, 40, 3), ("v", 50, 90, 7)):
        folder = tmp_path / name
        folder.mkdir()
        images = icons(90)
        for i in range(first, last):
            Image.fromarray(images[i]).save(folder / f"{i}.png")
        Image.fromarray(images[again]).save(folder / "again.jpg", quality=70)
        for file in [*folder.iterdir()]:
            file.with_suffix(".txt").write_text(f"picture {file.stem}")
    (tmp_path / "more").mkdir()
    recipe = plan(tmp_path / "more")
    recipe.model.image_size, recipe.model.patch = 48, 8
    recipe.data.sources = [
        replace(recipe.data.sources[0], path=str(tmp_path / n), held_out=h) for n, h in (("a", 0), ("v", 1))
    ]
    report = check_recipe(recipe)
    row, held = report["sources"][0], report["held_out"]["pair"]
    assert (row["same_images"], row["near_images"], set(row["near"])) == (0, 1 / 41, {"3.png", "again.jpg"})
    assert (held["images"], held["near_images"], held["near"]) == (0, 1 / 41, ["again.jpg", "7.png"])
    assert any("2.4% of its different images are nearly the same as one in training, as again.jpg" in line
               for line in report["problems"])  # fmt: skip


def test_names_may_occur_often(tmp_path: Path) -> None:
    recipe = plan(tmp_path)
    assert any("of the captions occurred before" in line for line in check_recipe(recipe)["problems"])
    recipe.data.masking.pair_text = 1
    assert not any("of the captions occurred before" in line for line in check_recipe(recipe)["problems"])


def test_bad_samples_and_few_held_out_ones_are_problems(tmp_path: Path) -> None:
    recipe = plan(tmp_path)
    (tmp_path / "a" / "003.png").write_bytes(b"none")
    recipe.data.sources = recipe.data.sources[:1]
    recipe.data.sources[0].held_out = 0.05
    report = check_recipe(recipe)
    looked = report["sources"][0]
    if looked["bad"]:  # it may be the one that is held out
        assert looked["reasons"] == {"not an image of a known format": 1}
        assert any("of the samples cannot be used" in line for line in report["problems"])
    assert any("held-out pair: " in line and "too few" in line for line in report["problems"])
    assert report["held_out"]["pair"]["samples"] + looked["samples"] == 42


def test_the_command_takes_a_recipe_and_ends_with_a_verdict(tmp_path: Path) -> None:
    recipe = plan(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(recipe))
    run = CliRunner()
    result = run.invoke(app, ["data", "check", str(file), "--samples", "20"], env={"COLUMNS": "160"})
    assert result.exit_code == 1, result.output
    assert "Look at the problems above before you train." in result.output
    sound = ["train.steps=5", "model.max_text=40"]
    result = run.invoke(app, ["data", "check", str(file), *sound, "--json"])
    found = json.loads(result.output)
    assert [row["looked_at"] for row in found["sources"]] == [42, 10]
    assert not any("shown" in line or "cut" in line for line in found["problems"])
    result = run.invoke(app, ["data", "check", str(tmp_path / "a"), "train.steps=5"])
    assert "only a recipe takes overrides" in str(result.exception)
