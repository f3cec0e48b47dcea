"""Facts: what the Unicode character database (Python's `unicodedata`) says of a concept, as sentences."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from vlmoe.data.sample import Span
from vlmoe.data.world.captions import name_pieces
from vlmoe.data.world.concepts import DIGITS, Concept, split_name
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.languages import CATEGORIES, LANGUAGES, Language
from vlmoe.data.world.phrases import Piece, Step, Writer, compile_template


@dataclass(frozen=True, slots=True)
class Fact:
    """kind: which of a language's `facts` templates say it. value: what it says; others: characters it names."""

    kind: str  # code, character, script, category, value, lower, upper, parts
    value: str = ""
    others: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def facts_of(concept: Concept) -> tuple[Fact, ...]:
    """Every fact known of a concept; of a handwritten digit, those of the digit it is."""
    c = concept.character
    facts = [
        Fact("code", f"U+{ord(c):04X}"),
        Fact("character", c),
        Fact("category", unicodedata.category(c)),
    ]
    if concept.script != "common":
        facts.append(Fact("script", concept.script))
    number = unicodedata.numeric(c, None)
    if number is not None:
        facts.append(Fact("value", str(Fraction(number).limit_denominator(1000))))
    for kind, partner in (("lower", c.lower()), ("upper", c.upper())):
        if partner != c and len(partner) == 1:
            facts.append(Fact(kind, others=(partner,)))
    parts = unicodedata.normalize("NFD", c)
    if len(parts) == 2:
        facts.append(Fact("parts", others=tuple(parts)))
    return tuple(facts)


@lru_cache(maxsize=256)
def _templates(language: str, kind: str) -> tuple[tuple[Step, ...], ...]:
    return tuple(compile_template(t, language) for t in LANGUAGES[language].facts[kind])


def state_fact(concept: Concept, language: Language, draws: Draws) -> tuple[str, tuple[Span, ...]]:
    """One fact of the concept as a sentence, and the factors of its words."""
    fact = draws.choice(facts_of(concept))
    writer = Writer()
    for step in draws.choice(_templates(language.code, fact.kind)):
        writer.add(_pieces(step, fact, concept, language) if step.slot else (step.literal,), step.space)
    return writer.text(), tuple(writer.spans)


def _pieces(step: Step, fact: Fact, concept: Concept, language: Language) -> tuple[Piece, ...]:
    known = {"word_class": step.slot, "language": language.code}
    if step.slot == "name" and not step.number:
        known |= {"concept": concept.name, "kind": concept.kind, "script": concept.script}
        return name_pieces(language, concept.sort, concept.label, known, concept.index < DIGITS, noun=False)
    if step.slot == "name":
        name = unicodedata.name(fact.others[step.number - 2]).lower()
        return name_pieces(language, *split_name(name), known | {"concept": name}, digit=False, noun=False)
    if step.slot == "script":
        return ((language.scripts[fact.value], known | {"script": fact.value}),)
    if step.slot == "category":
        return ((language.categories[fact.value], known | {"category": CATEGORIES[fact.value]}),)
    return ((fact.value, known),)
