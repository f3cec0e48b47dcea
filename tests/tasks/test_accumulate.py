"""Two micro-batches are worth one batch of both: a prediction counts the same wherever it stands."""

from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_sizes import small, sparse
from tests.tasks.test_pretrain import MASK, images, texts
from tests.tasks.world import built, recipe
from vlmoe.config import TASKS, FinetuneRecipe
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.downstream.loader import TrainData, open_split
from vlmoe.data.visual_tokenizer import StoredCodes
from vlmoe.tasks.base import ROUTING, Task
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.tasks.registry import collate_of


def joined(a: Batch, b: Batch) -> Batch:
    """The rows of both, texts padded to the longer."""
    found: dict[str, Any] = {"keys": a.keys + b.keys}
    for name in (f.name for f in fields(Batch)):
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, Tensor):
            if name.endswith("_BT"):
                longest = max(one.shape[1], other.shape[1])
                filler = {"target_BT": IGNORE}.get(name, 0)
                one, other = (torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=filler) for x in (one, other))
            found[name] = torch.cat([one, other])
    return Batch(**found)


def gradients(task: Task, micro_batches: list[dict[str, Batch]]) -> dict[str, Tensor]:
    """As the loop takes them. The balance loss is of a pass, so no sum: it has no weight here."""
    for layer in task.routed_layers().values():
        layer.loss_weights = {"z": 0.1}
    predictions = Counter[str]()
    for batches in micro_batches:
        counted = task.predictions(batches)
        output = task(batches)
        assert counted.items() >= {n: int(s.count) for n, s in output.losses.items() if n in counted}.items()
        predictions.update(counted)
    task.zero_grad()
    for batches in micro_batches:
        task(batches).loss_in_step(predictions, len(micro_batches)).backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def check(task: Task, one: dict[str, Batch], other: dict[str, Batch]) -> None:
    task.double().eval()  # losses are taken in float32 all the same
    apart = gradients(task, [one, other])
    together = gradients(task, [{kind: joined(one[kind], other[kind]) for kind in one}])
    assert apart.keys() == together.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=2e-6, atol=1e-8)


def hidden(batch: Batch, count: int) -> Batch:
    """The batch with so many hidden words in each row."""
    assert batch.text_BT is not None and batch.target_BT is not None
    shown = torch.where(batch.target_BT == IGNORE, batch.text_BT, batch.target_BT)
    where = torch.zeros_like(shown, dtype=torch.bool)
    where[:, 1 : 1 + count] = True
    batch.text_BT, batch.target_BT = shown.masked_fill(where, MASK), shown.masked_fill(~where, IGNORE)
    return batch


def test_masked_modelling_with_few_and_with_many_hidden_words() -> None:
    torch.manual_seed(0)
    task = MaskedDataModelling(sparse(small()), StoredCodes(12))
    micro_batches = []
    for count, patches in ((1, 1), (5, 3)):
        image, text = images(), hidden(texts(), count)
        assert image.patch_mask_BP is not None
        image.patch_mask_BP[:] = torch.arange(4) < patches
        pair = Batch(
            image.keys, image.image_BCHW, image.patch_mask_BP, image.codes_BP, text.text_BT, text.valid_BT,
            text.target_BT,
        )  # fmt: skip
        micro_batches.append({"pair": pair, "image": image, "text": hidden(texts(), count)})
    check(task, *micro_batches)


def example_batches(plan: FinetuneRecipe) -> tuple[Task, dict[str, Batch]]:
    task, words = built(plan)
    return task, TrainData(plan, open_split(plan, "train"), collate_of(plan, task.labels, words))[0].batches


@pytest.mark.parametrize("name", [name for name in TASKS if name != "retrieval"])
def test_the_tasks(name: str) -> None:
    task, batches = example_batches(recipe(name, data={"batch": 8}))
    few = {kind: batch._each(lambda tensor: tensor[:2]) for kind, batch in batches.items()}
    many = {kind: batch._each(lambda tensor: tensor[2:]) for kind, batch in batches.items()}
    check(task, few, many)


def test_contrastive_losses_are_averaged_over_micro_batches() -> None:
    task, batches = example_batches(recipe("retrieval", data={"batch": 4}))
    assert all(name.startswith(ROUTING) for name in task.predictions(batches))
    output = task.eval()(batches)
    parts = output.loss_in_step(task.predictions(batches), 2)
    routing = sum(s.mean for n, s in output.losses.items() if n.startswith(ROUTING))
    torch.testing.assert_close(parts, output.losses["retrieval"].mean / 2 + routing)
