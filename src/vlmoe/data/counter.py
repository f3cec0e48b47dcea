"""Randomness without state: every value is a function of a seed and counters.

So sample 1,000,000 needs no history, and any worker computes the same. Philox (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") gives the streams; a Feistel network gives permutations of any length without storing one.
"""

from __future__ import annotations

import hashlib

import numpy as np

_64 = (1 << 64) - 1
_ROUNDS = 6


def hash64(*parts: int | str) -> int:
    """64 well-mixed bits of a sequence of numbers and words; the same on every machine and Python version."""
    text = "/".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def stream(key: int, counter: int) -> np.random.Generator:
    """The random stream number `counter` of a 64-bit key (from `hash64`)."""
    return np.random.Generator(np.random.Philox(key=np.array([key & _64, counter & _64], dtype=np.uint64)))


def mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection of 64 bits that scrambles them."""
    x = (x + 0x9E3779B97F4A7C15) & _64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)


def shuffled(position: int, length: int, key: int) -> int:
    """Element `position` of a pseudo-random permutation of range(length), chosen by `key`.

    A balanced Feistel network is a bijection on 2h bits; walking on from values past `length` until one falls inside
    keeps it a bijection on range(length) (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The domain
    is less than four times `length`, so a few steps do.
    """
    if not 0 <= position < length:
        raise IndexError(f"position {position} is not in range({length})")
    half = ((length - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    x = position
    while True:
        left, right = x >> half, x & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (mix64(key ^ mix64((round_ << 56) | right)) & mask)
        x = (left << half) | right
        if x < length:
            return x
