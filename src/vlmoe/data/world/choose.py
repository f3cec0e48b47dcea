"""How the characters of `characters.py` were chosen; run it to see the list that the installed fonts give.

    python -m vlmoe.data.world.choose

Candidates are the code points that stand in all six faces. Well-known characters come first, diacritics last. One that
looks like an earlier one in any face (mean difference of the masks at 16 pixels below a tenth of the ink, the size of
the ink apart) is left out: a picture could not tell which of the two it shows. The list is kept as a file because
the rule reads pixels, and a new font rasteriser must not renumber the world.
"""

from __future__ import annotations

import unicodedata

import numpy as np

from vlmoe.data.world.glyphs import FACES, font_path, glyph_mask

NEAR = 0.1
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


def candidates() -> list[str]:
    """Characters in all six faces, in the order of the dial. Digits stand for handwriting and are left out."""
    from matplotlib.ft2font import FT2Font

    common = set.intersection(*(set(FT2Font(str(font_path(face))).get_charmap()) for face in FACES))
    left_out = {"Mn", "Zs", "Cf", "Co", "Cc", "Cn"}  # marks that need a base, blanks, controls
    usable = {chr(c) for c in common if unicodedata.category(chr(c)) not in left_out and not chr(c).isascii()}
    usable |= {chr(c) for c in common if 32 < c < 127 and not chr(c).isdigit()}
    usable.discard("\ufffc")  # object replacement character: no ink
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
    masks = np.zeros((len(FACES), 4096, SIZE * SIZE), np.int16)
    for character in candidates():
        mask = np.stack([glyph_mask(character, face, SIZE).reshape(-1) for face in FACES]).astype(np.int16)
        count = len(kept)
        if not any(_alike(earlier[:count], new) for earlier, new in zip(masks, mask, strict=True)):
            masks[:, count] = mask
            kept.append(character)
    return kept


def _alike(earlier: np.ndarray, new: np.ndarray) -> bool:
    """Whether one of the earlier masks (n, pixels) is near the new one (pixels) in the same face."""
    ink = np.maximum(earlier.sum(1, dtype=np.int64), int(new.sum(dtype=np.int64)))
    return bool((np.abs(earlier - new).sum(1, dtype=np.int64) < NEAR * ink).any())


if __name__ == "__main__":
    chosen = "".join(choose())
    for start in range(0, len(chosen), 100):
        print(chosen[start : start + 100])
