"""Questions about a scene, with one answer each.

Where answers are uneven by nature (yes or no, counts, scripts) the answer is drawn first and scenes are drawn until one
has it, so that the words of a question do not tell its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlmoe.config import RecipeError, WorldConfig
from vlmoe.data.world.concepts import Concept, in_play
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.scene import COLOURS, SIZES, Scene, SceneMaker, SceneObject, places_of, relations
from vlmoe.data.world.tasks.made import PLACE_WORDS, TRIES, Made, by_colour, by_name, reading_order

KINDS = ("identity", "colour", "size", "place", "count", "comparison", "script", "order")
COUNTS = ("one", "two", "three", "four")

Asked = tuple[str, str] | None  # question and answer; None where the scene does not allow it
Ask = Callable[[Scene, Draws], Asked]


def scripts_in_play(known: Sequence[Concept]) -> list[str]:
    return sorted({c.script for c in known if c.kind == "letter" and c.script != "common"})


def answers(config: WorldConfig) -> tuple[str, ...]:
    """All answers that questions about this world can have; they depend on the dial alone."""
    known = in_play(config)
    return (
        *(c.name for c in known), *list(COLOURS)[: config.colours], *SIZES, *places_of(config.grid),
        *COUNTS[: config.max_objects], "yes", "no", *scripts_in_play(known),
    )  # fmt: skip


class Questions:
    """Makes questions of the given kinds, or of all that this world and split allow.

    Raises RecipeError: an unknown kind, or one that this world has no use for.
    """

    def __init__(self, config: WorldConfig, split: str, kinds: tuple[str, ...] = ()) -> None:
        self.make = SceneMaker(config, split)
        self.max_objects = config.max_objects
        self.scripts = scripts_in_play(self.make.concepts)
        possible = [k for k in KINDS if self._possible(k)]
        unknown = [k for k in kinds if k not in KINDS]
        if unknown:
            raise RecipeError(f"key 'data.questions' got {unknown}, wanted some of {', '.join(KINDS)}")
        self.kinds = [k for k in possible if not kinds or k in kinds]
        if not self.kinds:
            raise RecipeError(f"key 'data.questions' got {list(kinds)}; split '{split}' of this world only allows "
                              f"{', '.join(possible)}")  # fmt: skip
        self._ask: dict[str, Ask] = {
            "identity": _identity, "colour": _colour, "size": _size, "place": _place, "order": _order,
        }  # fmt: skip

    def _possible(self, kind: str) -> bool:
        if kind in {"count", "comparison", "order"}:
            return self.max_objects > 1
        return kind != "script" or len(self.scripts) > 1

    def __call__(self, draws: Draws) -> Made:
        while True:  # a kind that finds no scene gives way to another; identity and the like always find one
            kind = draws.choice(self.kinds)
            ask, wanted = self._plan(kind, draws)
            for _ in range(TRIES):
                scene = self.make(draws)
                asked = ask(scene, draws)
                if asked is not None and wanted in {None, asked[1]}:
                    return Made((scene,), asked[0], references=(asked[1],) * 10, factors={"kind": kind})

    def _plan(self, kind: str, draws: Draws) -> tuple[Ask, str | None]:
        """How to ask, and the answer that must come out."""
        if kind in self._ask:
            return self._ask[kind], None
        if kind == "script":
            return _script, draws.choice(self.scripts)
        if kind == "comparison":
            return draws.choice((_same_colour, _related, _larger)), draws.choice(("yes", "no"))
        number = 1 + draws.below(self.max_objects)
        if draws.below(2):
            return _count_all, COUNTS[number - 1]
        return (lambda scene, d: _count_coloured(scene, d, number)), COUNTS[number - 1]


def refer(thing: SceneObject, scene: Scene, draws: Draws, *, names: bool = True, colours: bool = True) -> str:
    """Words that pick out one object: its name, its colour, or where it stands."""
    ways = [f"object {PLACE_WORDS[thing.place]}"]
    if names and thing in by_name(scene):
        ways.append(thing.concept.name)
    if colours and thing in by_colour(scene):
        ways.append(f"{thing.colour} object")
    return f"the {draws.choice(ways)}"


def _identity(scene: Scene, draws: Draws) -> Asked:
    thing = draws.choice(scene.objects)
    return f"what is {refer(thing, scene, draws, names=False)} ?", thing.concept.name


def _colour(scene: Scene, draws: Draws) -> Asked:
    thing = draws.choice(scene.objects)
    return f"what colour is {refer(thing, scene, draws, colours=False)} ?", thing.colour


def _size(scene: Scene, draws: Draws) -> Asked:
    thing = draws.choice(scene.objects)
    return f"is {refer(thing, scene, draws)} small or large ?", thing.size


def _place(scene: Scene, draws: Draws) -> Asked:
    things = [(o, o.concept.name) for o in by_name(scene)] + [(o, f"{o.colour} object") for o in by_colour(scene)]
    if not things:
        return None
    thing, words = draws.choice(things)
    return f"where is the {words} ?", thing.place


def _count_all(scene: Scene, draws: Draws) -> Asked:
    return "how many objects are there ?", COUNTS[len(scene.objects) - 1]


def _count_coloured(scene: Scene, draws: Draws, number: int) -> Asked:
    """A colour that just this many objects have."""
    colours = [o.colour for o in scene.objects]
    fitting = sorted({c for c in colours if colours.count(c) == number})
    if not fitting:
        return None
    return f"how many {draws.choice(fitting)} objects are there ?", COUNTS[number - 1]


def _same_colour(scene: Scene, draws: Draws) -> Asked:
    if len(scene.objects) != 2:
        return None
    a, b = scene.objects
    return "do the two objects have the same colour ?", "yes" if a.colour == b.colour else "no"


def _two_named(scene: Scene, draws: Draws) -> tuple[SceneObject, SceneObject] | None:
    named = by_name(scene)
    if len(named) < 2:
        return None
    first = draws.choice(named)
    return first, draws.choice([o for o in named if o is not first])


def _related(scene: Scene, draws: Draws) -> Asked:
    things = _two_named(scene, draws)
    relation = draws.choice(("left of", "right of", "above", "below"))
    if things is None:
        return None
    a, b = things
    return f"is the {a.concept.name} {relation} the {b.concept.name} ?", "yes" if relation in relations(a, b) else "no"


def _larger(scene: Scene, draws: Draws) -> Asked:
    things = _two_named(scene, draws)
    if things is None:
        return None
    a, b = things
    larger = (a.size, b.size) == ("large", "small")
    return f"is the {a.concept.name} larger than the {b.concept.name} ?", "yes" if larger else "no"


def _script(scene: Scene, draws: Draws) -> Asked:
    letters = [o for o in scene.objects if o.concept.kind == "letter" and o.concept.script != "common"]
    if not letters:
        return None
    thing = draws.choice(letters)
    return f"which script has {refer(thing, scene, draws, names=False)} ?", thing.concept.script


def _order(scene: Scene, draws: Draws) -> Asked:
    """Objects in reading order: row by row, from the left."""
    if len(scene.objects) < 2:
        return None
    row = reading_order(scene)
    at = draws.below(len(row))
    if at == 0:
        return "which object is the first in reading order ?", row[0].concept.name
    if at == len(row) - 1 and draws.below(2):
        return "which object is the last in reading order ?", row[-1].concept.name
    before = row[at - 1]
    if before not in by_name(scene):
        return None
    return f"which object follows the {before.concept.name} in reading order ?", row[at].concept.name
