"""From a scene to pixels, and to the truth about each patch. Integer arithmetic only: the same bytes everywhere."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from vlmoe.data.world.glyphs import digit_mask, glyph_mask, icon_mask
from vlmoe.data.world.scene import BACKGROUNDS, COLOURS, Scene, SceneObject

PATCH_FACTORS = ("object", "concept", "kind", "script", "colour", "size", "face", "background")
NONE = "none"
_INK_SHARE = 64  # a patch shows an object when its ink covers at least 1/64 of it


def mask_of(thing: SceneObject) -> np.ndarray:
    """The object's ink, uint8 (S, S), to be laid into its box."""
    size = thing.box[2] - thing.box[0]
    if thing.sample >= 0:
        return digit_mask(thing.sample, size)
    if thing.drawing:
        return icon_mask(thing.drawing.font, thing.drawing.code, size)
    return glyph_mask(thing.concept.character, thing.face, size)


def render(scene: Scene, image_size: int) -> np.ndarray:
    """The picture, uint8 (image_size, image_size, 3)."""
    image = _empty(scene.background, image_size).copy()
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        image[top:bottom, left:right] = _blend(thing.colour, scene.background).take(mask_of(thing), axis=0)
    return image


def patch_factors(scene: Scene, image_size: int, patch: int) -> dict[str, list[str]]:
    """Factor -> one value for each patch, row by row: those of the object whose ink covers most of it.

    "object" counts from "1" in the scene's order; a patch without ink says "none" (kind: "background"). "background"
    is the colour behind everything.
    """
    grid = image_size // patch
    most = np.full(grid * grid, 255 * patch * patch // _INK_SHARE - 1, np.int64)
    owner = np.zeros(grid * grid, np.int64)
    for slot, thing in enumerate(scene.objects, 1):
        canvas = np.zeros((image_size, image_size), np.uint8)
        left, top, right, bottom = thing.box
        canvas[top:bottom, left:right] = mask_of(thing)
        ink = canvas.reshape(grid, patch, grid, patch).sum((1, 3), dtype=np.int64).reshape(-1)
        owner[ink > most] = slot
        np.maximum(most, ink, out=most)
    rows = [(NONE, NONE, "background", NONE, NONE, NONE, NONE, scene.background)]
    for slot, o in enumerate(scene.objects, 1):
        c = o.concept
        rows.append((str(slot), c.name, c.kind, c.script, o.colour, o.size, o.face, scene.background))
    owners = owner.tolist()
    return {name: [rows[k][column] for k in owners] for column, name in enumerate(PATCH_FACTORS)}


@lru_cache(maxsize=64)
def _empty(background: str, size: int) -> np.ndarray:
    image = np.empty((size, size, 3), np.uint8)
    image[:] = BACKGROUNDS[background]
    return image


@lru_cache(maxsize=256)
def _blend(colour: str, background: str) -> np.ndarray:
    """Colour for each alpha, uint8 (256, 3)."""
    alpha = np.arange(256, dtype=np.int64)[:, None]
    ink, ground = np.array(COLOURS[colour], np.int64), np.array(BACKGROUNDS[background], np.int64)
    return ((ink * alpha + ground * (255 - alpha) + 127) // 255).astype(np.uint8)
