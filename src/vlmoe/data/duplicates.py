"""How much of what is held out occurs in training all the same: the same picture, the same caption, both together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from vlmoe.config import Recipe
from vlmoe.data.loader import HELD_OUT_SEED
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import BadSample, Source
from vlmoe.data.sources import build_sources

Identity = tuple[object, object]  # of the picture, of the text


def seen_in_training(recipe: Recipe, splits: Sequence[str], held_out: int, steps: int) -> dict[str, dict[str, float]]:
    """Of each split's first `held_out` pairs: how many there are ("samples") and the shares whose picture and caption
    ("pairs"), picture ("pictures") or caption ("captions") occur among the pairs of a run's first `steps` steps.

    Exact: every training pair is looked at, by what it is made of where the source knows it (the world draws nothing
    for it), or else by its pixels. A source that comes to its end is read once, with its first captions.

    Raises UserError when a source cannot be opened.
    """
    first = {split: _first(recipe, split, held_out) for split in splits}
    pairs = {identity for found in first.values() for identity in found}
    pictures, captions = ({identity[part] for identity in pairs} for part in (0, 1))
    seen: tuple[set[object], set[object], set[object]] = set(), set(), set()
    sources = build_sources(recipe.data, recipe.model, "pair", "train", recipe.seed)
    mixture = Mixture(sources, recipe.seed, batch=max(1, recipe.data.batch.pair))
    for position in range(steps * recipe.train.accumulate * recipe.data.batch.pair):
        number, index, epoch = mixture.index(position)
        identity = None if epoch else _identity(mixture.sources[number], index)
        if identity is None:
            continue
        picture, caption = identity
        if picture in pictures:
            seen[1].add(picture)
            if identity in pairs:
                seen[0].add(identity)
        if caption in captions:
            seen[2].add(caption)
    return {
        split: {
            "samples": len(found),
            "pairs": _share(identity in seen[0] for identity in found),
            "pictures": _share(identity[0] in seen[1] for identity in found),
            "captions": _share(identity[1] in seen[2] for identity in found),
        }
        for split, found in first.items()
    }


def _first(recipe: Recipe, split: str, count: int) -> list[Identity]:
    """Of a split's first pairs, as `held_out` takes them."""
    mixture = Mixture(build_sources(recipe.data, recipe.model, "pair", split, HELD_OUT_SEED), HELD_OUT_SEED, False)
    places = [mixture.index(position) for position in range(min(count, len(mixture)))]
    found = [_identity(mixture.sources[number], index) for number, index, _ in places]
    return [identity for identity in found if identity is not None]


def _identity(source: Source, index: int) -> Identity | None:
    """None for a sample that cannot be used."""
    known = getattr(source, "identity", None)
    if known is not None:
        return known(index)
    try:
        sample = source[index]
    except BadSample:
        return None
    assert sample.image is not None
    return blake2b(sample.image.tobytes(), digest_size=16).digest(), sample.text


def _share(found: Iterable[bool]) -> float:
    values = list(found)
    return sum(values) / max(len(values), 1)
