"""Micro-batches: item n is a pure function of the recipe's seed and n.

Nothing here has a state, so a run can start at any step, and any number of worker processes gives the same batches.
What readers of streams remember only spares them looking again.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from vlmoe.config import Recipe, UserError, from_mapping
from vlmoe.data.batch import Batch
from vlmoe.data.collate import Collator, Ready
from vlmoe.data.counter import hash64
from vlmoe.data.downstream.example import Example
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import KINDS
from vlmoe.data.skipped import BadBudget
from vlmoe.data.sources import build_sources, understood_of, warnings_of
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.data.workers import WorkerLostError, items_of, ready_worker

__all__ = ["BadBudget", "Step", "StepData", "held_out", "held_out_size", "make_loader"]

Lost = Callable[[int, str], None]
LOST_AT_MOST, LOST_WITHIN = 5, 100  # workers, micro-batches: more is no accident
HELD_OUT_SEED = 0  # the same held-out samples and masks for every run, whatever its seed


@dataclass
class Step:
    """One micro-batch. bad: (key, reason) of each sample that was skipped. drawn: samples tried, those included.
    lost: samples that were in shards that could not be read, as far as known, beyond those listed in `bad`.
    cut: texts that were longer than model.max_text. examples: what a downstream task's batches were made of, without
    the images, for its evaluation."""

    batches: dict[str, Batch]
    bad: list[tuple[str, str]] = field(default_factory=list)
    drawn: int = 0
    lost: int = 0
    cut: int = 0
    examples: list[Example] = field(default_factory=list)

    def pin_memory(self) -> Step:
        return replace(self, batches={k: b.pin_memory() for k, b in self.batches.items()})


class StepData(Dataset[Step]):
    """The run's training data. `data[n]` is micro-batch n, for every n from 0 on.

    factors: fill `Batch.patch_factors` and `Batch.token_factors` where the source knows them. record: a folder of the
    run's, where sources that are read in streams keep what they have found; see `vlmoe.data.stream`.

    Raises UserError when a source cannot be opened, or the tokenizer is larger than the model's vocabulary.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: TextTokenizer, factors: bool = False, record: Path | None = None
    ) -> None:
        tokenizer.check_fits(recipe.model.vocabulary, "text tokenizer")
        self.seed = recipe.seed
        self.parts: dict[str, tuple[int, Mixture, Collator]] = {}
        for kind in KINDS:
            size = getattr(recipe.data.batch, kind)
            if size:
                sources = build_sources(recipe.data, recipe.model, kind, "train", recipe.seed, factors, record)
                collator = Collator(recipe.model, recipe.data.masking, tokenizer, kind, factors)
                mixture = Mixture(sources, recipe.seed, batch=size, augment=recipe.data.augment)
                self.parts[kind] = size, mixture, collator

    def understood(self) -> list[str]:
        """What the sources take for image, text and codes, in lines for people."""
        return [line for _, mixture, _ in self.parts.values() for line in understood_of(mixture.sources)]

    def warnings(self) -> list[str]:
        """What of the sources is better put right before the run, likewise."""
        return [line for _, mixture, _ in self.parts.values() for line in warnings_of(mixture.sources)]

    def __getitem__(self, micro_step: int) -> Step:
        step = Step({})
        for kind, (size, mixture, collator) in self.parts.items():
            positions = list(range(micro_step * size, (micro_step + 1) * size))
            lost: list[int] = []
            items: list[Ready] = [mixture.draw(p, collator.ready, step.bad, lost.append) for p in positions]
            step.lost += sum(lost)
            step.batches[kind] = collator.batch(items, positions, hash64("mask", self.seed, kind))
            step.drawn += size
            step.cut += sum(item.cut for item in items)
        step.drawn += len(step.bad)
        return step


class _Guarded(Dataset[object]):
    """Hands a UserError over as a value: raised in a worker, it would arrive wrapped in that worker's traceback."""

    def __init__(self, data: Dataset[Step]) -> None:
        self.data = data

    def __getitem__(self, micro_step: int) -> Step | UserError:
        try:
            return self.data[micro_step]
        except UserError as error:
            return error


