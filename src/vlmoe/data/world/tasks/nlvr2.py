"""Sentences about two pictures, true or false.

Four examples share a sentence, two of them true and two false, so that the sentence alone says nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from vlmoe.config import WorldConfig
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.scene import BACKGROUNDS, COLOURS, Scene, SceneMaker
from vlmoe.data.world.tasks.made import TRIES, Made, article

LABELS = ("False", "True")
GROUP = 4
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

Holds = Callable[[Scene, Scene], bool]
# what is said, its kind, whether it holds, whether a false pair is a near miss
Sentence = tuple[str, str, Holds, Holds]


class Sentences:
    """Makes the example number `index` from its group's draws and its own."""

    def __init__(self, config: WorldConfig, split: str) -> None:
        self.make = SceneMaker(config, split)
        self.max_objects = config.max_objects
        self.colours = list(COLOURS)[: config.colours]
        self.kinds = sorted({c.kind for c in self.make.concepts})
        self.ways: list[Callable[[Draws], Sentence]] = [_same_background]
        if len(self.colours) > 1:
            self.ways += [self._both_colour, self._left_and_right]
        if len(self.kinds) > 1:
            self.ways.append(self._one_kind)
        if self.max_objects > 1:
            self.ways += [_more, self._total]

    def __call__(self, group: Draws, draws: Draws, member: int, name: str) -> Made:
        """group: draws that all four members repeat; member: 0 to 3."""
        sentence, kind, holds, near = draws_way(self.ways, group)
        first_true = group.choice(((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)))
        wanted = member in first_true
        for attempt in range(TRIES):
            left, right = self.make(draws), self.make(draws)
            if holds(left, right) == wanted and (wanted or attempt > TRIES // 2 or near(left, right)):
                break
        label = int(holds(left, right))
        return Made((left, right), sentence, label=label, group=name, factors={"kind": kind})

    def _both_colour(self, draws: Draws) -> Sentence:
        colour = draws.choice(self.colours)
        return (
            f"both images show {article(colour)} object", "both",
            lambda a, b: _has(a, colour) and _has(b, colour), lambda a, b: _has(a, colour) or _has(b, colour),
        )  # fmt: skip

    def _left_and_right(self, draws: Draws) -> Sentence:
        one, two = draws.choice(self.colours), draws.choice(self.colours)
        return (
            f"the left image shows {article(one)} object and the right image shows {article(two)} object", "each",
            lambda a, b: _has(a, one) and _has(b, two), lambda a, b: _has(a, one) or _has(b, two),
        )  # fmt: skip

    def _one_kind(self, draws: Draws) -> Sentence:
        kind = draws.choice(self.kinds)

        def shows(scene: Scene) -> bool:
            return any(o.concept.kind == kind for o in scene.objects)

        return f"only one image shows {article(kind)}", "one", lambda a, b: shows(a) != shows(b), _always

    def _total(self, draws: Draws) -> Sentence:
        total = 2 + draws.below(2 * self.max_objects - 1)
        return (
            f"there are {COUNTS[total - 1]} objects in the two images", "total",
            lambda a, b: len(a.objects) + len(b.objects) == total,
            lambda a, b: abs(len(a.objects) + len(b.objects) - total) == 1,
        )  # fmt: skip


def draws_way(ways: list[Callable[[Draws], Sentence]], draws: Draws) -> Sentence:
    return draws.choice(ways)(draws)


def _has(scene: Scene, colour: str) -> bool:
    return any(o.colour == colour for o in scene.objects)


def _always(a: Scene, b: Scene) -> bool:
    return True


def _more(draws: Draws) -> Sentence:
    one, two = draws.choice((("left", "right"), ("right", "left")))
    more: Holds = lambda a, b: len(a.objects) > len(b.objects)  # noqa: E731
    holds: Holds = more if one == "left" else lambda a, b: more(b, a)
    return f"the {one} image shows more objects than the {two} image", "more", holds, _always


def _same_background(draws: Draws) -> Sentence:
    if draws.below(2):
        return "both images have the same background", "background", lambda a, b: a.background == b.background, _always
    colour = draws.choice(list(BACKGROUNDS))
    return (
        f"only one image has {article(colour)} background", "background",
        lambda a, b: (a.background == colour) != (b.background == colour), _always,
    )  # fmt: skip
