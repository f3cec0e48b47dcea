"""Which sample stands where: a mixture of sources as a pure function of the position.

Position p of a kind is the p-th sample of that kind the run would draw if nothing were broken. A fixed weighted
schedule says which source serves it and how many of that source's draws came before, so no history is needed. Of a
source that is read in streams (`stream`) the draws are counted for each of its readers, which serve micro-batches in
turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from vlmoe.config import AugmentConfig, UserError
from vlmoe.data.augment import Views, views_of
from vlmoe.data.counter import hash64, shuffled, stream
from vlmoe.data.sample import ENDLESS, BadSample, Sample, Source

TRIES = 16  # samples tried for one position before the data is called unusable
_LONGEST = 10_000  # slots of a schedule

T = TypeVar("T")


class Schedule:
    """A repeating round of slots that serves each source in proportion to its weight, evenly spread.

    The round is the shortest that represents the weights exactly; where 10,000 slots do not suffice, the largest
    remainders are rounded up and every source keeps at least one slot.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        share = np.asarray(weights, dtype=np.float64)
        if share.ndim != 1 or not len(share) or not (share > 0).all():
            raise ValueError(f"weights must be a list of positive numbers, got {list(weights)}")
        self.counts = _slots(share / share.sum())
        self.length = int(self.counts.sum())
        credit = np.zeros(len(share))
        slots = np.empty(self.length, dtype=np.int64)
        before = np.empty(self.length, dtype=np.int64)
        used = np.zeros(len(share), dtype=np.int64)
        for slot in range(self.length):  # smooth weighted round robin: the source that is most behind is next
            credit += self.counts
            chosen = int(credit.argmax())
            credit[chosen] -= self.length
            slots[slot], before[slot] = chosen, used[chosen]
            used[chosen] += 1
        self._slots, self._before = slots.tolist(), before.tolist()
        self._served = np.concatenate([[[0] * len(share)], np.cumsum(slots[:, None] == range(len(share)), axis=0)])

    def draws(self, source: int, positions: np.ndarray) -> np.ndarray:
        """How many of the positions before each of these a source serves."""
        rounds, slots = np.divmod(positions, self.length)
        return rounds * self.counts[source] + self._served[slots, source]

    def locate(self, position: int) -> tuple[int, int]:
        """(source, number of that source's earlier draws) at a position."""
        rounds, slot = divmod(position, self.length)
        source = self._slots[slot]
        return source, rounds * int(self.counts[source]) + self._before[slot]


def _slots(share: np.ndarray) -> np.ndarray:
    lengths = np.arange(1, _LONGEST + 1)[:, None]
    served = lengths * share
    exact = ((np.abs(served - np.round(served)) < 1e-6) & (served > 0.5)).all(axis=1)
    if exact.any():
        return np.round(lengths[exact.argmax()] * share).astype(np.int64)
    counts = np.maximum(np.floor(_LONGEST * share), 1).astype(np.int64)
    rest = np.argsort(-(_LONGEST * share - counts), kind="stable")
    for i in range(max(0, _LONGEST - int(counts.sum()))):
        counts[rest[i % len(rest)]] += 1
    return counts


class Mixture:
    """Weighted sources of one kind.

    shuffle: each epoch of a source is a permutation of all its samples (training); without, samples come in order
    (evaluation). batch: positions in a micro-batch; the readers of a stream serve these in turn. augment: how images
    are changed (training); which way is chosen by the position alone.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        seed: int,
        shuffle: bool = True,
        batch: int = 1,
        augment: AugmentConfig | None = None,
    ) -> None:
        self.sources = [source for source, _ in sources]
        self.schedule = Schedule([weight for _, weight in sources])
        self.seed, self.shuffle, self.batch = seed, shuffle, batch
        self.augment = augment if augment and augment.on else None
        self._turns: dict[tuple[int, int], np.ndarray] = {}
        for source in self.sources:
            if len(source) == 0:
                raise UserError(f"{describe_source(source)} holds no {source.kind} samples")

    def __len__(self) -> int:
        """Samples until the source with the fewest rounds repeats; a mixture of one source: its length."""
        return min(
            len(source) * self.schedule.length // int(count)
            for source, count in zip(self.sources, self.schedule.counts, strict=True)
        )

    def index(self, position: int) -> tuple[int, int, int]:
        """(source, index, epoch) at a position."""
        number, draws = self.schedule.locate(position)
        source = self.sources[number]
        length = len(source)
        readers = getattr(source, "readers", 0)
        if readers:
            reader = position // self.batch % readers
            return number, self._draws_of(reader, readers, number, position) * readers + reader, 0
        epoch, nth = divmod(draws, length)
        if length >= ENDLESS or not self.shuffle:
            return number, nth, epoch
        key = hash64("order", self.seed, source.kind, number, epoch)
        order = getattr(source, "order", None)  # a source may know an order that is kinder to its files
        return number, order(nth, key) if order else shuffled(nth, length, key), epoch

    def _draws_of(self, reader: int, readers: int, source: int, position: int) -> int:
        """How many positions before this one, in micro-batches of this reader, a source serves."""
        turn, length = position // self.batch // readers, self.schedule.length
        period = length // math.gcd(length, readers * self.batch)  # turns after which the slots of a batch come again
        if (reader, source) not in self._turns:
            starts = (np.arange(period) * readers + reader) * self.batch
            in_batch = self.schedule.draws(source, starts + self.batch) - self.schedule.draws(source, starts)
            self._turns[reader, source] = np.concatenate([[0], np.cumsum(in_batch)])
        before = self._turns[reader, source]
        places = np.array([position // self.batch * self.batch, position])
        start, here = self.schedule.draws(source, places).tolist()
        return turn // period * int(before[-1]) + int(before[turn % period]) + here - start

    def _views(self, kind: str, position: int) -> Views | None:
        if self.augment is None:
            return None
        return views_of(self.augment, stream(hash64("augment", self.seed, kind), position))

    def draw(
        self,
        position: int,
        use: Callable[[Sample], T],
        bad: list[tuple[str, str]],
        lost: Callable[[int], None] = lambda samples: None,
    ) -> T:
        """The sample at a position, passed through `use`.

        Where the source or `use` raises BadSample, (key, reason) is appended to `bad` and another sample of the same
        source takes the place, chosen by the position alone. lost: told how many samples more a bad one stands for.

        Raises UserError after 16 bad samples for one position.
        """
        number, index, epoch = self.index(position)
        source = self.sources[number]
        for attempt in range(1, TRIES + 1):
            try:
                return use(fetch(source, index, epoch, self._views(source.kind, position)))
            except BadSample as error:
                bad.append((error.key, error.reason))
                if error.samples > 1:
                    lost(error.samples - 1)
            pick = hash64("instead", self.seed, source.kind, position, attempt)
            instead = getattr(source, "instead", None)  # a stream has others at hand
            index = instead(index, pick) if instead else pick % len(source)
        key, reason = bad[-1]
        raise UserError(f"{describe_source(source)}: {TRIES} samples in a row are bad; the last, {key}: {reason}")


def fetch(source: Source, index: int, epoch: int, views: Views | None = None) -> Sample:
    """A sample as it is in an epoch: sources with several captions an image show another one in each (`draw`). views:
    what of its images is shown; None: the centre squares."""
    draw = getattr(source, "draw", None)
    return draw(index, epoch, views) if draw else source[index]


def describe_source(source: Source) -> str:
    return str(getattr(source, "name", None) or type(source).__name__)
