"""A task's examples as steps for training and as batches for evaluation. Nothing here has a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vlmoe.config import FinetuneRecipe, UserError
from vlmoe.data.augment import Views
from vlmoe.data.batch import Batch
from vlmoe.data.counter import hash64, stream
from vlmoe.data.downstream.example import Example, Examples
from vlmoe.data.downstream.files import FileExamples, open_files
from vlmoe.data.loader import Step
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import BadSample
from vlmoe.data.world.tasks import WorldExamples, task_splits

# examples, one random generator for each, whether it is training -> the task's batches
Collate = Callable[[list[Example], list[np.random.Generator], bool], dict[str, Batch]]
EVAL_SEED = 0  # the same evaluated examples of the world for every run


def splits_of(recipe: FinetuneRecipe) -> tuple[str, ...]:
    """Names of the splits that are evaluated; the first chooses the best checkpoint."""
    if recipe.data.type == "world":
        return task_splits(recipe.task, recipe.data.world)[1:]
    return tuple(files.name or "val" for files in recipe.data.eval)


def open_split(recipe: FinetuneRecipe, split: str, labels: tuple[str, ...] | None = None) -> Examples:
    """One split, "train" or one of `splits_of`. labels: the classes of the trained model; None takes the data's own.

    Raises UserError: no such split, or its files are unusable.
    """
    data = recipe.data
    known = ("train", *splits_of(recipe))
    if split not in known:
        raise UserError(f"no split '{split}' for {recipe.task}: there are {', '.join(known)}")
    if data.type == "world":
        seed = recipe.seed if split == "train" else EVAL_SEED
        return WorldExamples(recipe.task, data.world, split, seed, tuple(data.questions))
    files = data.train if split == "train" else data.eval[known.index(split) - 1]
    return open_files(
        recipe.task, files, image_size=recipe.model.image_size, max_pixels=data.max_pixels,
        labels=labels, answers=data.answers,
    )  # fmt: skip


def count_of(recipe: FinetuneRecipe, examples: Examples, split: str) -> int:
    """How many examples of a split are used."""
    if split == "train":
        return min(len(examples), recipe.data.limit or len(examples))
    return min(len(examples), recipe.eval.samples) if recipe.data.type == "world" else len(examples)


def _as_it_is(example: Any) -> Any:
    return example


class _Source:
    """Examples in the shape that `Mixture` draws from."""

    def __init__(self, examples: Examples, length: int) -> None:
        self.examples, self.length = examples, length
        self.kind, self.name = examples.task, examples.name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def draw(self, index: int, epoch: int, views: Views | None = None) -> Example:
        if views is None:
            return self.examples[index]
        assert isinstance(self.examples, FileExamples)  # the world's are refused with the recipe
        return self.examples.draw(index, views)


class TrainData(Dataset[Step]):
    """`data[n]` is micro-batch n. An example that cannot be read is replaced by another and counted."""

    def __init__(self, recipe: FinetuneRecipe, examples: Examples, collate: Collate) -> None:
        self.size, self.seed, self.collate = recipe.data.batch, recipe.seed, collate
        source = _Source(examples, count_of(recipe, examples, "train"))
        self.mixture = Mixture([(source, 1.0)], recipe.seed, augment=recipe.data.augment)  # type: ignore[list-item]

    def __getitem__(self, micro_step: int) -> Step:
        step = Step({})
        positions = range(micro_step * self.size, (micro_step + 1) * self.size)
        examples: list[Any] = [self.mixture.draw(p, _as_it_is, step.bad) for p in positions]
        key = hash64("example", self.seed)
        step.batches = self.collate(examples, [stream(key, p) for p in positions], True)
        step.drawn = self.size + len(step.bad)
        return step


@dataclass
class EvalData(Dataset[Step]):
    """`data[n]` is batch n of a split in order; an example that cannot be read is left out and listed in `Step.bad`.

    swapped: "image" or "text" gives each example that part of another, so that what is found without looking can be
    told: of the one half the split away, since neighbours in a file often ask about the same image. Which it is depends
    on the example alone, not on batches.
    """

    examples: Examples
    collate: Collate
    count: int
    batch: int
    swapped: str = ""

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch)

    def __getitem__(self, number: int) -> Step:
        step = Step({})
        found, positions = [], []
        for i in range(number * self.batch, min((number + 1) * self.batch, self.count)):
            step.drawn += 1
            try:
                found.append(self._example(i))
                positions.append(i)
            except BadSample as error:
                step.bad.append((error.key, error.reason))
        if found:
            key = hash64("evaluated", EVAL_SEED)
            step.batches = self.collate(found, [stream(key, p) for p in positions], False)
            step.examples = [replace(e, images=()) for e in found]
        return step

    def _example(self, i: int) -> Example:
        example, other = self.examples[i], (i + self.count // 2) % self.count
        if self.swapped == "image":
            return replace(example, images=self.examples[other].images)
        if self.swapped == "text":
            return replace(example, text=self.examples.truth(other).text)
        return example
