"""The six downstream tasks as sources of examples; example i of a split is the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import index as as_index

import numpy as np

from vlmoe.config import RecipeError, WorldConfig
from vlmoe.data.downstream.example import Example
from vlmoe.data.world.captions import captioner
from vlmoe.data.world.concepts import in_play
from vlmoe.data.world.draws import Draws
from vlmoe.data.world.render import render
from vlmoe.data.world.scene import Scene, SceneMaker, available_splits
from vlmoe.data.world.tasks import nli, nlvr2, vqa
from vlmoe.data.world.tasks.made import Made

LENGTH = 2**62
CAPTIONS = {"retrieval": 2, "caption": 5}  # of an image, all different
TASKS = ("vqa", "nlvr2", "retrieval", "classify", "nli", "caption")


def task_splits(task: str, config: WorldConfig) -> tuple[str, ...]:
    """The splits of a task, "train" first. NLI shows no picture: its other split has other wordings."""
    return ("train", "val", "mismatched") if task == "nli" else available_splits(config)


class WorldExamples:
    """Examples of one task; see `Example` for what each field holds.

    questions: kinds of questions to ask (vqa), all where empty. English only.

    Raises:
        RecipeError: an unknown task or split, a kind of question this world has no use for, or a world that cannot be.
    """

    def __init__(
        self, task: str, config: WorldConfig, split: str, seed: int = 0, questions: tuple[str, ...] = ()
    ) -> None:
        if task not in TASKS:
            raise RecipeError(f"the world has no task '{task}': it has {', '.join(TASKS)}")
        if split not in task_splits(task, config):
            raise RecipeError(
                f"the world has no split '{split}' for {task}: it has {', '.join(task_splits(task, config))}"
            )
        self.task, self.config, self.split, self.seed = task, config, split, seed
        self.name = f"world/{task}/{split}/{seed}"
        self.labels: tuple[str, ...] = ()
        self._make: Callable[[Draws], Made]
        if task == "vqa":
            self.labels, self._make = vqa.answers(config), vqa.Questions(config, split, questions)
        elif task == "nlvr2":
            self.labels, self._sentences = nlvr2.LABELS, nlvr2.Sentences(config, split)
        elif task == "nli":
            self.labels, self._make = nli.LABELS, nli.Entailment(config, split)
        elif task == "classify":
            self.labels = tuple(c.name for c in in_play(config))
            self._make = _Things(replace(config, max_objects=1), split)
        else:
            self._make = _Captioned(config, split, CAPTIONS[task])

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Example:
        key, made = self._made(index)
        return self._example(key, made, tuple(render(scene, self.config.image_size) for scene in made.scenes))

    def truth(self, index: int) -> Example:
        """The example without its images, which are not drawn."""
        key, made = self._made(index)
        return self._example(key, made, ())

    def scenes(self, index: int) -> tuple[Scene, ...]:
        """What the images show."""
        return self._made(index)[1].scenes

    def _made(self, index: int) -> tuple[str, Made]:
        i = as_index(index)
        if not 0 <= i < LENGTH:
            raise IndexError(f"index {i}: the world's examples are numbered from 0 to 2**62 - 1")
        key = f"{self.name}/{i}"
        if self.task != "nlvr2":
            return key, self._make(Draws(key))
        group = f"{self.name}/sentence/{i // nlvr2.GROUP}"
        return key, self._sentences(Draws(group), Draws(key), i % nlvr2.GROUP, group)

    @staticmethod
    def _example(key: str, made: Made, images: tuple[np.ndarray, ...]) -> Example:
        return Example(
            key,
            images,
            made.text,
            made.text_pair,
            made.references,
            made.label,
            made.group,
            dict(made.factors),
            exact=True,
        )


class _Things:
    """One object, to be named."""

    def __init__(self, config: WorldConfig, split: str) -> None:
        self.make = SceneMaker(config, split)
        self.label = {concept.index: label for label, concept in enumerate(in_play(config))}

    def __call__(self, draws: Draws) -> Made:
        scene = self.make(draws)
        concept = scene.objects[0].concept
        return Made((scene,), label=self.label[concept.index], factors={"kind": concept.kind})


class _Captioned:
    """A scene and different captions of it."""

    def __init__(self, config: WorldConfig, split: str, count: int) -> None:
        self.make, self.count, self.captioner = SceneMaker(config, split), count, captioner("en")

    def __call__(self, draws: Draws) -> Made:
        scene = self.make(draws)
        captions: dict[str, None] = {}
        while len(captions) < self.count:  # every scene can be said in more ways than are asked for
            captions[self.captioner.speak(scene, draws)[0]] = None
        return Made((scene,), references=tuple(captions), factors={"objects": str(len(scene.objects))})
