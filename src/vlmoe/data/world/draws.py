"""Random numbers that are a pure function of a name: the same on every machine, for every process and order."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

WORDS = 64  # 32-bit words in the first block; few samples need more


class Draws:
    """A stream of integers read from SHAKE-128 of a name.

    The standard (FIPS 202) fixes the bits, so no library version, platform or word size can change them. Integers
    below n come from multiply-shift; its bias is below n / 2**32.
    """

    __slots__ = ("_name", "_position", "_words")

    def __init__(self, name: str) -> None:
        self._name = name.encode()
        self._words = struct.unpack(f"<{WORDS}I", hashlib.shake_128(self._name).digest(4 * WORDS))
        self._position = 0

    def word(self) -> int:
        """The next 32-bit word."""
        position = self._position
        if position == len(self._words):
            count = 2 * position  # SHAKE's output grows without changing what it began with
            self._words = struct.unpack(f"<{count}I", hashlib.shake_128(self._name).digest(4 * count))
        self._position = position + 1
        return self._words[position]

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        return (self.word() * n) >> 32

    def choice(self, items: Sequence[T]) -> T:
        return items[(self.word() * len(items)) >> 32]

    def share(self, share: float) -> bool:
        """True for this share of all draws."""
        return self.word() < int(share * 2**32)


def stable_hash(name: str) -> int:
    """A 64-bit number that depends on nothing but the name (Python's own hash differs between processes)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
