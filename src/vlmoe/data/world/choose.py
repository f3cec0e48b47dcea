"""How the characters of `characters.py` were chosen; run it to see the list that the installed fonts give.

    python -m vlmoe.data.world.choose

Candidates are the code points that stand in all six faces. Well-known characters come first, diacritics last. One that
looks like an earlier one, whatever the faces of the two, is left out: a picture could not tell which of them it shows.
Looking alike means that the masks at 16 pixels differ by less than an eighth of the ink; all ink fills the box, so size
does not count. Small letters that are their capital drawn smaller go too: those nearer to it than twice that, and those
named in DOUBLES. The list is kept as a file because the rule reads pixels, and a new font rasteriser must not renumber
the world.
"""

from __future__ import annotations

import unicodedata

import numpy as np

from vlmoe.data.world.glyphs import FACES, font_path, glyph_mask

NEAR = 0.125
SIZE = 16
FIRST = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "ΓΔΘΛΞΠΣΦΨΩ"
    "БДЖЗИЙЛУЦЧШЩЪЫЬЭЮЯ"
    "€£¥$&@#%?!+×÷=√∞∑∫≠≤≥←↑→↓↔↕♪♫♭♯§¶©®°*~^/\\|()[]{}<>:;,\"'«»♀♂±♥♠♦♣☺☻▲▼◀▶■◆○□◇"
    "αβγδεζηθικλμνξοπρστυφχψω"
    "abcdefghijklmnopqrstuvwxyz"
    "абвгдежзийклмнопрстуфхцчшщъыьэюя"
)
# Shapes that differ from an earlier one in size or serif alone, which the measure overrates.
DOUBLES = "∑∏◆cosvwxzοосхѕөօвгджзийклмнптуцчшщъыьэюя"


def candidates() -> list[str]:
    """Characters in all six faces, in the order of the dial. Digits stand for handwriting and are left out."""
    from matplotlib.ft2font import FT2Font

    common = set.intersection(*(set(FT2Font(str(font_path(face))).get_charmap()) for face in FACES))
    left_out = {"Mn", "Zs", "Cf", "Co", "Cc", "Cn"}  # marks that need a base, blanks, controls
    usable = {chr(c) for c in common if unicodedata.category(chr(c)) not in left_out and not chr(c).isascii()}
    usable |= {chr(c) for c in common if 32 < c < 127 and not chr(c).isdigit()}
    usable.discard("\ufffc")  # object replacement character: no ink
    usable = {c for c in usable if "SMALL CAPITAL" not in unicodedata.name(c)}
    return [c for c in FIRST if c in usable] + sorted(usable - set(FIRST), key=lambda c: (_group(c), c))


def _group(character: str) -> int:
    name, category = unicodedata.name(character), unicodedata.category(character)
    composed = bool(unicodedata.decomposition(character))
    script = name.split()[0]
    if category[0] == "L" and category != "Lm":
        if composed or " WITH " in name:
            return {"LATIN": 9, "CYRILLIC": 10, "GREEK": 11}.get(script, 12)
        return {"ARMENIAN": 0, "GEORGIAN": 1}.get(script, 2)
    if category in {"Lm", "Sk"}:
        return 8
    if category == "No" or composed:
        return 6
    if category[0] == "P" or category in {"Sc", "Sm"}:
        return 3
    return 7 if name.startswith("BOX") else 4


def choose() -> list[str]:
    """The candidates without those that look like an earlier one."""
    kept: list[str] = []
    masks = np.zeros((0, SIZE * SIZE), np.int16)
    for character in candidates():
        new = masks_of(character)
        if nearest(masks, new) < NEAR or character in DOUBLES:
            continue
        partner = character.swapcase()
        if partner not in kept or nearest(masks_of(partner), new) >= 2 * NEAR:
            kept.append(character)
            masks = np.concatenate([masks, new])
    return kept


def masks_of(character: str) -> np.ndarray:
    """The character in every face, int16 (faces, pixels)."""
    return np.stack([glyph_mask(character, face, SIZE).reshape(-1) for face in FACES]).astype(np.int16)


def nearest(earlier: np.ndarray, new: np.ndarray) -> float:
    """Smallest difference between a mask of `earlier` (n, pixels) and one of `new` (m, pixels), as a share of the
    larger ink: 0 for the same picture; differences beyond 2 * NEAR are not told apart."""
    best = NEAR * 2  # beyond that nobody asks how far
    inks = earlier.sum(1, dtype=np.int64)
    for mask in new:
        ink = np.maximum(inks, int(mask.sum(dtype=np.int64)))
        # The inks alone bound the difference from below; most pairs end here.
        close = np.flatnonzero(np.abs(inks - int(mask.sum(dtype=np.int64))) < best * ink)
        if close.size:
            difference = np.abs(earlier[close] - mask).sum(1, dtype=np.int64) / ink[close]
            best = min(best, float(difference.min()))
    return best


if __name__ == "__main__":
    chosen = "".join(choose())
    for start in range(0, len(chosen), 100):
        print(chosen[start : start + 100])
