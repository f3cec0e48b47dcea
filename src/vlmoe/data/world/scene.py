"""Scenes: which objects stand where, and which combinations each split may show."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmoe.config import RecipeError, WorldConfig
from vlmoe.data.world.concepts import DIGITS, Concept, concepts
from vlmoe.data.world.draws import Draws, stable_hash
from vlmoe.data.world.glyphs import HANDWRITING, HELD_OUT_FACE, TRAIN_FACES, handwriting_pools

RGB = tuple[int, int, int]

# In the order of the dial: what is easily told apart comes first.
COLOURS: dict[str, RGB] = {
    "red": (225, 35, 40),
    "green": (25, 155, 50),
    "blue": (40, 95, 245),
    "yellow": (255, 225, 25),
    "white": (255, 255, 255),
    "black": (10, 10, 10),
    "orange": (255, 130, 15),
    "purple": (160, 50, 215),
    "pink": (255, 135, 195),
    "brown": (130, 72, 32),
    "turquoise": (25, 200, 200),
    "grey": (140, 140, 140),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (250, 250, 250),
    "black": (0, 0, 0),
    "beige": (240, 228, 200),
    "dark blue": (10, 18, 56),
    "light blue": (140, 195, 240),
}
SIZES = ("small", "large")
PLACES = (
    "top left", "top centre", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "val", "handwriting", "font", "attributes")

_CONTRAST = 500  # from here on a background serves a colour; see `contrast`


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. face: a name of glyphs.FACES, or "handwriting". sample: number of the handwritten sample, else -1.
    place: a name of PLACES. box: left, top, right, bottom in pixels; the ink fills it in its longer direction.
    """

    concept: Concept
    colour: str
    size: str
    place: str
    face: str
    sample: int
    box: tuple[int, int, int, int]

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column on the 3x3 grid."""
        row, column = divmod(PLACES.index(self.place), 3)
        return row, column


@dataclass(frozen=True, slots=True)
class Scene:
    """The ground truth of one picture: its objects (1 to 4, each in its own place) and its background colour."""

    objects: tuple[SceneObject, ...]
    background: str


def relations(a: SceneObject, b: SceneObject) -> list[str]:
    """Every relation that holds: a is "left of" b when its column of the grid is further left, and so on."""
    (row_a, column_a), (row_b, column_b) = a.cell, b.cell
    holds = [(column_a < column_b), (column_a > column_b), (row_a < row_b), (row_a > row_b)]
    return [name for name, true in zip(RELATIONS, holds, strict=True) if true]


def contrast(a: RGB, b: RGB) -> int:
    """How far two colours stand apart: weighted RGB distance plus three times the luminance's; 0 to 1530.

    Legibility of thin strokes hangs on luminance more than on hue.
    """
    distance = sum(weight * (x - y) ** 2 for weight, x, y in zip((2, 4, 3), a, b, strict=True))
    luminance = [2126 * c[0] + 7152 * c[1] + 722 * c[2] for c in (a, b)]
    return math.isqrt(distance) + 3 * (abs(luminance[0] - luminance[1]) // 10000)


def held_out_colours(concept: Concept, colours: list[str]) -> set[str]:
    """The colours (an eighth, at least one of two) in which training never shows this concept."""
    if len(colours) < 2:
        return set()
    ranked = sorted(colours, key=lambda colour: stable_hash(f"{concept.name} in {colour}"))
    return set(ranked[: max(1, len(colours) // 8)])


def available_splits(config: WorldConfig) -> tuple[str, ...]:
    """The splits that this dial can fill: "font" needs characters, "attributes" at least two colours."""
    fillable = {"font": config.concepts > DIGITS, "attributes": config.colours >= 2}
    return tuple(split for split in SPLITS if fillable.get(split, True))


class SceneMaker:
    """Draws the scenes of one split."""

    def __init__(self, config: WorldConfig, split: str) -> None:
        _check(config, split)
        self.max_objects = config.max_objects
        known = concepts(config.concepts)
        if split == "handwriting":
            known = known[:DIGITS]
        elif split == "font":
            known = known[DIGITS:]
        self.concepts = known
        in_play = list(COLOURS)[: config.colours]
        self._colours: dict[int, list[str]] = {}
        for concept in known:
            kept_out = held_out_colours(concept, in_play)
            wanted = split == "attributes"
            self._colours[concept.index] = [c for c in in_play if (c in kept_out) == wanted]
        self._faces = (HELD_OUT_FACE,) if split == "font" else TRAIN_FACES
        self._samples = handwriting_pools()[split if split in {"val", "handwriting"} else "train"]
        self._backgrounds: dict[frozenset[str], tuple[str, ...]] = {}
        self._lines = [config.image_size * i // 3 for i in range(4)]  # the grid's lines in pixels
        cell = config.image_size // 3
        self.pixels = {"small": max(1, cell * 11 // 16), "large": cell}

    def __call__(self, draws: Draws) -> Scene:
        count = 1 + draws.below(self.max_objects)
        free = list(range(9))
        objects = tuple(self._object(draws, free.pop(draws.below(len(free)))) for _ in range(count))
        key = frozenset(o.colour for o in objects)
        backgrounds = self._backgrounds.get(key)
        if backgrounds is None:
            backgrounds = self._backgrounds[key] = _contrasting(key)
        return Scene(objects, draws.choice(backgrounds))

    def _object(self, draws: Draws, place: int) -> SceneObject:
        concept = draws.choice(self.concepts)
        colour = draws.choice(self._colours[concept.index])
        size = SIZES[draws.below(2)]
        if concept.index < DIGITS:
            face, sample = HANDWRITING, draws.choice(self._samples[concept.index])
        else:
            face, sample = draws.choice(self._faces), -1
        row, column = divmod(place, 3)
        pixels, lines = self.pixels[size], self._lines
        left = lines[column] + draws.below(lines[column + 1] - lines[column] - pixels + 1)
        top = lines[row] + draws.below(lines[row + 1] - lines[row] - pixels + 1)
        return SceneObject(concept, colour, size, PLACES[place], face, sample, (left, top, left + pixels, top + pixels))


def _contrasting(colours: frozenset[str]) -> tuple[str, ...]:
    """The backgrounds on which all these colours stand out; the best one when none does fully."""
    worst = {b: min(contrast(COLOURS[c], rgb) for c in colours) for b, rgb in BACKGROUNDS.items()}
    good = tuple(b for b, value in worst.items() if value >= _CONTRAST)
    return good or (max(worst, key=lambda b: worst[b]),)


def _check(config: WorldConfig, split: str) -> None:
    def need(ok: bool, key: str, value: object, wanted: str) -> None:
        if not ok:
            raise RecipeError(f"key 'data.world.{key}' got {value!r}, wanted {wanted}")

    concepts(config.concepts)
    need(config.image_size >= 36, "image_size", config.image_size, "at least 36 pixels: smaller glyphs are illegible")
    need(1 <= config.max_objects <= 4, "max_objects", config.max_objects, "1 to 4")
    need(1 <= config.colours <= len(COLOURS), "colours", config.colours, f"1 to {len(COLOURS)}")
    if split not in SPLITS:
        raise RecipeError(f"the world has no split '{split}': it has {', '.join(SPLITS)}")
    if split not in available_splits(config):
        key, value = ("concepts", f"above {DIGITS}") if split == "font" else ("colours", "at least 2")
        need(False, key, getattr(config, key), f"{value} for the split '{split}'")
