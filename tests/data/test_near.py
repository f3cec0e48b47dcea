"""Pictures that are nearly the same: drawings of icon fonts against themselves saved again, and against each other."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from vlmoe.data.near import BITS, Look, look_at, near
from vlmoe.data.world.glyphs import icon_mask
from vlmoe.data.world.icons import things


def icons(count: int) -> list[np.ndarray]:
    """uint8 (48, 48, 3): a drawing of each of the first things."""
    drawings = [thing.drawings[0] for thing in things()[:count]]
    return [np.repeat(255 - icon_mask(d.font, d.code, 48)[..., None], 3, axis=2) for d in drawings]


def saved_again(image: np.ndarray) -> np.ndarray:
    """As JPEG of half the size, and back."""
    raw = io.BytesIO()
    Image.fromarray(image).resize((24, 24)).save(raw, "JPEG", quality=80)
    return np.asarray(Image.open(raw).resize((48, 48)))


def test_copies_are_found_and_other_pictures_are_not() -> None:
    pictures = icons(200)
    looks = [look_at(image) for image in pictures]
    assert len(near(looks)) <= 2
    copies = [look_at(saved_again(image)) for image in pictures]
    found = near(copies, looks)
    assert sum(found.get(i) == i for i in range(200)) >= 160
    assert sum(found.get(i, i) != i for i in range(200)) <= 2
    within = near([*looks, *copies])
    assert sum(within.get(200 + i) == i for i in range(200)) >= 160


def test_pictures_that_differ_in_colour_alone_are_others() -> None:
    red, blue, dark = (np.full((48, 48, 3), 255, dtype=np.uint8) for _ in range(3))
    red[10:40, 5:25], blue[10:40, 5:25], dark[10:40, 5:25] = (220, 0, 0), (0, 0, 220), (215, 0, 0)
    looks = [look_at(image) for image in (red, blue, dark)]
    assert looks[0][0] == looks[1][0]  # the hash is one of greys
    assert near(looks) == {2: 0}


def test_all_hashes_within_reach_are_met() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, 300, dtype=np.uint64)
    for i in range(150):  # some bits of an earlier one turned, up to two more than may differ
        bits = rng.choice(64, rng.integers(0, BITS + 3), replace=False)
        hashes[150 + i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
    looks: list[Look] = [(int(value), bytes(48)) for value in hashes]
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    wanted = {b for b in range(300) if (apart[b, :b] <= BITS).any()}
    found = near(looks)
    assert set(found) == wanted and 60 < len(wanted) < 150
    assert all(a < b and apart[a, b] <= BITS for b, a in found.items())
    assert near(looks[150:], looks[:150]) == {b - 150: a for b, a in found.items()}
    assert near([]) == near([], looks) == near(looks[:1]) == {}
