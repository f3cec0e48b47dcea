"""BLEU-4 (Papineni et al. 2002) and CIDEr-D (Vedantam et al. 2015) as COCO's caption evaluation computes them.

pycocoevalcap, which holds that evaluation, was last released in 2020 and tokenises by a Java program that it downloads;
here its arithmetic is written out, and its tokeniser approximated: lower case, words, numbers and 's apart from
punctuation, which is removed. Tests hold the numbers against pycocoevalcap's on tokenised texts. Both metrics are given
as papers quote them, times 100 (CIDEr: a perfect caption reaches 1000).

Shape suffixes: R resamples · S samples.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlmoe.metrics.scores import RESAMPLES, Score, bootstrap

N = 4
SIGMA = 6.0
_SMALL, _TINY = 1e-9, 1e-15  # COCO's guards against division by zero
_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|[^\W_]+(?:[-.,'/&][^\W_]+)*|[^\s\w]", re.UNICODE)
_REMOVED = {"''", "'", "``", "`", "(", ")", "{", "}", "[", "]", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}

Ngrams = Counter[tuple[str, ...]]


def tokenize(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    text = re.sub(r"'(?=(s|m|d|re|ve|ll)\b)", " '", text.lower())
    return [token for token in _TOKEN.findall(text) if token not in _REMOVED]


def bleu4(hypotheses: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> Score:
    """Corpus BLEU-4 times 100, against the reference nearest in length."""
    _check(hypotheses, references)
    rows = np.array([_bleu_counts(h, refs) for h, refs in zip(hypotheses, references, strict=True)], dtype=np.float64)

    def value(total: np.ndarray) -> np.ndarray:
        """(..., 2N + 2) summed counts -> (...) BLEU."""
        right, guessed, length, wanted = total[..., :N], total[..., N : 2 * N], total[..., -2], total[..., -1]
        precision = ((right + _TINY) / (guessed + _SMALL)).prod(-1) ** (1 / N)
        ratio = (length + _TINY) / (wanted + _SMALL)
        return 100 * precision * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)

    interval = bootstrap(lambda pick: value(rows[pick].sum(1)), len(rows), resamples) if resamples else None
    return Score(float(value(rows.sum(0))), interval, len(rows))


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> Score:
    """Mean CIDEr-D times 100. How common an n-gram is, is counted over the images' references."""
    _check(hypotheses, references)
    hyps = [_ngrams(tokenize(h)) for h in hypotheses]
    refs = [[_ngrams(tokenize(r)) for r in group] for group in references]
    frequency = Counter(gram for group in refs for gram in set().union(*group))
    log_images = math.log(len(refs))
    values = np.array([_cider(h, group, frequency, log_images) for h, group in zip(hyps, refs, strict=True)])
    interval = bootstrap(lambda pick: values[pick].mean(1), len(values), resamples) if resamples else None
    return Score(float(values.mean()), interval, len(values))


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"expected references for each caption, got {len(references)} for {len(hypotheses)} captions")
    if not all(references):
        raise ValueError("expected at least one reference for each caption")


def _ngrams(words: list[str]) -> Ngrams:
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def _bleu_counts(hypothesis: str, references: Sequence[str]) -> list[float]:
    """Right n-grams of each length, n-grams of each length, words, words of the nearest reference (the shorter of two
    equally near)."""
    words, refs = tokenize(hypothesis), [tokenize(r) for r in references]
    most: Ngrams = Counter()
    for ref in refs:
        most |= _ngrams(ref)
    right = [0] * N
    for gram, count in _ngrams(words).items():
        right[len(gram) - 1] += min(most[gram], count)
    guessed = [max(0, len(words) - n) for n in range(N)]
    return [*right, *guessed, len(words), min((abs(len(r) - len(words)), len(r)) for r in refs)[1]]


def _cider(hypothesis: Ngrams, references: list[Ngrams], frequency: Ngrams, log_images: float) -> float:
    """One image's score times 100: mean over n-gram lengths and references, times ten, as COCO's code has it."""

    def weighted(grams: Ngrams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(N)]
        for gram, count in grams.items():
            vectors[len(gram) - 1][gram] = count * (log_images - math.log(max(1, frequency[gram])))
        return vectors

    def norm(vector: dict[tuple[str, ...], float]) -> float:
        return math.sqrt(sum(v * v for v in vector.values()))

    def length(grams: Ngrams) -> int:
        """The official code counts pairs of words where it means words."""
        return sum(count for gram, count in grams.items() if len(gram) == 2)

    ours, total = weighted(hypothesis), 0.0
    for reference in references:
        theirs = weighted(reference)
        penalty = math.exp(-((length(hypothesis) - length(reference)) ** 2) / (2 * SIGMA**2))
        for a, b in zip(ours, theirs, strict=True):
            dot = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
            scale = norm(a) * norm(b)
            total += penalty * (dot / scale if scale else dot)
    return 100 * 10 * total / N / len(references)
