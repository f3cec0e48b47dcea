"""What SigLIP's own tokenizer does to a text before its sentencepiece model sees it: lower case, no punctuation.

As `canonicalize_text` of transformers' SiglipTokenizer, which took it from big_vision (prompt_engineering.py).
"""

from __future__ import annotations

import string
from dataclasses import dataclass

_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True)
class Canonical:
    lower_case: bool = True

    def apply(self, text: str) -> tuple[str, list[int]]:
        """The canonical text, and for each of its letters the number of the one in `text` that it comes from."""
        lowered = text.lower() if self.lower_case else text
        came_from = [i for i, letter in enumerate(text) for _ in (letter.lower() if self.lower_case else letter)]
        letters: list[str] = []
        places: list[int] = []
        for letter, place in zip(lowered, came_from, strict=True):
            blank = letter.isspace()
            if letter in _PUNCTUATION or (blank and (not letters or letters[-1] == " ")):
                continue
            letters.append(" " if blank else letter)
            places.append(place)
        if letters and letters[-1] == " ":
            letters.pop()
            places.pop()
        return "".join(letters), places


def back(offset: tuple[int, int], places: list[int]) -> tuple[int, int]:
    """A range of characters of a canonical text as one of the text that it comes from."""
    start, stop = offset
    if start == stop:
        place = places[start] if start < len(places) else (places[-1] + 1 if places else 0)
        return place, place
    return places[start], places[stop - 1] + 1
