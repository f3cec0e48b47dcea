"""Lists of byte strings and of records that cost no Python object for each entry.

A list of 10M names holds 10M objects. Forked data workers copy their pages as soon as reference counts change, so that
each worker grows to the size of the whole index. Here all entries lie in one buffer beside an array of their ends:
workers share both, and one long entry costs its own length and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Packed:
    """Byte strings. buffer: uint8, all of them in a row. ends: int64 (n,), where each ends."""

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, entries: Iterable[bytes]) -> Packed:
        packer = Packer()
        for entry in entries:
            packer.add(entry)
        return packer.packed()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        return self.buffer[start : int(self.ends[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))


class Packer:
    """Builds a `Packed`, entry by entry."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = Numbers()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, entry: bytes) -> None:
        self._bytes += entry
        self._ends.add(len(self._bytes))

    def packed(self) -> Packed:
        return Packed(np.frombuffer(bytes(self._bytes), dtype=np.uint8), self._ends.array())


class Numbers:
    """Whole numbers of 64 bits, collected without an object for each."""

    def __init__(self) -> None:
        self._full: list[np.ndarray] = []
        self._last: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._full)) + len(self._last)

    def add(self, *values: int) -> None:
        self._last += values
        if len(self._last) >= 1 << 16:
            self._full.append(np.array(self._last, dtype=np.int64))
            self._last = []

    def array(self) -> np.ndarray:
        return np.concatenate([*self._full, np.array(self._last, dtype=np.int64)])


class Records(Generic[T]):
    """A list of records kept as bytes, made again when asked for. A record added is copied, later changes are not seen.

    write, read: from a record to bytes and back.
    """

    def __init__(self, write: Callable[[T], bytes], read: Callable[[bytes], T]) -> None:
        self._write, self._read = write, read
        self._packer: Packer | None = Packer()
        self._packed = Packed.of([])

    def append(self, record: T) -> None:
        if self._packer is None:
            raise ValueError("the list has been read from: it takes no more records")
        self._packer.add(self._write(record))

    def _whole(self) -> Packed:
        if self._packer is not None:
            self._packed, self._packer = self._packer.packed(), None
        return self._packed

    def __len__(self) -> int:
        return len(self._packed) if self._packer is None else len(self._packer)

    def __getitem__(self, index: int) -> T:
        return self._read(self._whole()[index])

    def __iter__(self) -> Iterator[T]:
        return (self._read(raw) for raw in self._whole())
