"""Unicode's named characters from a table that the project ships: the same in every version of Python.

`make_unicode_table.py` made it: a line for each character, its code point and the fields of `Character` with
semicolons between them.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("unicode.txt.xz")


@dataclass(frozen=True, slots=True)
class Character:
    """character: itself. name: in lower case. category: Unicode's two letters. value: a number or fraction in digits,
    "" for none. lower, upper: its partner of one character, "" for none. parts: the two characters it decomposes into.
    """

    character: str
    name: str
    category: str
    value: str = ""
    lower: str = ""
    upper: str = ""
    parts: str = ""


@lru_cache(maxsize=1)
def _rows() -> tuple[str, dict[str, str]]:
    """Unicode's version, and character -> its line, in the order of code points. Lines are split when asked for."""
    version, *lines = lzma.decompress(TABLE.read_bytes()).decode().splitlines()
    return version, {chr(int(line.partition(";")[0], 16)): line for line in lines}


def unicode_version() -> str:
    return _rows()[0]


@lru_cache(maxsize=1)
def named_characters() -> tuple[str, ...]:
    """Every character of the table, in the order of code points."""
    return tuple(_rows()[1])


def character_data(character: str) -> Character:
    """What Unicode says of a character. Raises KeyError for one that is not in the table."""
    return Character(character, *_rows()[1][character].split(";")[1:])
