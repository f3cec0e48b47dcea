"""VQAv2's accuracy, as its official evaluation computes it: `vqaEval.py` of GT-Vision-Lab/VQA, version of 2021-03-11
(commit a013f0043c1e), run under Python 3.

An answer is right to min(1, matches / 3), averaged over leaving out each of the annotators in turn. Where all of them
say the same, the answer given must be that, letter by letter. Where they differ, both sides are normalised first:
punctuation, case, number words, articles, contractions, in this order. Line ends and tabs are spaces in either case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the official expression's look-behind is misspelt and never holds
_MOST_PERIODS = 32  # it passes re.UNICODE, 32, where the count of replacements stands
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
# A word that lacks one of its apostrophes gets it back. Official gaps are kept: "shell" is no "she'll", "im" no "i'm"
# (the official "Im" is looked up in lower case), and "somebody'd" even loses its apostrophe.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in (  # noqa: SIM905
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't "
        "he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't "
        "must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've "
        "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd "
        "something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're "
        "they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've "
        "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
        "y'all'd've you'd you'd've you'll you're you've"
    ).split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalize_answer(answer: str) -> str:
    """An answer as the official evaluation compares it where annotators differ."""
    words = strip_punctuation(_on_one_line(answer)).lower().split()
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


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, references: Sequence[str], exact: bool = False) -> float:
    """0 to 1. references: one answer of each annotator. exact: compare as they are, for answers that normalisation
    would spoil ("letter a" loses its letter).

    Raises ValueError without references.
    """
    if not references:
        raise ValueError("no reference answers to compare with")
    if not exact:
        answer, references = _on_one_line(answer), [_on_one_line(r) for r in references]
        if len(set(references)) > 1:
            answer, references = normalize_answer(answer), [normalize_answer(r) for r in references]
    return _agreement([r == answer for r in references])


def soft_scores(references: Sequence[str], exact: bool = False) -> dict[str, float]:
    """Training targets: each (normalised) answer's accuracy. With ten annotators 0.3, 0.6, 0.9 and 1 for one, two,
    three and more of them. Of three annotators or fewer, full agreement counts as 1."""
    given = references if exact else [normalize_answer(r) for r in references]
    full = _agreement([True] * len(given)) if len(given) > 1 else 0.0
    if not full:  # one annotator is left out of one: nobody is left to agree with
        return dict.fromkeys(given, 1.0)
    return {answer: _agreement([g == answer for g in given]) / full for answer in dict.fromkeys(given)}


def _agreement(agrees: Sequence[bool]) -> float:
    """Mean over leaving one annotator out of min(1, those left who agree / 3). Summed as the official code does."""
    count = sum(agrees)
    return sum(min(1.0, (count - agree) / 3) for agree in agrees) / len(agrees)
