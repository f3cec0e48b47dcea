"""What can stand in a scene: ten handwritten digits, then characters, each with its real Unicode name."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from vlmoe.config import RecipeError
from vlmoe.data.world.characters import CHARACTERS

DIGITS = 10
MAX_CONCEPTS = DIGITS + len(CHARACTERS)
SCRIPTS = ("latin", "greek", "cyrillic", "armenian", "georgian")


@dataclass(frozen=True, slots=True)
class Concept:
    """index: on the dial. character: for a handwritten digit the digit it is. name: Unicode's, in lower case.
    kind: digit (handwritten), letter or symbol. script: one of SCRIPTS for a letter named after it, else "common".
    sort, label: the name in two, "greek small letter" and "alpha with tonos"; a symbol's sort is empty.
    """

    index: int
    character: str
    name: str
    kind: str
    script: str
    sort: str
    label: str


@lru_cache(maxsize=1)
def all_concepts() -> tuple[Concept, ...]:
    return tuple(_concept(index, c) for index, c in enumerate("0123456789" + CHARACTERS))


def concepts(count: int) -> tuple[Concept, ...]:
    """The first `count` concepts of the dial."""
    if not 1 <= count <= MAX_CONCEPTS:
        raise RecipeError(f"key 'data.world.concepts' got {count!r}, wanted 1 to {MAX_CONCEPTS}")
    return all_concepts()[:count]


def _concept(index: int, character: str) -> Concept:
    name = unicodedata.name(character).lower()
    if index < DIGITS:
        return Concept(index, character, name, "digit", "common", "digit", name.removeprefix("digit "))
    sort, label = split_name(name)
    kind = "letter" if unicodedata.category(character)[0] == "L" else "symbol"
    script = name.split()[0]
    if kind != "letter" or script not in SCRIPTS:  # signs with a script in their name may belong to none
        script = "common"
    return Concept(index, character, name, kind, script, sort, label)


def split_name(name: str) -> tuple[str, str]:
    """("greek small letter", "alpha with tonos"); a name without the word "letter" or "digit" is all label."""
    before, letter, label = name.partition(" letter ")
    if letter:
        return f"{before} letter", label
    return ("digit", name.removeprefix("digit ")) if name.startswith("digit ") else ("", name)
