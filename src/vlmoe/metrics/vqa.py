"""VQAv2's accuracy, as its official evaluation computes it (Antol et al. 2015; the data set's vqaEval.py).

An answer is right to min(1, matches / 3), averaged over leaving out each of the annotators in turn. The answer given is
normalised: punctuation, number words, articles, contractions. Annotators' answers only lose their punctuation, and only
where they do not all agree; that is how the official code does it, and so it is done here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = ";:/'[]\"()=+\\_><@`,?"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the official expression's look-behind is misspelt and never holds
_MOST_PERIODS = 32  # it passes re.UNICODE, 32, where the count of replacements stands
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
# Words that lack their apostrophe. Forms that have one never get here: it was taken for punctuation.
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (  # noqa: SIM905
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
        "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
        "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
        "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
        "you'd you'll you're you've"
    ).split()
}


def normalize_answer(answer: str) -> str:
    """An answer as the official evaluation compares it."""
    words = strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    numbered = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def strip_punctuation(text: str) -> str:
    """Each mark is removed where it stands beside a space anywhere in the text, or the text holds a number with a
    comma; else a space takes its place. Periods go unless a digit follows."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def vqa_accuracy(answer: str, references: Sequence[str], exact: bool = False) -> float:
    """0 to 1. exact: compare as they are, for answers that normalisation would spoil ("letter a" loses its letter).

    Raises ValueError without references.
    """
    if not references:
        raise ValueError("no reference answers to compare with")
    if not exact:
        answer = normalize_answer(answer)
        if len(set(references)) > 1:
            references = [strip_punctuation(r) for r in references]
    return _agreement(sum(r == answer for r in references), len(references))


def soft_scores(references: Sequence[str], exact: bool = False) -> dict[str, float]:
    """Training targets: each (normalised) answer's accuracy. With ten annotators 0.3, 0.6, 0.9 and 1 for one, two,
    three and more of them. Of three annotators or fewer, full agreement counts as 1."""
    counts = Counter(references if exact else [normalize_answer(r) for r in references])
    n = len(references)
    return {answer: _agreement(count, n) / _agreement(n, n) if n > 1 else 1.0 for answer, count in counts.items()}


def _agreement(count: int, n: int) -> float:
    """Mean over leaving one of n annotators out, when `count` of them agree."""
    return ((n - count) * min(1.0, count / 3) + count * min(1.0, (count - 1) / 3)) / n
