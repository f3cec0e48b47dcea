"""Random views: their shapes and colours, and that a run shows the same ones again, in training alone."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmoe.config import AugmentConfig, FinetuneRecipe, Recipe, RecipeError, from_mapping
from vlmoe.data.augment import View, turn_hue
from vlmoe.data.batch import Batch
from vlmoe.data.counter import stream
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.loader import EvalData, TrainData, open_split
from vlmoe.data.images import decode_image
from vlmoe.data.loader import StepData, held_out, make_loader
from vlmoe.data.text_tokenizer import build_text_tokenizer


def view(number: int = 0, **changes: float) -> View:
    return View(AugmentConfig(**changes), stream(7, number))


def place(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a crop's corners can be read from it."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(array)


def shown(image: Image.Image, view: View, format: str = "PNG", size: int = 16) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=95)
    return decode_image(buffer.getvalue(), "k", size, 10**9, view)


def test_crops_have_the_shapes_and_places_of_random_resized_crop() -> None:
    width, height = 300, 200
    boxes = np.array([view(i, crop=0.25).box(width, height) for i in range(1000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    area = w * h / (width * height)
    assert area.min() > 0.245 and area.max() > 0.85  # 8/9 is what fits of shape 4/3
    assert abs(np.log(w / h)).max() < np.log(4 / 3) + 0.02
    small = area < 0.5  # these fit whatever their shape, so they are uniform
    assert abs(area[small].mean() - 0.375) < 0.01
    assert abs(np.log(w / h)[small].mean()) < 0.02
    left = boxes[small, 0] / (width - w[small])
    assert abs(left.mean() - 0.5) < 0.03 and left.min() < 0.02 and left.max() > 0.98


def test_an_image_too_narrow_for_any_crop_gives_its_middle() -> None:
    assert view(crop=1.0, ratio=1.0).box(300, 100) == (100, 0, 200, 100)
    assert view(crop=1.0, ratio=1.5).box(100, 400) == (0, 125, 100, 275)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(90, 60), (401, 603)])
def test_the_pixels_are_those_of_the_box(format: str, width: int, height: int) -> None:
    """JPEGs much larger than needed are decoded at a part of their size; the box must follow."""
    for i in range(4):
        chosen = view(i, crop=0.1)
        left, top, right, bottom = chosen.box(width, height)  # type: ignore[misc]
        found = shown(place(width, height), chosen, format).astype(float)
        x = left + (np.arange(16) + 0.5) * (right - left) / 16 - 0.5
        y = top + (np.arange(16) + 0.5) * (bottom - top) / 16 - 0.5
        limit = 6 if format == "PNG" else 12
        assert np.abs(found[:, :, 0] - 255 * x / (width - 1)).max() < limit
        assert np.abs(found[:, :, 1] - (255 * y / (height - 1))[:, None]).max() < limit


def test_without_a_crop_the_centre_square_is_shown() -> None:
    image = place(90, 60)
    assert (shown(image, view()) == shown(image, None)).all()  # type: ignore[arg-type]


def test_mirrored_as_often_as_asked_and_after_the_image_is_upright() -> None:
    image = place(32, 32)
    plain = shown(image, view())
    mirrored = [(shown(image, view(i, flip=0.25)) == plain[:, ::-1]).all() for i in range(100)]
    assert 12 < sum(mirrored) < 38
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    found = decode_image(buffer.getvalue(), "k", 16, 10**9, view(flip=1.0))
    assert (found == plain[:, ::-1]).all()


def test_colours_change_within_their_bounds() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    levels = np.array([view(i, brightness=0.4).change(grey).getpixel((0, 0))[0] for i in range(300)])  # type: ignore[index]
    assert levels.min() >= 60 and levels.max() <= 140
    assert levels.min() < 64 and levels.max() > 136
    halves = Image.new("RGB", (8, 8), (200, 40, 40))
    halves.paste((40, 40, 200), (0, 0, 4, 8))
    spreads = []
    for i in range(100):
        changed = view(i, saturation=1.0).change(halves)
        blue = np.asarray(changed)[0, 0].astype(int)
        spreads.append(blue.max() - blue.min())  # 160 in the image
        if blue.max() < 255:  # nothing is cut off: as light as before
            assert abs(changed.convert("L").getpixel((0, 0)) - halves.convert("L").getpixel((0, 0))) <= 2  # type: ignore[operator]
        even = np.asarray(view(i, contrast=0.5).change(halves)).astype(int)
        assert np.abs(even.mean() - np.asarray(halves).mean()) < 12
    assert min(spreads) < 20 and max(spreads) > 200
    assert (np.asarray(view(crop=0.5).change(halves)) == np.asarray(halves)).all()


def test_a_third_of_a_turn_makes_green_of_red() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert np.abs(np.asarray(turn_hue(red, 1 / 3)).astype(int) - (0, 255, 0)).max() < 8
    assert np.abs(np.asarray(turn_hue(red, -1 / 3)).astype(int) - (0, 0, 255)).max() < 8
    assert (np.asarray(turn_hue(red, 0.0)) == np.asarray(red)).all()


def test_a_view_follows_from_its_numbers_and_one_change_moves_no_other() -> None:
    assert view(3, crop=0.5).box(120, 100) == view(3, crop=0.5, hue=0.1, flip=1.0).box(120, 100)
    assert view(3, crop=0.5).box(120, 100) != view(4, crop=0.5).box(120, 100)
    rng = stream(7, 3)
    first, second = (View(AugmentConfig(crop=0.5), rng) for _ in range(2))
    assert first.box(120, 100) != second.box(120, 100)
    assert pickle.loads(pickle.dumps(first)).box(120, 100) == first.box(120, 100)


# ------------------------------------------------------------------------------------------------------ in a run's data
def recipe_of(source: dict[str, object], **data: object) -> Recipe:
    return from_mapping(
        {
            "model": {"image_size": 16, "patch": 4, "max_text": 12, "vocabulary": 64, "width": 24, "heads": 2},
            "data": {
                "sources": [{"kind": "image", "held_out": 0.25, **source}],
                "batch": {"image": 6, "text": 0, "pair": 0},
                "augment": {"crop": 0.3, "hue": 0.1, "brightness": 0.2},
                "stream": {"readers": 2, "buffer": 4},
                **data,
            },
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, each of one blue and of all places; as a folder, as shards and as classes."""
    root = tmp_path_factory.mktemp("images")
    (root / "a").mkdir()
    with tarfile.open(root / "s.tar", "w") as tar:
        for i in range(8):
            image = Image.merge("RGB", (*place(40, 30).split()[:2], Image.new("L", (40, 30), 20 * i)))
            image.save(root / "a" / f"{i}.png")
            tar.add(root / "a" / f"{i}.png", f"{i}.png")
    return root


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_the_view_is_a_function_of_the_micro_batch(source: str, folder: Path) -> None:
    about: dict[str, object] = {"type": "folder", "path": f"{folder}/a"}
    if source == "stream":
        about = {"type": "shards", "path": f"{folder}/s.tar", "read": "stream"}
    recipe = recipe_of(about)
    tokenizer = build_text_tokenizer(recipe)
    steps = [StepData(recipe, tokenizer)[n].batches["image"] for n in range(4)]
    by_key: dict[str, list[bytes]] = {}
    for batch in steps:
        assert batch.image_BCHW is not None
        for key, image in zip(batch.keys, batch.image_BCHW, strict=True):
            by_key.setdefault(key, []).append(image.numpy().tobytes())
    assert all(len(set(views)) == len(views) > 1 for views in by_key.values())  # another one in every epoch
    for n, step in zip((2, 3), make_loader(StepData(recipe, tokenizer), 2, 4, workers=2), strict=True):
        resumed = step.batches["image"].image_BCHW
        assert resumed is not None and torch.equal(resumed, steps[n].image_BCHW)  # type: ignore[arg-type]
    recipe.seed += 1
    other = StepData(recipe, tokenizer)[0].batches["image"]
    assert not torch.equal(other.image_BCHW, steps[0].image_BCHW)  # type: ignore[arg-type]


