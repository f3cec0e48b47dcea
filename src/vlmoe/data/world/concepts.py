"""What can stand in a scene: handwritten digits, characters with their real Unicode names, and icons of things."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from vlmoe.config import RecipeError, WorldConfig
from vlmoe.data.world.characters import CHARACTERS
from vlmoe.data.world.icons import Thing, check_count, things
from vlmoe.data.world.unicode_table import character_data

DIGITS = 10
MAX_CONCEPTS = DIGITS + len(CHARACTERS)
SCRIPTS = ("latin", "greek", "cyrillic", "armenian", "georgian")


@dataclass(frozen=True, slots=True)
class Concept:
    """index: unique; characters in the order of their dial, then icons in that of theirs; -1 for a character that only
    facts name. character: for a handwritten digit the digit it is, "" for an icon. name: Unicode's, in lower case, or
    the icon's. kind: digit (handwritten), letter, symbol or icon. script: one of SCRIPTS for a letter named after it,
    else "common". sort, label: the name in two, "greek small letter" and "alpha with tonos"; empty sort for symbols and
    icons. thing: an icon's drawings.
    """

    index: int
    character: str
    name: str
    kind: str
    script: str
    sort: str
    label: str
    thing: Thing | None = field(default=None, repr=False, compare=False)  # the name tells it

    @property
    def noun(self) -> str:
        """Which of a language's nouns stands before the name."""
        return self.kind if self.kind in {"digit", "icon"} else "character"

    @property
    def unseen(self) -> bool:
        """Training shows and names it never."""
        return self.thing is not None and self.thing.unseen


@lru_cache(maxsize=1)
def all_concepts() -> tuple[Concept, ...]:
    return tuple(_concept(index, c) for index, c in enumerate("0123456789" + CHARACTERS))


@lru_cache(maxsize=1)
def all_icons() -> tuple[Concept, ...]:
    return tuple(
        Concept(MAX_CONCEPTS + i, "", thing.name, "icon", "common", "", thing.name, thing)
        for i, thing in enumerate(things())
    )


def concepts(count: int, icons: int = 0) -> tuple[Concept, ...]:
    """The first `count` digits and characters of their dial, then the first `icons` icons of theirs."""
    least = 0 if icons else 1
    if not least <= count <= MAX_CONCEPTS:
        raise RecipeError(f"key 'data.world.concepts' got {count!r}, wanted {least} to {MAX_CONCEPTS}")
    if not icons:  # the list of icons is not even read
        return all_concepts()[:count]
    check_count(icons)
    return all_concepts()[:count] + all_icons()[:icons]


def in_play(config: WorldConfig) -> tuple[Concept, ...]:
    """Everything that this dial names, what is kept from training included."""
    return concepts(config.concepts, config.icons)


@lru_cache(maxsize=4096)
def character_concept(character: str) -> Concept:
    """Any named character, for facts about it."""
    return _concept(-1, character)


def _concept(index: int, character: str) -> Concept:
    data = character_data(character)
    name = data.name
    if 0 <= index < DIGITS:
        return Concept(index, character, name, "digit", "common", "digit", name.removeprefix("digit "))
    sort, label = split_name(name)
    kind = "letter" if data.category[0] == "L" else "symbol"
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
