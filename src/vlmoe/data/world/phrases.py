"""Templates read once into steps, and text put together from pieces that know their factors."""

from __future__ import annotations

import re
from functools import partial
from typing import NamedTuple

from vlmoe.data.sample import Span

Piece = tuple[str, dict[str, str]]  # words, and what is known of them

SPAN_FACTORS = (
    "word_class", "language", "object", "concept", "kind", "script", "colour", "size", "place", "relation", "number",
    "background", "category",
)  # fmt: skip
WORD_CLASSES = (
    "name", "kind", "colour", "size", "place", "relation", "number", "background", "category", "script", "code",
    "character", "value", "face", "set", "function",
)  # fmt: skip

_OBJECT = re.compile(r"\{o(\d)(:[a-z]+)?\}")
_TOKEN = re.compile(r"\{([a-z]+)(\d?)(?::([a-z]+))?\}|([^\s{}]+)")


class Step(NamedTuple):
    """One step of a template: a literal piece (slot is empty), or a slot to fill."""

    space: bool  # a space stands before it
    slot: str  # "colour" of {colour2:dat}
    number: int  # 2, or 0 where none is given
    case: str  # "dat"; "nom" where none is given
    literal: Piece


def compile_template(template: str, language: str) -> tuple[Step, ...]:
    """Read a template: `{slot}`, `{slot2}`, `{slot2:case}` and words; neighbouring words become one literal."""
    factors = {"word_class": "function", "language": language}
    steps: list[Step] = []
    end = 0
    for match in _TOKEN.finditer(template):
        space = match.start() > end or not steps
        end = match.end()
        slot, number, case, words = match.groups()
        if words and steps and not steps[-1].slot:
            joined = steps[-1].literal[0] + (" " if space else "") + words
            steps[-1] = steps[-1]._replace(literal=(joined, factors))
        else:
            steps.append(Step(space, slot or "", int(number or 0), case or "nom", (words or "", factors)))
    return tuple(steps)


def expand(template: str, objects: tuple[str, ...]) -> list[str]:
    """Put every way of saying an object in place of `{o1}`, `{o2:dat}`: the same way for all in one sentence."""
    if "{o" not in template:
        return [template]
    return [_OBJECT.sub(partial(_numbered, way), template) for way in objects]


def _numbered(way: str, match: re.Match[str]) -> str:
    """A way of saying an object, its slots marked with the object's number and case: "{size}" to "{size2:dat}"."""
    return way.replace("}", f"{match[1]}{match[2] or ''}}}")


class Writer:
    """A text under construction and the spans of its pieces."""

    __slots__ = ("length", "parts", "spans")

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.spans: list[Span] = []
        self.length = 0

    def add(self, pieces: tuple[Piece, ...], space: bool) -> None:
        """Append pieces with a space between them, and before them if asked (never at the start of the text)."""
        for words, factors in pieces:
            start = self.length
            if space and start:
                self.parts.append(" ")
                start += 1
            self.length = stop = start + len(words)
            self.parts.append(words)
            self.spans.append(Span(start, stop, factors))
            space = True

    def text(self) -> str:
        return "".join(self.parts)
