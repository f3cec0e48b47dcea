"""A small model and the world's tasks, for tests."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vlmoe.config import FinetuneRecipe, Recipe, from_mapping
from vlmoe.data.downstream.example import Example, Examples
from vlmoe.data.downstream.loader import EvalData, TrainData, open_split
from vlmoe.data.text_tokenizer import TextTokenizer, train_wordpiece
from vlmoe.tasks.answer import Answered, answer_all
from vlmoe.tasks.downstream import Downstream
from vlmoe.tasks.registry import build_task, collate_of
from vlmoe.train.optim import make_optimizer, set_learning_rate

CPU = torch.device("cpu")
SPARSE = {"sparse": "odd", "experts": 4, "router": {"k": 2, "renormalize": True}}
MODEL = {
    "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2, "image_size": 48, "patch": 12, "max_text": 48,
    "vocabulary": 512, "codes": 16, "vl_ffn": 1, "vision": SPARSE, "text": SPARSE,
}  # fmt: skip
WORLD = {"image_size": 48, "concepts": 30, "max_objects": 2, "colours": 6}


def pretraining() -> Recipe:
    return from_mapping({"name": "small", "model": MODEL, "data": {"world": WORLD}})


def recipe(task: str, **changes: Any) -> FinetuneRecipe:
    given: dict[str, Any] = {
        "task": task, "init": "none", "model": MODEL,
        "data": {"world": WORLD, "workers": 0, "batch": 32, "limit": 64},
        "train": {"lr": 2e-3, "weight_decay": 0.0, "beta2": 0.99},
    }  # fmt: skip
    for key, value in changes.items():
        given[key] = {**given[key], **value} if isinstance(given.get(key), dict) else value
    return from_mapping(given, schema=FinetuneRecipe)


@functools.cache
def tokenizer(task: str) -> TextTokenizer:
    """Trained on the task's own words, so that nothing is unknown."""
    examples = open_split(recipe(task if task != "classify" else "caption"), "train")
    texts = []
    for i in range(300):
        e = examples.truth(i)
        texts += [t for t in (e.text, e.text_pair) if t] + (list(e.references) if task != "vqa" else [])
    return train_wordpiece(texts, 512)


def built(plan: FinetuneRecipe) -> tuple[Downstream, TextTokenizer]:
    examples, words = open_split(plan, "train"), tokenizer(plan.task)
    torch.manual_seed(plan.seed)
    return build_task(plan, examples.labels, words), words


class Drawn:
    """Examples whose pictures are drawn once, however often they are trained on."""

    def __init__(self, examples: Examples) -> None:
        self.task, self.name, self.labels = examples.task, examples.name, examples.labels
        self.length, self.truth, self.drawn = len(examples), examples.truth, functools.cache(examples.__getitem__)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        return self.drawn(index)


def learn(plan: FinetuneRecipe, steps: int) -> tuple[Downstream, TextTokenizer]:
    """The task after some steps on its `data.limit` training examples."""
    task, words = built(plan)
    task.freeze()
    data = TrainData(plan, Drawn(open_split(plan, "train")), collate_of(plan, task.labels, words))
    optimizer = make_optimizer(task, plan.train)
    task.train()
    for n in range(steps):
        set_learning_rate(optimizer, plan.train.lr * min(1.0, (n + 1) / 20, 2 * (1 - n / steps) + 0.02))
        torch.manual_seed(n)
        task(data[n].batches).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return task, words


def ask(
    task: Downstream,
    plan: FinetuneRecipe,
    words: TextTokenizer,
    split: str,
    count: int,
    batch: int = 32,
    workers: int = 0,
) -> Answered:
    examples = open_split(plan, split, task.labels or None)
    return answer_all(task, EvalData(examples, collate_of(plan, task.labels, words), count, batch), CPU, workers)
