"""Premises and hypotheses about scenes nobody shows.

The hypothesis is drawn first, then the class, then a premise that fits both: of three attributes it states two, among
them the one asked for unless the class is neutral. Which two is as likely in every class, so neither text alone tells
the class.
"""

from __future__ import annotations

from vlmoe.config import WorldConfig
from vlmoe.data.world.concepts import Concept, concepts
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.scene import COLOURS, PLACES, SIZES
from vlmoe.data.world.tasks.made import PLACE_WORDS, Made, article

LABELS = ("entailment", "neutral", "contradiction")
ATTRIBUTES = ("colour", "size", "place")
# Ways of putting things; those of "mismatched" are never seen in training.
PREMISES = {"matched": ("there is {x}", "{x}", "here is {x}"), "mismatched": ("a picture of {x}", "one can see {x}")}
HYPOTHESES = {
    "matched": {"colour": "the {name} is {value}", "size": "the {name} is {value}", "place": "the {name} is {value}"},
    "mismatched": {
        "colour": "{value} is the colour of the {name}",
        "size": "{value} is the size of the {name}",
        "place": "{value} stands the {name}",
    },
}


class Entailment:
    def __init__(self, config: WorldConfig, split: str) -> None:
        self.concepts = concepts(config.concepts)
        self.max_objects = min(2, config.max_objects)
        self.values = {"colour": list(COLOURS)[: config.colours], "size": list(SIZES), "place": list(PLACES)}
        self.attributes = [a for a in ATTRIBUTES if len(self.values[a]) > 1]
        self.wording = "mismatched" if split == "mismatched" else "matched"

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
        said = [self._say(concept, facts)]
        if self.max_objects > 1 and len(self.concepts) > 1 and draws.below(2):
            other = draws.choice([c for c in self.concepts if c is not concept])
            kept = draws.choice(self.attributes)
            facts = {a: draws.choice(self.values[a]) for a in self.attributes if a != kept}
            said.insert(draws.below(2), self._say(other, facts))
        premise = draws.choice(PREMISES[self.wording]).format(x=" and ".join(said))
        words = PLACE_WORDS[value] if asked == "place" else value
        hypothesis = HYPOTHESES[self.wording][asked].format(name=concept.name, value=words)
        return Made((), premise, hypothesis, label=label, factors={"attribute": asked})

    @staticmethod
    def _say(concept: Concept, facts: dict[str, str]) -> str:
        words = " ".join([*(facts[a] for a in ("size", "colour") if a in facts), concept.name])
        return article(words) + (f" {PLACE_WORDS[facts['place']]}" if "place" in facts else "")
