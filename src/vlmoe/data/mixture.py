"""Which sample stands where: a mixture of sources as a pure function of the position.

Position p of a kind is the p-th sample of that kind the run would draw if nothing were broken. A fixed weighted
schedule says which source serves it and how many of that source's draws came before, so no history is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from vlmoe.config import UserError
from vlmoe.data.counter import hash64, shuffled
from vlmoe.data.sample import BadSample, Sample, Source

ENDLESS = 1 << 40  # a source this long is taken in its own order: it never repeats, and shuffling it changes nothing
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
    (evaluation).
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int, shuffle: bool = True) -> None:
        self.sources = [source for source, _ in sources]
        self.schedule = Schedule([weight for _, weight in sources])
        self.seed, self.shuffle = seed, shuffle
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
        epoch, nth = divmod(draws, length)
        if length >= ENDLESS or not self.shuffle:
            return number, nth, epoch
        key = hash64("order", self.seed, source.kind, number, epoch)
        order = getattr(source, "order", None)  # a source may know an order that is kinder to its files
        return number, order(nth, key) if order else shuffled(nth, length, key), epoch

    def draw(self, position: int, use: Callable[[Sample], T], bad: list[tuple[str, str]]) -> T:
        """The sample at a position, passed through `use`.

        Where the source or `use` raises BadSample, (key, reason) is appended to `bad` and another sample of the same
        source takes the place, chosen by the position alone.

        Raises UserError after 16 bad samples for one position.
        """
        number, index, epoch = self.index(position)
        source = self.sources[number]
        for attempt in range(1, TRIES + 1):
            try:
                return use(fetch(source, index, epoch))
            except BadSample as error:
                bad.append((error.key, error.reason))
            index = hash64("instead", self.seed, source.kind, position, attempt) % len(source)
        key, reason = bad[-1]
        raise UserError(f"{describe_source(source)}: {TRIES} samples in a row are bad; the last, {key}: {reason}")


def fetch(source: Source, index: int, epoch: int) -> Sample:
    """A sample as it is in an epoch: sources with several captions an image show another one in each (`draw`)."""
    draw = getattr(source, "draw", None)
    return draw(index, epoch) if draw else source[index]


def describe_source(source: Source) -> str:
    return str(getattr(source, "name", None) or type(source).__name__)
