"""A text's tokens as parts of words, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmoe.data.text_tokenizer import TextTokenizer


@dataclass
class PartOfWord:
    """Tokens of one word, as people are shown it: those that are hidden one by one, others in a row together.

    position: of the first of them in the text's tokens. joined: whether it goes on with the word before it.
    """

    ids: list[int]
    position: int
    hidden: bool
    joined: bool


def parts_of_words(tokenizer: TextTokenizer, ids: Sequence[int], hidden: Sequence[bool]) -> list[PartOfWord]:
    """A text's tokens as parts of words, without start, end and padding."""
    parts: list[PartOfWord] = []
    for position, (id, hides) in enumerate(zip(ids, hidden, strict=True)):
        if id in {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id}:
            continue
        joined = bool(parts) and tokenizer.continues(id)
        if joined and not hides and not parts[-1].hidden:
            parts[-1].ids.append(id)
        else:
            parts.append(PartOfWord([id], position, hides, joined))
    return parts
