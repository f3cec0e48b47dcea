"""What the makers of examples share: a made example with its scenes, and words for objects."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmoe.data.world.languages import LANGUAGES
from vlmoe.data.world.scene import Scene, SceneObject

TRIES = 200  # scenes drawn for one wanted answer; rarer ones than 1 in 40 are not asked for
PLACE_WORDS = LANGUAGES["en"].places


@dataclass
class Made:
    """An example before rendering; see `Example`."""

    scenes: tuple[Scene, ...] = ()
    text: str | None = None
    text_pair: str | None = None
    references: tuple[str, ...] = ()
    label: int | None = None
    group: str = ""
    factors: dict[str, str] = field(default_factory=dict)


def article(words: str) -> str:
    """ "a red digit", "an orange digit"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def by_name(scene: Scene) -> list[SceneObject]:
    """The objects that their name alone picks out."""
    names = [o.concept.name for o in scene.objects]
    return [o for o in scene.objects if names.count(o.concept.name) == 1]


def by_colour(scene: Scene) -> list[SceneObject]:
    """The objects that their colour alone picks out."""
    colours = [o.colour for o in scene.objects]
    return [o for o in scene.objects if colours.count(o.colour) == 1]


def reading_order(scene: Scene) -> list[SceneObject]:
    """Row by row, from the left."""
    return sorted(scene.objects, key=lambda o: o.cell)
