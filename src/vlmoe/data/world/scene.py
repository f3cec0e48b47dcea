"""Scenes: which objects stand where, and which combinations each split may show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vlmoe.config import RecipeError, WorldConfig, check_scenes
from vlmoe.data.world.concepts import DIGITS, MAX_CONCEPTS, Concept, in_play
from vlmoe.data.world.draws import Draws, stable_hash
from vlmoe.data.world.glyphs import HANDWRITING, HELD_OUT_FACE, TRAIN_FACES, handwriting_pools
from vlmoe.data.world.icons import Drawing, Thing, by_set, things

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
CORNERS = tuple(PLACES[i] for i in (0, 2, 6, 8))
CENTRE = PLACES[4:5]
SPLITS = ("train", "val", "handwriting", "font", "attributes", "drawing", "unseen")

TRIES = 10_000  # scenes drawn for one sample before the wanted kind is called missing
_CONTRAST = 500  # from here on a background serves a colour; see `contrast`


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. face: a name of glyphs.FACES, "handwriting", or an icon's set and style. sample: number of the
    handwritten sample, else -1. place: a name of PLACES. box: left, top, right, bottom in pixels; the ink fills it in
    its longer direction. drawing: an icon's.
    """

    concept: Concept
    colour: str
    size: str
    place: str
    face: str
    sample: int
    box: tuple[int, int, int, int]
    drawing: Drawing | None = field(default=None, repr=False)  # the face tells it

    @property
    def code(self) -> str:
        """The code point of what is drawn: a drawing's in its font, or the character's; "E8CC"."""
        return f"{self.drawing.code if self.drawing else ord(self.concept.character):04X}"

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column on the 3x3 grid; the four corners or the centre of it where a world has only those."""
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


def is_held_out(scene: Scene, share: float) -> bool:
    """Whether a scene is one of the `share` of all that training never shows. The order of its objects is no matter."""
    drawn = [(o, f"{o.drawing.font} {o.drawing.code}" if o.drawing else o.sample) for o in scene.objects]
    things = sorted(f"{o.concept.name}|{o.colour}|{o.face}|{drawing}|{o.box}" for o, drawing in drawn)
    return stable_hash("/".join([scene.background, *things])) < int(share * 2**64)


def available_splits(config: WorldConfig) -> tuple[str, ...]:
    """The splits that this dial can fill: "handwriting" needs digits, "font" characters, "attributes" at least two
    colours, "drawing" an icon that several sets draw, "unseen" one that training leaves out."""
    icons = things()[: config.icons] if config.icons > 0 else ()
    fillable = {
        "handwriting": config.concepts > 0,
        "font": config.concepts > DIGITS,
        "attributes": config.colours >= 2,
        "drawing": any(_in_drawing(thing) for thing in icons),
        "unseen": any(thing.unseen for thing in icons),
    }
    return tuple(split for split in SPLITS if fillable.get(split, True))


def places_of(grid: int) -> tuple[str, ...]:
    """The places of a grid of 3x3, 2x2 or 1x1 cells, row by row."""
    return {3: PLACES, 2: CORNERS, 1: CENTRE}[grid]


def _in_drawing(thing: Thing) -> bool:
    return bool(thing.held_out) and not thing.unseen


def _shown(concept: Concept, split: str) -> bool:
    """Whether a split shows the concept."""
    if split == "handwriting":
        return concept.kind == "digit"
    if split == "font":
        return concept.kind in {"letter", "symbol"}
    if split == "drawing":
        return concept.thing is not None and _in_drawing(concept.thing)
    return concept.unseen == (split == "unseen")


def _drawings(thing: Thing, split: str) -> tuple[tuple[Drawing, ...], ...]:
    """The drawings that a split shows of a thing, set by set."""
    if split == "drawing":
        return by_set(thing.held_out)
    return by_set(thing.drawings + thing.held_out if split == "unseen" else thing.drawings)


class SceneMaker:
    """Draws the scenes of one split."""

    def __init__(self, config: WorldConfig, split: str) -> None:
        _check(config, split)
        self.max_objects = config.max_objects
        self._held_out = config.held_out_scenes if split in {"train", "val"} else 0.0
        self._split, self._wants_held_out = split, split == "val"
        self.concepts = known = tuple(concept for concept in in_play(config) if _shown(concept, split))
        palette = list(COLOURS)[: config.colours]
        self._colours: dict[int, list[str]] = {}
        for concept in known:
            kept_out = held_out_colours(concept, palette)
            wanted = split == "attributes"
            self._colours[concept.index] = [c for c in palette if (c in kept_out) == wanted]
        self._faces = (HELD_OUT_FACE,) if split == "font" else TRAIN_FACES
        self._samples = handwriting_pools()[split if split in {"val", "handwriting"} else "train"]
        self._drawings = {c.index: _drawings(c.thing, split) for c in known if c.thing}
        self._backgrounds: dict[frozenset[str], tuple[str, ...]] = {}
        self._grid, self._places = config.grid, places_of(config.grid)
        self._lines = [config.image_size * i // config.grid for i in range(config.grid + 1)]  # in pixels
        cell = config.image_size // config.grid
        self.pixels = {"small": max(1, cell * 11 // 16), "large": cell}

    def __call__(self, draws: Draws) -> Scene:
        for _ in range(TRIES):
            scene = self._scene(draws)
            if not self._held_out or is_held_out(scene, self._held_out) == self._wants_held_out:
                return scene
        raise RecipeError(
            f"key 'data.world.held_out_scenes' got {self._held_out}: {TRIES:,} scenes were drawn and none is one of "
            f"the split '{self._split}'; the world has too few scenes, or the share is too near to 0 or 1"
        )

    def _scene(self, draws: Draws) -> Scene:
        count = 1 + draws.below(self.max_objects)
        free = list(range(len(self._places)))
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
        sample, drawing = -1, None
        if concept.index < DIGITS:
            face, sample = HANDWRITING, draws.choice(self._samples[concept.index])
        elif concept.index < MAX_CONCEPTS:
            face = draws.choice(self._faces)
        else:  # sets are as likely as each other, whatever the number of their styles
            drawing = draws.choice(draws.choice(self._drawings[concept.index]))
            face = drawing.face
        row, column = divmod(place, self._grid)
        pixels, lines = self.pixels[size], self._lines
        left = lines[column] + draws.below(lines[column + 1] - lines[column] - pixels + 1)
        top = lines[row] + draws.below(lines[row + 1] - lines[row] - pixels + 1)
        box = (left, top, left + pixels, top + pixels)
        return SceneObject(concept, colour, size, self._places[place], face, sample, box, drawing)


def _contrasting(colours: frozenset[str]) -> tuple[str, ...]:
    """The backgrounds on which all these colours stand out; the best one when none does fully."""
    worst = {b: min(contrast(COLOURS[c], rgb) for c in colours) for b, rgb in BACKGROUNDS.items()}
    good = tuple(b for b, value in worst.items() if value >= _CONTRAST)
    return good or (max(worst, key=lambda b: worst[b]),)


def _check(config: WorldConfig, split: str) -> None:
    def need(ok: bool, key: str, value: object, wanted: str) -> None:
        if not ok:
            raise RecipeError(f"key '{key}' got {value!r}, wanted {wanted}")

    in_play(config)
    check_scenes(config, need)
    need(1 <= config.colours <= len(COLOURS), "data.world.colours", config.colours, f"1 to {len(COLOURS)}")
    if split not in SPLITS:
        raise RecipeError(f"the world has no split '{split}': it has {', '.join(SPLITS)}")
    if split not in available_splits(config):
        key, value = {
            "handwriting": ("concepts", "at least 1"),
            "font": ("concepts", f"above {DIGITS}"),
            "attributes": ("colours", "at least 2"),
            "drawing": ("icons", "at least 1"),
            "unseen": ("icons", f"at least {1 + next(i for i, thing in enumerate(things()) if thing.unseen)}"),
        }[split]
        need(False, f"data.world.{key}", getattr(config, key), f"{value} for the split '{split}'")
