import json
import multiprocessing
import os
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.fakes import WORDS, FakeSource, small_recipe
from vlmoe.config import UserError
from vlmoe.data import loader
from vlmoe.data.batch import Batch
from vlmoe.data.loader import BadBudget, Step, StepData, held_out, held_out_size, make_loader
from vlmoe.data.text_tokenizer import train_wordpiece

TOKENIZER = train_wordpiece(WORDS * 2, 128)
BROKEN = frozenset({3, 8})


def fake_sources(data, model, kind, split="train", seed=0, factors=False, record=None):
    name = f"{kind}-{split}"
    return [(FakeSource(kind, 37, f"{name}-a", BROKEN), 2.0), (FakeSource(kind, 11, f"{name}-b"), 1.0)]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "build_sources", fake_sources)
    loader._held_out_mixture.cache_clear()


def same(one: Batch, two: Batch) -> bool:
    for f in fields(Batch):
        a, b = getattr(one, f.name), getattr(two, f.name)
        if not (a.equal(b) if isinstance(a, Tensor) else a == b):
            return False
    return True


def same_steps(one: list[Step], two: list[Step]) -> bool:
    return len(one) == len(two) and all(
        a.bad == b.bad and a.drawn == b.drawn and a.batches.keys() == b.batches.keys()
        and all(same(a.batches[k], b.batches[k]) for k in a.batches)
        for a, b in zip(one, two, strict=True)
    )  # fmt: skip


def test_any_number_of_workers_gives_the_same_batches() -> None:
    data = StepData(small_recipe(), TOKENIZER)
    runs = [list(make_loader(data, 2, 9, workers=n)) for n in (0, 1, 2)]
    assert same_steps(runs[0], runs[1])
    assert same_steps(runs[0], runs[2])
    assert same_steps(runs[0], [data[n] for n in range(2, 9)])
    assert sum(len(step.bad) for step in runs[0]) > 0


def test_spawned_workers_give_the_same_batches_and_ctrl_c_does_not_end_them() -> None:
    data = StepData(small_recipe(), TOKENIZER)
    steps = iter(make_loader(data, 0, 1000, workers=1, context="spawn"))
    first = next(steps)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)  # what Ctrl-C sends to every process of the group
    assert same_steps([first, *(next(steps) for _ in range(20))], [data[n] for n in range(21)])
    del steps
    worker.join(20)
    assert not worker.is_alive()


def test_resuming_in_the_middle_of_an_epoch_changes_nothing() -> None:
    data = StepData(small_recipe(), TOKENIZER)
    whole = list(make_loader(data, 0, 12))
    again = StepData(small_recipe(), TOKENIZER)
    assert same_steps(whole[5:], list(make_loader(again, 5, 12, workers=1)))
    assert list(make_loader(data, 12, 12)) == []


def test_a_step_holds_what_the_recipe_asks_for() -> None:
    recipe = small_recipe(data__batch={"image": 0, "text": 3, "pair": 5})
    step = StepData(recipe, TOKENIZER)[0]
    assert {kind: len(batch) for kind, batch in step.batches.items()} == {"text": 3, "pair": 5}
    assert step.drawn == 8 + len(step.bad)


def test_seeds_differ() -> None:
    recipe = small_recipe()
    one = StepData(recipe, TOKENIZER)[0].batches["pair"]
    recipe.seed = 1
    assert not same(one, StepData(recipe, TOKENIZER)[0].batches["pair"])


def test_epochs_come_through_the_loader_exactly() -> None:
    recipe = small_recipe(data__batch={"image": 0, "text": 3, "pair": 0})
    data = StepData(recipe, TOKENIZER)
    drawn: list[str] = []
    for n in range(11):  # of every three draws one is of source b, which has eleven samples
        drawn += data[n].batches["text"].keys
    assert sorted(k for k in drawn if "-b/" in k) == sorted(f"text-train-b/{i}" for i in range(11))


def test_a_user_error_in_a_worker_arrives_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = frozenset(range(5))
    monkeypatch.setattr(loader, "build_sources", lambda *a: [(FakeSource(a[2], 5, "bad", everything), 1.0)])
    data = StepData(small_recipe(), TOKENIZER)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^bad: 16 samples in a row are bad"):
            next(iter(make_loader(data, 0, 3, workers=workers)))


def test_a_tokenizer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"more than model.vocabulary = 10"):
        StepData(small_recipe(model__vocabulary=10), TOKENIZER)


def test_held_out_is_the_same_for_every_seed_and_in_pieces() -> None:
    recipe = small_recipe()
    whole = held_out(recipe, TOKENIZER, "val", "pair", 0, 6, factors=True)
    recipe.seed = 5
    piece = held_out(recipe, TOKENIZER, "val", "pair", 4, 2, factors=True)
    assert piece.keys == whole.keys[4:]
    assert all(key.startswith("pair-val") for key in whole.keys)
    assert piece.patch_mask_BP.equal(whole.patch_mask_BP[4:])  # type: ignore[union-attr, index]
    assert held_out_size(recipe, "val", "pair") == 33
    assert len(held_out(recipe, TOKENIZER, "val", "pair", 30, 10)) == 3
    with pytest.raises(UserError, match="split 'val' holds 33 pair samples"):
        held_out(recipe, TOKENIZER, "val", "pair", 33, 1)


def step_of(bad: int, good: int) -> Step:
    return Step({}, [(f"k{i}", "broken: because") for i in range(bad)], bad + good)


def test_budget_writes_each_skip_once_and_survives_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    budget = BadBudget(path, 0.5)
    budget.add(step_of(0, 10))
    budget.add(step_of(2, 10))
    state = json.loads(json.dumps(budget.state_dict()))
    resumed = BadBudget(path, 0.5)
    resumed.load_state_dict(state)
    resumed.add(step_of(1, 0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["key"]) for line in lines] == [(1, "k0"), (1, "k1"), (2, "k0")]
    assert lines[0]["reason"] == "broken: because"
    assert (resumed.drawn, resumed.bad) == (23, 3)


def test_budget_fails_above_the_share_and_not_before_it_means_something(tmp_path: Path) -> None:
    budget = BadBudget(tmp_path / "skipped.jsonl", 0.01)
    budget.add(step_of(3, 100))
    with pytest.raises(UserError, match=r"4 of 204 samples had to be skipped, more than data.max_bad_share = 0.01.*k0"):
        budget.add(step_of(1, 100))
    exact = BadBudget(None, 0.01)
    exact.add(step_of(2, 198))
    few = BadBudget(None, 0.01)
    few.add(step_of(1, 9))
    with pytest.raises(UserError, match="1 of 10 samples"):
        few.finish()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_pinned_for_cuda() -> None:
    step = next(iter(make_loader(StepData(small_recipe(), TOKENIZER), 0, 2, workers=1, device="cuda")))
    assert step.batches["pair"].image_BCHW.is_pinned()  # type: ignore[union-attr]