class StepLoader:
    """Iterates over steps; see `make_loader`. Stopping early, by `break` or an exception, ends the workers."""

    def __init__(
        self, open_at: Callable[[int], DataLoader[object]], start: int, stop: int, lost: Lost, every: int = 1
    ) -> None:
        self.open_at, self.start, self.stop, self.lost, self.every = open_at, start, stop, lost, every

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.every))

    def __iter__(self) -> Iterator[Step]:
        n = self.start
        losses: list[int] = []  # at which step
        while n < self.stop:
            try:
                for item in items_of(self.open_at(n)):
                    if isinstance(item, UserError):
                        raise item
                    assert isinstance(item, Step)
                    n += self.every
                    yield item
            except WorkerLostError as error:
                losses = [*(m for m in losses if m > n - LOST_WITHIN), n]
                if len(losses) > LOST_AT_MOST:
                    raise UserError(
                        f"data workers died {len(losses)} times within {LOST_WITHIN} micro-batches, the last one "
                        f"{error}, at micro-batch {n}: set data.workers or the batch lower if memory is short; "
                        "data.workers=0 shows what else it is"
                    ) from None
                self.lost(n, str(error))


def _say_lost(micro_step: int, cause: str) -> None:
    print(f"a data worker was {cause}, at micro-batch {micro_step}; it is replaced", file=sys.stderr)


def make_loader(
    dataset: Dataset[Step],
    start: int,
    stop: int,
    workers: int = 0,
    device: torch.device | str = "cpu",
    context: str | None = None,
    lost: Lost = _say_lost,
    every: int = 1,
) -> StepLoader:
    """Steps `start` to `stop` - 1 of a dataset, prepared ahead by `workers` processes (0: in this one). every: the
    distance from one to the next, where other processes of the run take those between.

    Memory is pinned when `device` is a CUDA device. context: fork, spawn or forkserver; None is Python's default.
    Workers ignore the signals that end a run, see `vlmoe.data.workers`. One that dies is replaced, and `lost` is called
    with the micro-batch and the cause; after `LOST_AT_MOST` of them within `LOST_WITHIN` micro-batches the next one is
    a UserError.
    """

    server = (context or multiprocessing.get_start_method()) == "forkserver"

    def open_at(n: int) -> DataLoader[object]:
        return DataLoader(
            _Guarded(dataset),
            batch_size=None,
            sampler=range(n, stop, every),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.device(device).type == "cuda",
            worker_init_fn=functools.partial(ready_worker, server=server) if workers else None,
            multiprocessing_context=context if workers else None,
        )

    return StepLoader(open_at, start, max(start, stop), lost, every)


def held_out(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    split: str,
    kind: str,
    start: int,
    n: int,
    factors: bool = False,
) -> Batch:
    """Samples `start` to `start + n` - 1 of a held-out split, masked as in training, the same for every seed.

    Fewer where the split ends (see `held_out_size`). A bad sample is replaced by another of the split. Raises UserError
    when the split ends before `start`.
    """
    mixture = _held_out_mixture(_identity(recipe), split, kind, factors)
    if start >= len(mixture):
        raise UserError(
            f"split '{split}' holds {len(mixture)} {kind} samples, and more were asked for: set eval.samples lower"
        )
    collator = Collator(recipe.model, recipe.data.masking, tokenizer, kind, factors)
    positions = list(range(start, min(start + n, len(mixture))))
    items: list[Ready] = [mixture.draw(p, collator.ready, []) for p in positions]
    return collator.batch(items, positions, hash64("held out mask", HELD_OUT_SEED, kind, split))


def held_out_size(recipe: Recipe, split: str, kind: str) -> int:
    """How many different samples a held-out split has (2**62 where the source makes them)."""
    return len(_held_out_mixture(_identity(recipe), split, kind, False))


def _identity(recipe: Recipe) -> str:
    return json.dumps({"data": asdict(recipe.data), "model": asdict(recipe.model)}, sort_keys=True)


@functools.lru_cache(maxsize=4)
def _identified(identity: str) -> Recipe:
    return from_mapping(json.loads(identity))


@functools.lru_cache(maxsize=16)
def _held_out_mixture(identity: str, split: str, kind: str, factors: bool) -> Mixture:
    recipe = _identified(identity)  # read once: that takes longer than opening the world's splits
    sources = build_sources(recipe.data, recipe.model, kind, split, HELD_OUT_SEED, factors)
    return Mixture(sources, HELD_OUT_SEED, shuffle=False)
