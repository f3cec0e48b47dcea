"""Small sources whose every sample is known, and a recipe around them."""

from __future__ import annotations

import numpy as np

from vlmoe.config import Recipe, from_mapping
from vlmoe.data.sample import BadSample, Sample, Span

WORDS = ["red", "green", "blue", "small", "large", "circle", "square", "star", "left", "right", "above", "the", "a"]


class FakeSource:
    """Sample i is made from i alone; those in `broken` are bad."""

    def __init__(self, kind: str, length: int, name: str = "fake", broken: frozenset[int] = frozenset()) -> None:
        self.kind, self.length, self.name, self.broken = kind, length, name, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        assert 0 <= index < self.length
        key = f"{self.name}/{index}"
        if index in self.broken:
            raise BadSample(key, "broken on purpose")
        rng = np.random.default_rng(index)
        image = text = None
        spans: tuple[Span, ...] = ()
        if self.kind != "text":
            image = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        if self.kind != "image":
            words = [WORDS[j] for j in rng.integers(0, len(WORDS), rng.integers(1, 9))]
            text = " ".join(words)
            spans = (Span(0, len(words[0]), {"place": "first", "word_class": "first"}),)
        return Sample(key, image, text, spans=spans)


def small_recipe(**changes: object) -> Recipe:
    """16-pixel images, 4-pixel patches, batches of 4 images, 6 texts and 8 pairs."""
    recipe = {
        "model": {"image_size": 16, "patch": 4, "max_text": 12, "vocabulary": 128, "width": 24, "heads": 2},
        "data": {"batch": {"image": 4, "text": 6, "pair": 8}, "world": {"image_size": 16, "grid": 1, "max_objects": 1}},
    }
    for key, value in changes.items():
        group, name = key.split("__")
        recipe[group][name] = value  # type: ignore[index]
    return from_mapping(recipe)
