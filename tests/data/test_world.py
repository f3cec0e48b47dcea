"""The embedded world's scenes, pictures, splits and dial."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import features

from vlmoe.config import RecipeError, UserError, WorldConfig
from vlmoe.data.sample import Sample
from vlmoe.data.world import FACTORS, MAX_CONCEPTS, SPLITS, World, available_splits
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.glyphs import HANDWRITING, HELD_OUT_FACE, TRAIN_FACES, handwriting, handwriting_pools
from vlmoe.data.world.render import mask_of
from vlmoe.data.world.scene import BACKGROUNDS, COLOURS, contrast

ALL = ["en", "de", "fr", "es"]
WIDE = WorldConfig(concepts=MAX_CONCEPTS, max_objects=4, colours=len(COLOURS), languages=ALL)


def digest(samples: list[Sample]) -> str:
    hashed = hashlib.sha256()
    for s in samples:
        hashed.update(s.key.encode())
        hashed.update(b"" if s.image is None else s.image.tobytes())
        hashed.update((s.text or "").encode())
        hashed.update(repr([(p.start, p.stop, sorted(p.factors.items())) for p in s.spans]).encode())
    return hashed.hexdigest()[:16]


def scenes_of(split: str, count: int, config: WorldConfig | None = None, kind: str = "pair"):
    world = World(config or WorldConfig(), kind, split=split)
    return [world.scene(i) for i in range(count)]


# Recorded once. A change here renumbers everyone's data: runs could no longer be compared with earlier ones.
INDEXES = [0, 1, 2, 17, 1000, 123_456_789, 2**40 + 7]
RECORDED = {
    ("text", "train", 0): "447a0bd0d550fe50",
    ("text", "val", 3): "c80fae95c46d865c",
}
RECORDED_SCENES = "11cfbf47295eceaf"
RECORDED_HANDWRITING = "4c30be04c8b4ec4c"
RECORDED_GLYPHS, GLYPHS_DRAWN_BY = "53167ffbdbca7227", "2.14.3"


@pytest.mark.parametrize(("kind", "split", "seed"), RECORDED)
def test_texts_are_the_recorded_ones(kind: str, split: str, seed: int) -> None:
    world = World(WIDE, kind, split=split, seed=seed)
    assert digest([world[i] for i in INDEXES]) == RECORDED[kind, split, seed]


def test_scenes_are_the_recorded_ones() -> None:
    world = World(WIDE, "pair")
    scenes = repr([(world.scene(i), world.text(i)) for i in INDEXES])
    assert hashlib.sha256(scenes.encode()).hexdigest()[:16] == RECORDED_SCENES


def test_handwriting_pixels_are_the_recorded_ones() -> None:
    assert digest([World(WorldConfig(concepts=10), "pair")[i] for i in INDEXES]) == RECORDED_HANDWRITING


@pytest.mark.skipif(features.version("freetype2") != GLYPHS_DRAWN_BY, reason="another FreeType draws other edges")
def test_glyph_pixels_are_the_recorded_ones() -> None:
    assert digest([World(WIDE, "image", split="font")[i] for i in INDEXES]) == RECORDED_GLYPHS


def test_a_sample_depends_on_nothing_but_its_name() -> None:
    world = World(WIDE, "pair", patch=8)
    there = [world[i] for i in INDEXES]
    fresh = World(WIDE, "pair", patch=8)
    back = [fresh[i] for i in reversed(INDEXES)][::-1]
    assert digest(there) == digest(back)
    assert [s.patch_factors for s in there] == [s.patch_factors for s in back]
    assert [world.text(i) for i in INDEXES] == [s.text for s in there]
    others = [World(WIDE, "pair", seed=1), World(WIDE, "pair", split="val"), World(WIDE, "image")]
    assert all(digest([w[i] for i in INDEXES]) != digest(there) for w in others)


def test_draws_go_on_past_the_first_block_and_are_even() -> None:
    draws = Draws("a name")
    words = [draws.word() for _ in range(300)]
    assert len(set(words)) == 300
    again = Draws("a name")
    assert [again.word() for _ in range(300)] == words
    counts = Counter(draws.below(7) for _ in range(7000))
    assert set(counts) == set(range(7))
    assert max(abs(n - 1000) for n in counts.values()) < 150  # five standard deviations


def test_protocol_and_shapes() -> None:
    for kind in ("image", "text", "pair"):
        world = World(WorldConfig(image_size=64), kind, patch=8)
        assert len(world) == 2**62
        sample = world[np.int64(5)]  # type: ignore[index]  # any integer will do
        assert sample.key == f"world/train/{kind}/0/5"
        assert (sample.text is None) == (kind == "image")
        assert (sample.image is None) == (kind == "text")
        assert bool(sample.patch_factors) == (kind != "text")
        if sample.image is not None:
            assert sample.image.shape == (64, 64, 3)
            assert sample.image.dtype == np.uint8
    assert not World(WorldConfig(), "pair")[5].patch_factors


# -------------------------------------------------------------------------------------------------------------- splits
def test_handwriting_pools_are_disjoint_and_complete() -> None:
    pools = handwriting_pools()
    numbers = [n for pool in pools.values() for digit in pool for n in digit]
    assert sorted(numbers) == list(range(1797))
    digits = handwriting()[1]
    assert all(digits[n] == d for pool in pools.values() for d, of_digit in enumerate(pool) for n in of_digit)
    assert all(len(of_digit) >= 5 for pool in pools.values() for of_digit in pool)


def test_train_never_shows_what_is_held_out() -> None:
    shown = [o for kind in ("pair", "image") for s in scenes_of("train", 4000, kind=kind) for o in s.objects]
    samples = {o.sample for o in shown if o.sample >= 0}
    combinations = {(o.concept.name, o.colour) for o in shown}
    faces = {o.face for o in shown}
    val, handwritten, font, attributes = (
        [o for s in scenes_of(split, 2000) for o in s.objects] for split in ("val", "handwriting", "font", "attributes")
    )
    assert len(samples) > 1000  # nearly every training sample was seen, so that the next lines mean something
    assert samples.isdisjoint(o.sample for o in val if o.sample >= 0)
    assert samples.isdisjoint(o.sample for o in handwritten)
    assert {o.sample for o in val}.isdisjoint(o.sample for o in handwritten)
    assert all(o.face == HANDWRITING for o in handwritten)
    assert faces == {*TRAIN_FACES, HANDWRITING}
    assert {o.face for o in font} == {HELD_OUT_FACE}
    assert len(combinations) == 40 * 7  # all that are allowed: an eighth of the colours is kept out of each concept
    assert combinations.isdisjoint((o.concept.name, o.colour) for o in attributes)
    assert len({(o.concept.name, o.colour) for o in attributes}) == 40
    for other in (val, handwritten, font):
        assert {(o.concept.name, o.colour) for o in other} <= combinations


def test_train_texts_describe_no_held_out_combination() -> None:
    world = World(WorldConfig(captions_in_text=1.0), "text")
    held_out = {(o.concept.name, o.colour) for s in scenes_of("attributes", 2000) for o in s.objects}
    assert held_out.isdisjoint((o.concept.name, o.colour) for i in range(3000) for o in world.scene(i).objects)


def test_held_out_combinations_stay_when_concepts_are_added() -> None:
    narrow = {(o.concept.name, o.colour) for s in scenes_of("attributes", 1000) for o in s.objects}
    wide = scenes_of("attributes", 3000, WorldConfig(concepts=60))
    known = {name for name, _ in narrow}
    assert {(o.concept.name, o.colour) for s in wide for o in s.objects if o.concept.name in known} <= narrow


# -------------------------------------------------------------------------------------------------------------- scenes
def test_name_colour_size_and_place_vary_independently() -> None:
    things = [o for s in scenes_of("train", 12_000, WorldConfig(concepts=12, colours=8)) for o in s.objects]
    n = len(things)
    for a, b in (("size", "colour"), ("size", "place"), ("colour", "place")):
        both = Counter((getattr(o, a), getattr(o, b)) for o in things)
        first, second = Counter(getattr(o, a) for o in things), Counter(getattr(o, b) for o in things)
        chi = sum(
            (both[x, y] - first[x] * second[y] / n) ** 2 / (first[x] * second[y] / n) for x in first for y in second
        )
        freedom = (len(first) - 1) * (len(second) - 1)
        assert chi < freedom + 5 * (2 * freedom) ** 0.5, (a, b, chi)
    names = Counter(o.concept.name for o in things)
    assert max(names.values()) < 1.25 * min(names.values())


def test_objects_stand_apart_inside_their_cell() -> None:
    for size in (48, 65, 96, 224):
        for scene in scenes_of("train", 200, WorldConfig(image_size=size, max_objects=4)):
            assert 1 <= len(scene.objects) <= 4
            assert len({o.place for o in scene.objects}) == len(scene.objects)
            for o in scene.objects:
                left, top, right, bottom = o.box
                row, column = o.cell
                assert size * column // 3 <= left < right <= size * (column + 1) // 3
                assert size * row // 3 <= top < bottom <= size * (row + 1) // 3
                assert right - left == bottom - top == {"large": size // 3, "small": size // 3 * 11 // 16}[o.size]


def test_ink_fills_its_box_and_stands_out() -> None:
    for scene in scenes_of("train", 300, WIDE):
        for o in scene.objects:
            mask = mask_of(o)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert max(np.ptp(rows), np.ptp(columns)) + 1 >= len(mask) - 1
            assert mask.max() > 60, o
            assert contrast(COLOURS[o.colour], BACKGROUNDS[scene.background]) >= 240, (o.colour, scene.background)


def test_two_colours_always_find_a_clear_background() -> None:
    worst = min(
        max(min(contrast(COLOURS[a], ground), contrast(COLOURS[b], ground)) for ground in BACKGROUNDS.values())
        for a in COLOURS
        for b in COLOURS
    )
    assert worst >= 400


@pytest.mark.parametrize("size", [48, 224])
def test_pixels_agree_with_the_scene(size: int) -> None:
    config = WorldConfig(image_size=size, max_objects=4, concepts=100)
    world = World(config, "pair")
    for i in range(40):
        scene, image = world.scene(i), world[i].image
        assert image is not None
        background = np.array(BACKGROUNDS[scene.background])
        outside = np.ones((size, size), bool)
        for o in scene.objects:
            left, top, right, bottom = o.box
            outside[top:bottom, left:right] = False
            region = image[top:bottom, left:right].reshape(-1, 3).astype(int)
            strongest = region[np.abs(region - background).sum(1).argmax()]
            to_ink, to_ground = np.abs(strongest - COLOURS[o.colour]).sum(), np.abs(strongest - background).sum()
            assert to_ink < to_ground, (i, o)
        assert (image[outside] == background).all()


@pytest.mark.parametrize(("size", "patch"), [(48, 8), (48, 16), (96, 12)])
def test_patch_factors_agree_with_the_ink(size: int, patch: int) -> None:
    """Counted again from the picture: how far each pixel went from the background towards the ink's colour."""
    world = World(WorldConfig(image_size=size, max_objects=4, concepts=60), "image", patch=patch)
    for i in range(60):
        scene, sample = world.scene(i), world[i]
        assert sample.image is not None
        factors = sample.patch_factors
        assert tuple(factors) == FACTORS["patch"]
        assert all(len(values) == (size // patch) ** 2 for values in factors.values())
        ground = np.array(BACKGROUNDS[scene.background], float)
        ink = np.zeros((len(scene.objects), size, size))
        for k, o in enumerate(scene.objects):
            left, top, right, bottom = o.box
            towards = np.array(COLOURS[o.colour], float) - ground
            moved = (sample.image[top:bottom, left:right] - ground) @ towards / (towards @ towards)
            ink[k, top:bottom, left:right] = moved
        for p in range((size // patch) ** 2):
            y, x = (p // (size // patch)) * patch, (p % (size // patch)) * patch
            shares = ink[:, y : y + patch, x : x + patch].mean((1, 2))
            slot = factors["object"][p]
            if slot == "none":
                assert shares.max() < 1 / 64 + 0.01
                assert (factors["concept"][p], factors["kind"][p]) == ("none", "background")
            else:
                o = scene.objects[int(slot) - 1]
                assert shares[int(slot) - 1] >= shares.max() - 0.01
                assert shares.max() > 1 / 64 - 0.01
                seen = tuple(factors[name][p] for name in ("concept", "kind", "script", "colour", "size", "face"))
                assert seen == (o.concept.name, o.concept.kind, o.concept.script, o.colour, o.size, o.face)
            assert factors["background"][p] == scene.background


# ---------------------------------------------------------------------------------------------------------------- dial
@settings(max_examples=60, deadline=None)
@given(
    concepts=st.integers(1, MAX_CONCEPTS),
    objects=st.integers(1, 4),
    colours=st.integers(1, len(COLOURS)),
    languages=st.lists(st.sampled_from(ALL), min_size=1, max_size=4, unique=True),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63),
    index=st.integers(0, 2**62 - 1),
    kind=st.sampled_from(["image", "text", "pair"]),
    data=st.data(),
)
def test_any_dial_any_sample(concepts, objects, colours, languages, share, seed, index, kind, data) -> None:
    config = WorldConfig(
        concepts=concepts, max_objects=objects, colours=colours, languages=languages, captions_in_text=share
    )
    split = data.draw(st.sampled_from(available_splits(config)))
    world = World(config, kind, split=split, seed=seed, patch=8)
    sample = world[index]
    assert world.text(index) == sample.text
    assert all(0 <= a.start < a.stop <= b.start for a, b in pairwise(sample.spans))
    assert {s.factors["language"] for s in sample.spans} <= set(languages)
    if kind != "text":
        scene = world.scene(index)
        assert len(scene.objects) <= objects
        assert all(o.concept.index < concepts and o.colour in list(COLOURS)[:colours] for o in scene.objects)


def test_available_splits_follow_the_dial() -> None:
    assert available_splits(WorldConfig()) == SPLITS[:5]  # the last two need icons
    assert available_splits(WorldConfig(concepts=10)) == ("train", "val", "handwriting", "attributes")
    assert available_splits(WorldConfig(colours=1)) == ("train", "val", "handwriting", "font")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"concepts": MAX_CONCEPTS + 1}, {}, f"data.world.concepts.*1 to {MAX_CONCEPTS}"),
        ({"concepts": 0}, {}, "data.world.concepts"),
        ({"colours": 13}, {}, "data.world.colours.*1 to 12"),
        ({"max_objects": 5}, {}, "data.world.max_objects"),
        ({"image_size": 32}, {}, "data.world.image_size.*36"),
        ({"languages": ["en", "xx"]}, {}, "data.world.languages.*'xx'.*en, de, fr, es"),
        ({"languages": []}, {}, "data.world.languages"),
        ({"captions_in_text": 1.5}, {}, "data.world.captions_in_text"),
        ({"said_twice": -0.1}, {}, "data.world.said_twice"),
        ({}, {"split": "test"}, "no split 'test': it has train, val"),
        ({}, {"kind": "video"}, "kind 'video'.*image, text, pair"),
        ({}, {"patch": 7}, "data.world.image_size.*multiple of 7"),
        ({"concepts": 10}, {"split": "font"}, "data.world.concepts.*above 10"),
        ({"colours": 1}, {"split": "attributes"}, "data.world.colours.*at least 2"),
    ],
)
def test_errors_name_the_key(change: dict, arguments: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        World(WorldConfig(**change), **{"kind": "pair", **arguments})
    assert isinstance(caught.value, UserError)


def test_indexes_outside_are_refused() -> None:
    world = World(WorldConfig(captions_in_text=0.0), "text")
    for index in (-1, 2**62):
        with pytest.raises(IndexError, match="0 to"):
            world[index]
    with pytest.raises(ValueError, match="states a fact"):
        world.scene(0)
