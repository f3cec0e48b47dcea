"""What a language must bring so that scenes and facts can be said in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lt": "titlecase letter",
    "Lm": "modifier letter",
    "Lo": "letter without case",
    "Nd": "decimal digit",
    "No": "number",
    "Sm": "mathematical symbol",
    "Sc": "currency symbol",
    "Sk": "modifier symbol",
    "So": "symbol",
    "Pd": "dash",
    "Ps": "opening bracket",
    "Pe": "closing bracket",
    "Pi": "initial quotation mark",
    "Pf": "final quotation mark",
    "Po": "punctuation mark",
    "Pc": "connector",
    "Mn": "nonspacing mark",
    "Mc": "spacing mark",
    "Me": "enclosing mark",
    "Nl": "letter number",
    "Zs": "space",
    "Zl": "line separator",
    "Zp": "paragraph separator",
    "Cf": "format character",
}
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def no_inflection(slot: str, word: str, case: str, digit: bool) -> str:
    return word


@dataclass(frozen=True)
class Language:
    """Words and phrasings of one language. Names of characters stay Unicode's own, in every language.

    Tables map this world's English value to the word. noun: "digit", "character" and "icon" as nouns put before a name;
    empty where the name already says it.

    Templates are words and slots. Of a caption: `{o1}` is the first object said in any way of `objects`, `{o2:dat}` the
    second in the form after a relation; `{name1}` `{size1}` `{colour1}` `{place1}` `{article1}` are its parts;
    `{relation}`, `{count}`, `{background}` belong to the scene. Of a fact: see `facts.py`.

    Of premises and hypotheses (NLI), by wording ("matched", "mismatched": never seen in training) and of hypotheses by
    attribute: `{x}` is one object, or two with the conjunction between; `{the}` the definite article of the noun,
    `{name}` and `{value}`. `objects` has the way with size and colour first, then that with the colour alone, `sized`
    that with the size alone.

    article(word that follows, case, digit) and inflect(slot, word, case, digit) give the form; case is "nom" (subject
    or object), "dat" (after a relation) or "pred" (standing alone: "large and red"); digit tells the two nouns apart.
    """

    code: str
    noun: dict[str, str]
    colours: dict[str, str]
    sizes: dict[str, str]
    places: dict[str, str]
    relations: dict[str, str]
    backgrounds: dict[str, str]
    digits: tuple[str, ...]
    counts: dict[str, str]
    scripts: dict[str, str]
    categories: dict[str, str]
    objects: tuple[str, ...]
    one: tuple[str, ...]
    two: tuple[str, ...]
    many: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]
    sized: str
    definite: dict[str, str]
    conjunction: str
    premises: dict[str, tuple[str, ...]]
    hypotheses: dict[str, dict[str, str]]
    article: Callable[[str, str, bool], str]
    inflect: Callable[[str, str, str, bool], str] = no_inflection
