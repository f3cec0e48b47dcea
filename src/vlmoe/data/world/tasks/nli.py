"""Premises and hypotheses about scenes nobody shows.

The hypothesis is drawn first, then the class, then a premise that fits both: of three attributes it states two, among
them the one asked for unless the class is neutral. Which two is as likely in every class, so neither text alone tells
the class. In a world of several languages the two are in different ones, so that equal words do not tell it either.
"""

from __future__ import annotations

from vlmoe.config import RecipeError, WorldConfig
from vlmoe.data.world.captions import name_pieces
from vlmoe.data.world.concepts import Concept, in_play
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.languages import Language, languages_of
from vlmoe.data.world.scene import COLOURS, SIZES, places_of
from vlmoe.data.world.tasks.made import Made

LABELS = ("entailment", "neutral", "contradiction")
ATTRIBUTES = ("colour", "size", "place")


class Entailment:
    def __init__(self, config: WorldConfig, split: str) -> None:
        self.concepts = [c for c in in_play(config) if not c.unseen]
        self.max_objects = min(2, config.max_objects)
        self.values = {
            "colour": list(COLOURS)[: config.colours],
            "size": list(SIZES),
            "place": list(places_of(config.grid)),
        }
        self.attributes = [a for a in ATTRIBUTES if len(self.values[a]) > 1]
        if len(self.attributes) < 2:
            raise RecipeError(
                f"key 'data.world.colours' got {config.colours}, wanted at least 2 for nli where grid is "
                f"{config.grid}: its things differ in their size alone"
            )
        self.wording = "mismatched" if split == "mismatched" else "matched"
        self.languages = languages_of(config.languages)

    def __call__(self, draws: Draws) -> Made:
        concept, asked = draws.choice(self.concepts), draws.choice(self.attributes)
        value, label = draws.choice(self.values[asked]), draws.below(3)
        others = [a for a in self.attributes if a != asked]
        facts = {a: draws.choice(self.values[a]) for a in others}
        if LABELS[label] != "neutral":
            del facts[draws.choice(others)]
            facts[asked] = value
            if LABELS[label] == "contradiction":
                facts[asked] = draws.choice([v for v in self.values[asked] if v != value])
        said = [(concept, facts)]
        if self.max_objects > 1 and len(self.concepts) > 1 and draws.below(2):
            other = draws.choice([c for c in self.concepts if c is not concept])
            kept = draws.choice(self.attributes)
            told = {a: draws.choice(self.values[a]) for a in self.attributes if a != kept}
            said.insert(draws.below(2), (other, told))
        way = draws.below(len(self.languages[0].premises[self.wording]))
        first = second = self.languages[0]
        if len(self.languages) > 1:
            first = draws.choice(self.languages)
            second = draws.choice([language for language in self.languages if language is not first])
        things = f" {first.conjunction} ".join(_object(first, *thing) for thing in said)
        premise = first.premises[self.wording][way].format(x=things)
        hypothesis = _claim(second, self.wording, concept, asked, value)
        factors = {"attribute": asked}
        if len(self.languages) > 1:
            factors["languages"] = f"{first.code}-{second.code}"
        return Made((), premise, hypothesis, label=label, factors=factors)


def _name(language: Language, concept: Concept) -> str:
    return " ".join(words for words, _ in name_pieces(language, concept.sort, concept.label, {}, concept.noun))


def _object(language: Language, concept: Concept, facts: dict[str, str]) -> str:
    """ "eine kleine rote Ziffer sieben oben links", with those of size, colour and place that are in `facts`."""
    digit, words = concept.kind == "digit", {"name": _name(language, concept)}
    for slot, table in (("size", language.sizes), ("colour", language.colours)):
        if slot in facts:
            words[slot] = language.inflect(slot, table[facts[slot]], "nom", digit)
    way = language.objects["size" not in facts] if "colour" in facts else language.sized
    said = way.removeprefix("{article} ").format(**words)
    place = f" {language.places[facts['place']]}" if "place" in facts else ""
    return f"{language.article(said, 'nom', digit)} {said}{place}"


def _claim(language: Language, wording: str, concept: Concept, asked: str, value: str) -> str:
    table = {"colour": language.colours, "size": language.sizes, "place": language.places}[asked]
    digit = concept.kind == "digit"
    return language.hypotheses[wording][asked].format(
        the=language.definite[concept.noun],
        name=_name(language, concept),
        value=language.inflect(asked, table[value], "pred", digit),
    )
