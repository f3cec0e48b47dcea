"""How `unicode.txt.xz` was made; run it to write the table that this Python's `unicodedata` gives.

    python -m vlmoe.data.world.make_unicode_table

Every character that has a name of its own, in the order of code points. Ideographs and syllables whose names follow
from their code points (CJK, Tangut, Nushu, Khitan, Hangul) are left out. The table is kept as a file because Python
versions bring different versions of Unicode, and a new one must not renumber the world.
"""

from __future__ import annotations

import lzma
import sys
import unicodedata
from fractions import Fraction

from vlmoe.data.world.unicode_table import TABLE

SYSTEMATIC = (
    "CJK UNIFIED IDEOGRAPH-", "CJK COMPATIBILITY IDEOGRAPH-", "HANGUL SYLLABLE ", "TANGUT IDEOGRAPH-",
    "TANGUT COMPONENT-", "NUSHU CHARACTER-", "KHITAN SMALL SCRIPT CHARACTER-",
)  # fmt: skip


def row(character: str) -> str | None:
    """The character's line; None where it has no name of its own. Fields as in `unicode_table.Character`."""
    name = unicodedata.name(character, "")
    if not name or name.startswith(SYSTEMATIC):
        return None
    number = unicodedata.numeric(character, None)
    value = "" if number is None else str(Fraction(number).limit_denominator(1000))
    lower, upper = (
        partner if partner != character and len(partner) == 1 else ""
        for partner in (character.lower(), character.upper())
    )
    parts = unicodedata.normalize("NFD", character)
    fields = (name.lower(), unicodedata.category(character), value, lower, upper, parts if len(parts) == 2 else "")
    return f"{ord(character):X};" + ";".join(fields).rstrip(";")


def build() -> str:
    """The whole table; its first line is the version of Unicode."""
    rows = filter(None, (row(chr(code)) for code in range(sys.maxunicode + 1)))
    return "\n".join((unicodedata.unidata_version, *rows)) + "\n"


if __name__ == "__main__":
    text = build()
    TABLE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(len(text.splitlines()) - 1, TABLE.stat().st_size)
