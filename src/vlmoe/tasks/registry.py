"""The downstream tasks by name."""

from __future__ import annotations

import functools

from vlmoe.config import FinetuneRecipe
from vlmoe.data.downstream.collate import Prepare
from vlmoe.data.downstream.loader import Collate
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.tasks.caption import Caption
from vlmoe.tasks.classify import Classify
from vlmoe.tasks.downstream import Downstream
from vlmoe.tasks.nli import NLI
from vlmoe.tasks.nlvr2 import NLVR2
from vlmoe.tasks.retrieval import Retrieval
from vlmoe.tasks.vqa import VQA

DOWNSTREAM: dict[str, type[Downstream]] = {c.task: c for c in (VQA, NLVR2, Retrieval, Classify, NLI, Caption)}

READS = {  # what an example of each task holds
    "vqa": ("images", "texts"), "nlvr2": ("images", "texts"), "retrieval": ("images", "texts"),
    "classify": ("images",), "nli": ("texts",), "caption": ("images", "texts"),
}  # fmt: skip


def build_task(recipe: FinetuneRecipe, labels: tuple[str, ...], tokenizer: TextTokenizer) -> Downstream:
    """The recipe's task with random weights."""
    task = DOWNSTREAM[recipe.task](recipe, labels)
    if isinstance(task, Caption):
        task.tokenizer = tokenizer
    return task


def collate_of(recipe: FinetuneRecipe, labels: tuple[str, ...], tokenizer: TextTokenizer) -> Collate:
    """From examples to the task's batches; goes to data workers."""
    prepare = Prepare(recipe.model, tokenizer, recipe.data.blind)
    return functools.partial(DOWNSTREAM[recipe.task].collate, prepare, recipe, labels)
