"""Facts as sentences: what the Unicode character database says of a character, and an icon set of its drawings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vlmoe.data.sample import Span
from vlmoe.data.world.captions import name_pieces
from vlmoe.data.world.concepts import Concept, split_name
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.icons import Thing
from vlmoe.data.world.languages import CATEGORIES, LANGUAGES, Language
from vlmoe.data.world.phrases import Piece, Step, Writer, compile_template
from vlmoe.data.world.unicode_table import character_data


@dataclass(frozen=True, slots=True)
class Fact:
    """kind: which of a language's `facts` templates say it. value: what it says; others: characters it names; source:
    the icon set, with its style where the fact depends on it."""

    kind: str  # code, character, script, category, value, lower, upper, parts; of icons glyph, set
    value: str = ""
    others: tuple[str, ...] = ()
    source: str = ""


@lru_cache(maxsize=4096)
def facts_of(concept: Concept) -> tuple[Fact, ...]:
    """Every fact known of a concept; of a handwritten digit, those of the digit it is."""
    if concept.thing:
        return _facts_of_icon(concept.thing)
    c = concept.character
    data = character_data(c)
    facts = [Fact("code", f"U+{ord(c):04X}")]
    if data.category[0] not in "MZC":  # marks need a base, blanks and format characters cannot be seen
        facts.append(Fact("character", c))
    facts.append(Fact("category", data.category))
    if concept.script != "common":
        facts.append(Fact("script", concept.script))
    if data.value:
        facts.append(Fact("value", data.value))
    facts += [
        Fact(kind, others=(partner,)) for kind, partner in (("lower", data.lower), ("upper", data.upper)) if partner
    ]
    if data.parts:
        facts.append(Fact("parts", others=tuple(data.parts)))
    return tuple(facts)


def _facts_of_icon(thing: Thing) -> tuple[Fact, ...]:
    """The code point of each drawing in its set, and each set that draws the thing."""
    drawings = thing.drawings + thing.held_out
    glyphs = [Fact("glyph", f"{d.code:X}", source=d.face) for d in drawings]
    return (*glyphs, *(Fact("set", source=title) for title in dict.fromkeys(d.set for d in drawings)))


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
        return name_pieces(
            language, concept.sort, concept.label, known, concept.noun if concept.kind == "digit" else ""
        )
    if step.slot == "name":
        name = character_data(fact.others[step.number - 2]).name
        return name_pieces(language, *split_name(name), known | {"concept": name})
    if step.slot == "script":
        return ((language.scripts[fact.value], known | {"script": fact.value}),)
    if step.slot == "category":
        return ((language.categories[fact.value], known | {"category": CATEGORIES[fact.value]}),)
    return ((fact.source if step.slot in {"face", "set"} else fact.value, known),)
