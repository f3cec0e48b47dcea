"""Captions: what a scene shows, said in one of several ways in one of several languages."""

from __future__ import annotations

from functools import lru_cache

from vlmoe.data.sample import Span
from vlmoe.data.world.concepts import Concept
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.languages import DIGIT_WORDS, LANGUAGES, Language
from vlmoe.data.world.phrases import Piece, Step, Writer, compile_template, expand
from vlmoe.data.world.scene import Scene, SceneObject, relations

_COUNTS = ("", "one", "two", "three", "four")
_CACHED = 20_000  # pieces kept for reuse; beyond that (all concepts, all languages) they are made anew


class Captioner:
    """Says scenes in one language. `speak(scene, draws)` is a pure function of its arguments."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._ways: dict[int | str, list[tuple[Step, ...]]] = {
            "names": [compile_template("{name1}", language.code)],
            "codes": [compile_template("{name1} {code1}", language.code)],
        }
        for count, templates in ((1, language.one), (2, language.two), (3, language.many)):
            # Each sentence is drawn with equal chance, then the way of saying its objects.
            said = [expand(t, language.objects) for t in templates]
            widest = max(map(len, said))
            self._ways[count] = [compile_template(w[i % len(w)], language.code) for w in said for i in range(widest)]
        self._pieces: dict[tuple[object, ...], tuple[Piece, ...]] = {}

    def speak(self, scene: Scene, draws: Draws, form: str = "sentences") -> tuple[str, tuple[Span, ...]]:
        """A caption and the factors of its words. Of three or four objects a sentence names two.

        form: "sentences"; of a scene with one object also "names", its name and nothing else, and "codes", its name and
        the code point of what is drawn.
        """
        count = len(scene.objects)
        order = [0]
        if count > 1:
            first = draws.below(count)
            second = draws.below(count - 1)
            order = [first, second + (second >= first)]
        steps = draws.choice(self._ways[min(count, 3) if form == "sentences" else form])
        things = [scene.objects[slot] for slot in order]
        relation = draws.choice(relations(*things)) if count > 1 else ""
        writer, pieces = Writer(), self._pieces
        for at, step in enumerate(steps):
            space, slot, number, case, literal = step
            if not slot:
                writer.add((literal,), space)
                continue
            key: tuple[object, ...]
            if number:
                thing = things[number - 1]
                value = _value(thing, steps[at + 1].slot if slot == "article" else slot)
                key = (slot, value, case, thing.sample >= 0, order[number - 1], at if slot == "article" else 0)
            else:
                value = relation if slot == "relation" else _COUNTS[count] if slot == "count" else scene.background
                key = (slot, value)
            made = pieces.get(key)
            if made is None:
                made = self._make(slot, value, case, things, order, step, steps[min(at + 1, len(steps) - 1)])
                if len(pieces) < _CACHED:
                    pieces[key] = made
            writer.add(made, space)
        return writer.text(), tuple(writer.spans)

    def _make(
        self, slot: str, value: object, case: str, things: list[SceneObject], order: list[int], step: Step, then: Step
    ) -> tuple[Piece, ...]:
        """The pieces of one slot. `then` is the following step: an article agrees with it."""
        words, code = self.language, self.language.code
        known = {"word_class": slot, "language": code}
        if step.number:
            known["object"] = str(order[step.number - 1] + 1)
            digit = things[step.number - 1].sample >= 0
        if isinstance(value, Concept):
            return self._name(value, known) if slot == "name" else self._article(case, digit, known, value.name)
        value = str(value)
        if slot == "code":
            return ((value, known),)
        if slot == "article":
            table = words.sizes if then.slot == "size" else words.colours
            following = words.inflect(then.slot, table[value], case, digit)
            return self._article(case, digit, known, following)
        if slot in {"size", "colour"}:
            table = words.sizes if slot == "size" else words.colours
            return ((words.inflect(slot, table[value], case, digit), known | {slot: value}),)
        if slot == "count":
            return ((words.counts[value], known | {"word_class": "number", "number": value}),)
        table = {"place": words.places, "relation": words.relations, "background": words.backgrounds}[slot]
        return ((table[value], known | {slot: value}),)

    def _article(self, case: str, digit: bool, known: dict[str, str], following: str) -> tuple[Piece, ...]:
        return ((self.language.article(following, case, digit), known | {"word_class": "function"}),)

    def _name(self, concept: Concept, known: dict[str, str]) -> tuple[Piece, ...]:
        """ "digit" + "seven", "greek small letter" + "alpha with tonos": the kind, then what sets it apart."""
        known = known | {"concept": concept.name, "kind": concept.kind, "script": concept.script}
        return name_pieces(self.language, concept.sort, concept.label, known, concept.noun)


def name_pieces(language: Language, sort: str, label: str, known: dict[str, str], noun: str = "") -> tuple[Piece, ...]:
    """A name as one or two pieces. noun: a key of the language's nouns, put before the name; "" for none. A digit is
    translated ("Ziffer sieben"); others keep their English words."""
    if noun == "digit":
        sort, label = language.noun["digit"], language.digits[DIGIT_WORDS.index(label)]
    elif noun and language.noun[noun]:
        sort = f"{language.noun[noun]} {sort}".rstrip()
    named = (label, known | {"word_class": "name"})
    return ((sort, known | {"word_class": "kind"}), named) if sort else (named,)


def _value(thing: SceneObject, slot: str) -> object:
    if slot == "name":
        return thing.concept
    return getattr(thing, slot)


@lru_cache(maxsize=16)
def captioner(code: str) -> Captioner:
    return Captioner(LANGUAGES[code])
