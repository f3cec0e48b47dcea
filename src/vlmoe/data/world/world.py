"""The embedded world as a source: sample i of a split is the same on every machine, made when it is asked for."""

from __future__ import annotations

from operator import index as as_index

import numpy as np

from vlmoe.config import RecipeError, WorldConfig
from vlmoe.data.sample import KINDS, Sample, Span
from vlmoe.data.world.captions import captioner
from vlmoe.data.world.concepts import character_concept
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.facts import state_fact
from vlmoe.data.world.languages import LANGUAGES, languages_of
from vlmoe.data.world.phrases import SPAN_FACTORS
from vlmoe.data.world.render import PATCH_FACTORS, patch_factors, render
from vlmoe.data.world.scene import Scene, SceneMaker
from vlmoe.data.world.unicode_table import named_characters

LENGTH = 2**62
BETWEEN = " . "  # two captions of one scene
FACTORS = {"patch": PATCH_FACTORS, "span": SPAN_FACTORS}


class World:
    """Pictures of handwritten digits, characters and icons, captions of them, and facts about them.

    kind: "image", "text" or "pair". split: "train", or one that shows what training never does (see `scene.SPLITS`).
    patch: pixels; when given, samples with an image carry `patch_factors`. A text is the caption of a scene that
    nobody shows (a share `captions_in_text` of them, a share `said_twice` of these with a second caption of the same
    scene behind it) or a fact about a concept. The factors of spans are shared between
    samples: read them, do not change them.

    Raises:
        RecipeError: a value of the dial that cannot be, an unknown kind or split, a patch that does not divide the
            image.
    """

    def __init__(
        self, config: WorldConfig, kind: str, split: str = "train", seed: int = 0, patch: int | None = None
    ) -> None:
        if kind not in KINDS:
            raise RecipeError(f"the world has no samples of kind '{kind}': it has {', '.join(KINDS)}")
        if patch is not None and (patch < 1 or config.image_size % patch):
            raise RecipeError(f"key 'data.world.image_size' got {config.image_size}, wanted a multiple of {patch}")
        languages_of(config.languages)  # raises for one that is not here
        for name in ("captions_in_text", "said_twice"):
            share = getattr(config, name)
            if not 0 <= share <= 1:
                raise RecipeError(f"key 'data.world.{name}' got {share!r}, wanted a share from 0 to 1")
        self.config, self.kind, self.split, self.seed, self.patch = config, kind, split, seed, patch
        self._make = SceneMaker(config, split)
        self._told = self._characters_told()

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Sample:
        key = self._key(index)
        draws = Draws(key)
        if self.kind == "text":
            text, spans = self._say(draws)
            return Sample(key, text=text, spans=spans)
        scene = self._make(draws)
        size = self.config.image_size
        sample = Sample(key, image=render(scene, size))
        if self.patch:
            sample.patch_factors = patch_factors(scene, size, self.patch)
        if self.kind == "pair":
            sample.text, sample.spans = self._caption(scene, draws)
        return sample

    def text(self, index: int) -> str | None:
        """The text of sample `index` alone, without drawing its picture; None for images."""
        draws = Draws(self._key(index))
        if self.kind == "text":
            return self._say(draws)[0]
        return self._caption(self._make(draws), draws)[0] if self.kind == "pair" else None

    def identity(self, index: int) -> tuple[object, str]:
        """What tells pair `index` from others, without drawing it: where the first part is equal, so are the pictures;
        the second is the caption."""
        draws = Draws(self._key(index))
        scene = self._make(draws)
        return (frozenset(scene.objects), scene.background), self._caption(scene, draws)[0]

    def scene(self, index: int) -> Scene:
        """The ground truth of sample `index`. Raises ValueError for a text that states a fact."""
        draws = Draws(self._key(index))
        if self.kind == "text" and not draws.share(self.config.captions_in_text):
            raise ValueError(f"{self._key(index)} states a fact: it has no scene")
        return self._make(draws)

    def picture(self, scene: Scene) -> np.ndarray:
        """Any scene of this world's size as an image, uint8 (H, W, 3)."""
        return render(scene, self.config.image_size)

    def _say(self, draws: Draws) -> tuple[str, tuple[Span, ...]]:
        if draws.share(self.config.captions_in_text):
            scene = self._make(draws)
            text, spans = self._caption(scene, draws)
            if self.config.said_twice and draws.share(self.config.said_twice):
                again, more = self._caption(scene, draws)
                shift = len(text) + len(BETWEEN)
                moved = tuple(Span(s.start + shift, s.stop + shift, s.factors) for s in more)
                return text + BETWEEN + again, spans + moved
            return text, spans
        shown = self._make.concepts
        number = draws.below(len(shown) + len(self._told))
        concept = shown[number] if number < len(shown) else character_concept(self._told[number - len(shown)])
        return state_fact(concept, LANGUAGES[draws.choice(self.config.languages)], draws)

    def _characters_told(self) -> tuple[str, ...]:
        """Characters that no scene shows and facts name. Splits that show some kinds alone have none."""
        count = self.config.facts
        if not count or self.split not in {"train", "val", "attributes"}:
            return ()
        named = named_characters()
        if not 0 <= count <= len(named):
            raise RecipeError(f"key 'data.world.facts' got {count!r}, wanted 0 to {len(named)}")
        shown = {concept.character for concept in self._make.concepts}
        return tuple(character for character in named[:count] if character not in shown)

    def _caption(self, scene: Scene, draws: Draws) -> tuple[str, tuple[Span, ...]]:
        speaker = captioner(draws.choice(self.config.languages))
        return speaker.speak(scene, draws, self.config.captions)

    def _key(self, index: int) -> str:
        i = as_index(index)
        if not 0 <= i < LENGTH:
            raise IndexError(f"index {i}: the world's samples are numbered from 0 to 2**62 - 1")
        return f"world/{self.split}/{self.kind}/{self.seed}/{i}"
