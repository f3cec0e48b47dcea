"""Words as numbers, so that what is known of every token costs a recording little.

Shape suffixes: R rows (all tokens of a batch) · C combinations of values met so far · F factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from vlmoe.interpret.sites import Site, TokenTable

MOST = 1 << 18  # words or combinations kept before they are numbered anew


@dataclass
class Coded:
    """A column of words: code_R into `values`, which may grow later on but never changes."""

    code_R: np.ndarray
    values: list[str]

    def words(self) -> np.ndarray:
        """The column in full, an array of str objects."""
        return np.array(self.values, dtype=object)[self.code_R] if len(self.code_R) else np.zeros(0, dtype=object)


class Vocabulary(dict[str, int]):
    """Numbers for words, given as they come."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        super().__init__()
        self.values_: list[str] = []
        for word in words:
            self[word]

    def __missing__(self, word: str) -> int:
        self[word] = code = len(self.values_)
        self.values_.append(word)
        return code

    def code(self, words_R: np.ndarray) -> Coded:
        return Coded(np.fromiter(map(self.__getitem__, words_R.tolist()), np.int32, len(words_R)), self.values_)


class Combinations:
    """Numbers for the factors of tokens. The tokens of a sample differ in few ways, and samples repeat each other: a
    token's values are looked up together, and only combinations that were never met are taken apart."""

    def __init__(self) -> None:
        self.vocabularies: dict[str, Vocabulary] = {}  # by factor; "" is 0 in each
        self.seen: dict[tuple[str, ...], _Seen] = {}  # by the names of the factors
        self.code_CF = np.zeros((256, 8), np.int32)
        self.count = 1  # 0: nothing is known

    def tidy(self) -> None:
        """Forget all numbers where there are too many. For between two batches."""
        if self.count > MOST:
            self.vocabularies, self.seen, self.count = {}, {}, 1
            self.code_CF = np.zeros((256, 8), np.int32)

    def numbers(self, factors: dict[str, list[str]]) -> list[int]:
        """The combination of each token of one sample. factors: name -> one value a token."""
        names = tuple(factors)
        if names not in self.seen:
            self.seen[names] = _Seen(self, names)
        return list(map(self.seen[names].__getitem__, zip(*factors.values(), strict=True)))

    def add(self, names: tuple[str, ...], values: tuple[str, ...]) -> int:
        columns = []
        for name in names:
            if name not in self.vocabularies:
                self.vocabularies[name] = Vocabulary([""])
            columns.append(list(self.vocabularies).index(name))
        C, F = self.code_CF.shape
        if self.count == C or len(self.vocabularies) > F:
            C, F = (2 * C if self.count == C else C), max(F, 2 * len(self.vocabularies))
            grown = np.zeros((C, F), np.int32)
            grown[: len(self.code_CF), : self.code_CF.shape[1]] = self.code_CF
            self.code_CF = grown
        self.code_CF[self.count, columns] = [self.vocabularies[n][v] for n, v in zip(names, values, strict=True)]
        self.count += 1
        return self.count - 1

    def columns(self, number_R: np.ndarray, names: Sequence[str]) -> dict[str, Coded]:
        """The columns of these factors."""
        code_FR = self.code_CF[number_R].T
        known = {name: Coded(code_FR[i], v.values_) for i, (name, v) in enumerate(self.vocabularies.items())}
        return {name: known.get(name) or Coded(np.zeros(len(number_R), np.int32), [""]) for name in names}


class _Seen(dict[tuple[str, ...], int]):
    def __init__(self, owner: Combinations, names: tuple[str, ...]) -> None:
        super().__init__()
        self.owner, self.names = owner, names

    def __missing__(self, values: tuple[str, ...]) -> int:
        self[values] = number = self.owner.add(self.names, values)
        return number


class CodedTable(TokenTable):
    """A token table whose words are kept as numbers. codes: "modality", "text" and "factor.NAME" -> column; the columns
    in full are made when they are asked for."""

    def __init__(
        self, kind: str, samples: list[str], sample_R: np.ndarray, position_R: np.ndarray, valid_R: np.ndarray,
        modality: Coded, text: Coded, factors: dict[str, Coded],
    ) -> None:  # fmt: skip
        self.kind, self.samples = kind, samples
        self.sample_R, self.position_R, self.valid_R = sample_R, position_R, valid_R
        self.codes = {"modality": modality, "text": text, **{f"factor.{name}": c for name, c in factors.items()}}
        self._factors = factors

    def rows_of(self, site: Site) -> np.ndarray:
        modality = self.codes["modality"]
        if not site.modality:
            return np.arange(len(self.sample_R))
        return np.flatnonzero(modality.code_R == modality.values.index(site.modality))

    @cached_property
    def modality_R(self) -> np.ndarray:  # type: ignore[override]
        return self.codes["modality"].words()

    @cached_property
    def text_R(self) -> np.ndarray:  # type: ignore[override]
        return self.codes["text"].words()

    @cached_property
    def factors(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        return {name: column.words() for name, column in self._factors.items()}


def names_of(parts: Sequence[Mapping[str, object]]) -> list[str]:
    """The factors that any sample has, in the order they are met."""
    return list(dict.fromkeys(chain.from_iterable(parts)))
