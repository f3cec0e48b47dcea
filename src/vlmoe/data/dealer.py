"""Which file each turn of a stream's readers takes; see `vlmoe.data.stream`."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmoe.config import SourceConfig, UserError
from vlmoe.data.counter import hash64, shuffled
from vlmoe.data.urls import file_name

MANY = 4  # files for each reader, from which on it matters little that some have one more


@dataclass(frozen=True)
class Dealer:
    """Which shard each turn of each reader takes. until: (shards,), the sum of the weights up to each; None for
    epochs."""

    shards: int
    readers: int
    key: int
    until: np.ndarray | None = None

    def epoch(self, reader: int, turn: int) -> int:
        """Resampling knows one, which never ends."""
        return (reader + turn * self.readers) // self.shards if self.until is None else 0

    def deal(self, reader: int, turn: int) -> int:
        """The shard."""
        if self.until is None:
            epoch, place = divmod(reader + turn * self.readers, self.shards)
            return shuffled(place, self.shards, hash64("shards", self.key, epoch))
        most = np.nextafter(self.until[-1], 0)
        drawn = min((hash64("draw", self.key, reader, turn) >> 11) / 2**53 * self.until[-1], most)
        return int(np.searchsorted(self.until, drawn, side="right"))


def shard_weights(shards: Sequence[str], config: SourceConfig) -> np.ndarray:
    """How often each shard is drawn, relative to others: by the first pattern that fits its name or path, else 1.

    Raises UserError when a pattern fits no shard, or nothing is left to draw.
    """
    weights = np.ones(len(shards))
    weighed = np.zeros(len(shards), dtype=bool)
    for pattern, weight in config.shard_weights.items():
        fits = np.array([fnmatch.fnmatchcase(file_name(s), pattern) or fnmatch.fnmatchcase(s, pattern) for s in shards])
        if not fits.any():
            raise UserError(f"{config.type} {config.path}: no shard's name fits '{pattern}' of shard_weights")
        weights[fits & ~weighed] = weight
        weighed |= fits
    if not weights.sum() > 0:
        raise UserError(f"{config.type} {config.path}: shard_weights leaves nothing to draw")
    return weights


def uneven(files: int, readers: int) -> list[str]:
    """For people: that an epoch's files cannot be dealt about evenly, and what to do; nothing where they can."""
    if _even(files, readers):
        return []
    what = (
        f"{files} {'files are' if files > 1 else 'file is'} too few for {readers} readers (data.stream.readers): up to "
        f"{-(-readers // files)} read the same file at a time, and samples come again before all others have been shown"
        if files < readers
        else f"{files} files cannot be dealt evenly to {readers} readers (data.stream.readers): some begin the next "
        "epoch while others have a file of this one left"
    )
    fewer = next(n for n in range(readers, 0, -1) if _even(files, n))
    return [
        f"{what}; set data.stream.readers = {fewer}, or write the data as {MANY * readers} files or more, or as a "
        f"multiple of {readers}"
    ]


def _even(files: int, readers: int) -> bool:
    return files % readers == 0 or files >= MANY * readers