def test_what_is_scored_is_shown_as_it_is(folder: Path) -> None:
    recipe = recipe_of({"type": "folder", "path": f"{folder}/a"})
    plain = recipe_of({"type": "folder", "path": f"{folder}/a"}, augment={})
    tokenizer = build_text_tokenizer(recipe)
    seen, expected = (held_out(r, tokenizer, "val", "image", 0, 2).image_BCHW for r in (recipe, plain))
    assert seen is not None and torch.equal(seen, expected)  # type: ignore[arg-type]
    trained, unchanged = (StepData(r, tokenizer)[0].batches["image"] for r in (recipe, plain))
    assert trained.keys == unchanged.keys
    assert torch.equal(trained.patch_mask_BP, unchanged.patch_mask_BP)  # type: ignore[arg-type]
    assert not torch.equal(trained.image_BCHW, unchanged.image_BCHW)  # type: ignore[arg-type]


def test_fine_tuning_changes_training_images_alone(folder: Path) -> None:
    data = {"type": "files", "train": {"file": str(folder)}, "eval": [{"file": str(folder)}], "batch": 8}
    given = {"task": "classify", "model": {"image_size": 16, "patch": 4}, "data": {**data, "augment": {"crop": 0.3}}}
    recipe = from_mapping(given, schema=FinetuneRecipe)

    def collate(examples: list[Example], rngs: object, training: bool) -> dict[str, Batch]:
        images = np.stack([e.images[0] for e in sorted(examples, key=lambda e: e.key)])
        return {"image": Batch(keys=[e.key for e in examples], image_BCHW=torch.from_numpy(images))}

    examples = open_split(recipe, "train")
    train = TrainData(recipe, examples, collate)
    images = [train[n].batches["image"].image_BCHW for n in (0, 1, 0)]
    evaluated = EvalData(examples, collate, 8, 8)[0].batches["image"].image_BCHW
    assert torch.equal(images[0], images[2])  # type: ignore[arg-type]
    assert not torch.equal(images[0], images[1])  # type: ignore[arg-type]
    assert not torch.equal(images[0], evaluated)  # type: ignore[arg-type]
    assert evaluated is not None
    assert (evaluated.numpy() == np.stack([examples[i].images[0] for i in range(8)])).all()


def test_images_of_the_world_and_stored_codes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"key 'data\.augment' got \{'crop': 0\.3.*wanted nothing.*state places"):
        recipe_of({"type": "world", "held_out": 0.01}, world={"image_size": 16, "grid": 1, "max_objects": 1})
    with pytest.raises(RecipeError, match=r"key 'data\.augment' got .*wanted nothing.*stored visual codes"):
        recipe_of({"type": "folder", "path": "x"}, visual_tokenizer={"type": "codes"})
    with pytest.raises(RecipeError, match=r"'data\.augment' got \{'flip': 0\.5\}.*embedded world"):
        from_mapping({"task": "vqa", "data": {"augment": {"flip": 0.5}}}, schema=FinetuneRecipe)
    for key, value in {"crop": 0.0, "ratio": 0.5, "hue": 0.6, "flip": 1.5, "contrast": -0.1}.items():
        with pytest.raises(RecipeError, match=rf"'data\.augment\.{key}' got {value}"):
            recipe_of({"type": "folder", "path": "x"}, augment={key: value})
