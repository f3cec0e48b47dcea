"""What is hidden from the model: single text tokens, and blocks of patches.

Every hidden token becomes the mask token and every hidden patch the mask embedding; BERT's mixture (80% mask, 10%
random, 10% unchanged) is not used. Counts are exact, so that shapes and the number of predictions do not vary.
Randomness comes in as a generator (see `counter.stream`), one per sample.
"""

from __future__ import annotations

import math

import numpy as np

ASPECT = 0.3  # blocks are at most 1/0.3 times as wide as high, or as high as wide (BEiT)


def count_of(ratio: float, total: int) -> int:
    """How many of `total` are hidden: ratio * total rounded half up, at least 1."""
    return min(total, max(1, math.floor(ratio * total + 0.5)))


def mask_tokens(maskable_T: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Choose tokens to hide.

    maskable_T: bool (T,), True where a token may be hidden (special and unknown tokens may not).
    Returns bool (T,) with exactly `count_of(ratio, maskable tokens)` True; all False when nothing is maskable.
    """
    hidden_T = np.zeros(len(maskable_T), dtype=bool)
    (candidates,) = np.nonzero(maskable_T)
    if len(candidates):
        order = np.argsort(rng.random(len(candidates)), kind="stable")
        hidden_T[candidates[order[: count_of(ratio, len(candidates))]]] = True
    return hidden_T


def mask_patches(side: int, ratio: float, min_block: int, rng: np.random.Generator) -> np.ndarray:
    """Choose patches to hide, block by block, as BEiT does (Bao et al. 2021, algorithm 1).

    side: patches along an edge. Blocks have a random area (from `min_block` up to what is still missing), aspect ratio
    (log-uniform in 0.3 to 1/0.3) and place; they may overlap. The last block is cut to what is missing, row by row.
    Returns bool (side * side,), row by row, with exactly `count_of(ratio, side * side)` True.
    """
    wanted = count_of(ratio, side * side)
    hidden = np.zeros((side, side), dtype=bool)
    missing = wanted
    low, high = math.log(ASPECT), -math.log(ASPECT)
    for area, shape, top, left in rng.random((4 * wanted, 4)).tolist():
        least = min(min_block, missing)
        pixels = least + area * (missing - least)
        aspect = math.exp(low + shape * (high - low))
        height = min(side, max(1, round(math.sqrt(pixels * aspect))))
        width = min(side, max(1, round(math.sqrt(pixels / aspect))))
        y, x = int(top * (side - height + 1)), int(left * (side - width + 1))
        block = hidden[y : y + height, x : x + width]
        new = block.size - int(np.count_nonzero(block))
        if new > missing:
            rows, columns = np.nonzero(~block)
            block[rows[:missing], columns[:missing]] = True
            new = missing
        else:
            block[:] = True
        missing -= new
        if not missing:
            break
    else:  # practically never: so many blocks fell on hidden patches; any others complete the count
        (free,) = np.nonzero(~hidden.ravel())
        hidden.ravel()[rng.permutation(free)[:missing]] = True
    return hidden.ravel()
