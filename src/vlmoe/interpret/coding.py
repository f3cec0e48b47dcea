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
        self._forget()

    def tidy(self) -> None:
        """Forget all numbers where there are too many. For between two batches."""
        if self.count > MOST:
            self._forget()

    def _forget(self) -> None:
        self.vocabularies: dict[str, Vocabulary] = {}  # by factor; "" is 0 in each
        self.seen: dict[tuple[str, ...], _Seen] = {}  # by the names of the factors
        self.code_CF = np.zeros((256, 0), np.int32)
        self.count = 1  # 0: nothing is known
        self.new: list[dict[int, int]] = []  # combinations that are not in code_CF yet: factor -> code

    def numbers(self, samples: Sequence[dict[str, list[str]]], count: int) -> np.ndarray:
        """(samples, count): the combination of each token. samples: of each, name -> one value for each of its `count`
        tokens. Those with the same factors are gone through in one sweep."""
        found = np.zeros((len(samples), count), np.int32)
        groups: dict[tuple[str, ...], list[int]] = {}
        for b, factors in enumerate(samples):
            if factors:
                groups.setdefault(tuple(factors), []).append(b)
        for names, members in groups.items():
            if names not in self.seen:
                self.seen[names] = self._begin(names)
            columns = (chain.from_iterable([samples[b][name] for b in members]) for name in names)
            numbers = map(self.seen[names].__getitem__, zip(*columns, strict=True))
            found[members] = np.fromiter(numbers, np.int32, len(members) * count).reshape(-1, count)
        return found

    def columns(self, number_R: np.ndarray, names: Sequence[str]) -> dict[str, Coded]:
        """The columns of these factors."""
        self._settle()
        code_FR = self.code_CF[number_R].T
        known = {name: Coded(code_FR[i], v.values_) for i, (name, v) in enumerate(self.vocabularies.items())}
        return {name: known.get(name) or Coded(np.zeros(len(number_R), np.int32), [""]) for name in names}

    def _begin(self, names: tuple[str, ...]) -> _Seen:
        for name in names:
            self.vocabularies.setdefault(name, Vocabulary([""]))
        known = list(self.vocabularies)
        return _Seen(self, [(known.index(name), self.vocabularies[name]) for name in names])

    def _settle(self) -> None:
        """Put new combinations into code_CF, which grows where it must."""
        C, F = len(self.code_CF), len(self.vocabularies)
        if self.count > C or F > self.code_CF.shape[1]:
            while C < self.count:
                C *= 2
            grown = np.zeros((C, F), np.int32)
            grown[: len(self.code_CF), : self.code_CF.shape[1]] = self.code_CF
            self.code_CF = grown
        if self.new:
            rows = [row.get(f, 0) for row in self.new for f in range(F)]
            self.code_CF[self.count - len(self.new) : self.count] = np.array(rows, np.int32).reshape(-1, F)
            self.new = []


class _Seen(dict[tuple[str, ...], int]):
    """Combinations of values of the same factors -> their numbers. slots: each factor's column and vocabulary."""

    def __init__(self, owner: Combinations, slots: list[tuple[int, Vocabulary]]) -> None:
        super().__init__()
        self.owner, self.slots = owner, slots

    def __missing__(self, values: tuple[str, ...]) -> int:
        owner = self.owner
        self[values] = number = owner.count
        owner.new.append({f: v[value] for (f, v), value in zip(self.slots, values, strict=True)})
        owner.count += 1
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
