"""How a changed routing changes the loss: overall, and of the tokens of each value of each factor.

Shape suffixes: R rows (all tokens of a batch) · Q predicted tokens · S samples · G groups, the values of all factors in
each modality · B resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmoe.config import UserError
from vlmoe.interpret.rules import Rule, applied
from vlmoe.interpret.sites import Subject, TokenTable

RESAMPLES = 1000
SPREAD = 200  # resamples kept of each group


@dataclass(frozen=True)
class Effect:
    """A change of the mean loss, in nats (or of a score): after minus before, over `tokens` of `samples`. low, high:
    its 95% bootstrap interval over samples; se: the standard error."""

    delta: float
    low: float
    high: float
    se: float
    tokens: int
    samples: int


@dataclass(frozen=True)
class Group:
    """The predicted tokens of one modality with one value of a factor. effect: on their loss. contrast: that less the
    effect on the other tokens of this modality whose factor is known: what this value suffers more than others; None
    where there are no others. spread_B: the effect in each of the first resamples, for intervals of what is made of it.
    """

    modality: str
    factor: str
    value: str
    effect: Effect
    contrast: Effect | None
    spread_B: np.ndarray = field(repr=False)


class Ground:
    """The losses of some batches as the model is: what every change is measured against.

    batches: kept, and run again for each change. factors: names of those to split by; None: all. Groups of fewer than
    two samples, and factors with a value for nearly every token (more than `most_values`), are left out.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Iterable[Any],
        *,
        factors: Sequence[str] | None = None,
        resamples: int = RESAMPLES,
        most_values: int = 200,
        seed: int = 0,
    ) -> None:
        self.subject, self.batches, self.resamples, self.seed = subject, list(batches), resamples, seed
        self.called: list[set[str]] = []  # sites that decided in each batch
        self.rows: list[np.ndarray] = []  # of each batch, its predicted tokens
        self.before: list[np.ndarray] = []
        self._weights: dict[int, np.ndarray] = {}
        tables = [self._look(batch) for batch in self.batches]
        if not sum(map(len, self.rows)):
            raise UserError("nothing is predicted in these batches: no token has a loss, so no change can be measured")
        start = np.cumsum([0, *(len(t.samples) for t in tables)])
        self.sample_Q = np.concatenate([t.sample_R[r] + s for t, r, s in zip(tables, self.rows, start, strict=False)])
        self.samples = int(start[-1])
        self.batch_S = np.repeat(np.arange(len(tables)), np.diff(start))
        self._group(tables, factors, most_values)

    def _look(self, batch: Any) -> TokenTable:
        called: set[str] = set()
        handles = [s.watch(lambda _, name=s.name: called.add(name)) for s in self.subject.sites]  # type: ignore[misc]
        try:
            loss_R = self.subject.losses(batch)
        finally:
            for handle in handles:
                handle.remove()
        table = self.subject.tokens(batch)
        rows = np.flatnonzero(np.isfinite(loss_R) & table.valid_R)
        self.called.append(called)
        self.rows.append(rows)
        self.before.append(loss_R[rows].astype(np.float64))
        return table

    def _group(self, tables: list[TokenTable], factors: Sequence[str] | None, most_values: int) -> None:
        """names: (modality, factor, value) of each group; family_G: which groups are values of one factor in one
        modality; members: for each factor, the group of each predicted token, -1 for none."""
        known = list(dict.fromkeys(name for t in tables for name in t.factors))
        for name in factors or ():
            if name not in known:
                raise UserError(f"no factor '{name}' in these batches; there are {', '.join(known) or 'none'}")
        self.names: list[tuple[str, str, str]] = []
        self.members: list[np.ndarray] = []
        parts = list(zip(tables, self.rows, strict=True))
        modality_Q = np.concatenate([t.modality_R[r] for t, r in parts]).astype(str)
        for name in known if factors is None else factors:
            blank = [np.full(len(r), "", dtype=object) for r in self.rows]
            value_Q = np.concatenate([t.factors[name][r] if name in t.factors else b
                                      for (t, r), b in zip(parts, blank, strict=True)]).astype(str)  # fmt: skip
            member_Q = np.full(len(value_Q), -1)
            for modality in np.unique(modality_Q):
                here_Q = (modality_Q == modality) & (value_Q != "")
                values, code = np.unique(value_Q[here_Q], return_inverse=True)
                if len(values) > most_values:
                    continue
                member_Q[here_Q] = len(self.names) + code
                self.names += [(str(modality), name, str(v)) for v in values]
            self.members.append(member_Q)
        families = {pair: i for i, pair in enumerate(dict.fromkeys(n[:2] for n in self.names))}
        self.family_G = np.array([families[n[:2]] for n in self.names], dtype=np.int64)
        self.count_SG = self._sum(np.ones(len(self.sample_Q)))

    def _sum(self, value_Q: np.ndarray) -> np.ndarray:
        """(S, G + 1): summed over the tokens of each group in each sample; the last column is all tokens."""
        G = len(self.names)
        total_SG = np.zeros((self.samples, G + 1))
        for member_Q in self.members:
            in_Q = member_Q >= 0
            np.add.at(total_SG, (self.sample_Q[in_Q], member_Q[in_Q]), value_Q[in_Q])
        np.add.at(total_SG[:, G], self.sample_Q, value_Q)
        return total_SG

    def change(self, rules: Mapping[str, Rule], *, only: tuple[str, str] | None = None) -> tuple[Effect, list[Group]]:
        """The effect of changing sites by rules: overall, and on each group. only: (factor, value) of the tokens whose
        routing is changed."""
        used = [b for b, called in enumerate(self.called) if called & set(rules)]
        if not used:
            raise UserError(f"no batch passes {', '.join(rules)}: nothing to measure")
        delta_Q = np.zeros(len(self.sample_Q))
        start = np.cumsum([0, *map(len, self.rows)])
        with applied(self.subject, rules, only) as ready:
            for b in used:
                ready(self.batches[b])
                after = self.subject.losses(self.batches[b])[self.rows[b]]
                delta_Q[start[b] : start[b + 1]] = after - self.before[b]
        keep_S = np.isin(self.batch_S, used)
        return self._effects(self._sum(delta_Q)[keep_S], self.count_SG[keep_S])

    def _effects(self, delta_SG: np.ndarray, count_SG: np.ndarray) -> tuple[Effect, list[Group]]:
        G, weight_BS = len(self.names), self._resampled(len(delta_SG))
        total_G, count_G, samples_G = delta_SG.sum(axis=0), count_SG.sum(axis=0), (count_SG > 0).sum(axis=0)
        total_BG, count_BG = weight_BS @ delta_SG, weight_BS @ count_SG
        mean_G, mean_BG = _ratio(total_G, count_G), _ratio(total_BG, count_BG)
        others = [self._others(x) for x in (total_G, count_G, total_BG, count_BG)]
        contrast_G = mean_G[:G] - _ratio(others[0], others[1])
        contrast_BG = mean_BG[:, :G] - _ratio(others[2], others[3])
        effects = _summary(mean_G, mean_BG, count_G, samples_G)
        contrasts = _summary(contrast_G, contrast_BG, count_G[:G], samples_G[:G])
        groups = [
            Group(*self.names[g], effects[g], contrasts[g] if others[1][g] > 0 else None,
                  mean_BG[:SPREAD, g].astype(np.float32))
            for g in range(G) if samples_G[g] >= 2
        ]  # fmt: skip
        return effects[G], groups

    def _others(self, total: np.ndarray) -> np.ndarray:
        """Over the other values of each group's family."""
        family = np.zeros((*total.shape[:-1], int(self.family_G.max(initial=-1)) + 1))
        np.add.at(family.T, self.family_G, total[..., :-1].T)
        return family[..., self.family_G] - total[..., :-1]

    def _resampled(self, samples: int) -> np.ndarray:
        """(B, S): how often each sample is drawn in each resample; the same for every change."""
        if samples not in self._weights:
            rng = np.random.default_rng(self.seed)
            even = np.full(samples, 1 / samples)
            self._weights[samples] = rng.multinomial(samples, even, size=self.resamples).astype(np.float64)
        return self._weights[samples]


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """nan where there is nothing."""
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _summary(value_G: np.ndarray, value_BG: np.ndarray, count_G: np.ndarray, samples_G: np.ndarray) -> list[Effect]:
    """An effect for each column. A resample in which a group does not occur says nothing of it."""
    empty_G = np.isnan(value_BG).all(axis=0)
    value_BG = np.where(empty_G, 0.0, value_BG)
    gaps = np.isnan(value_BG).any()
    quantile, std = (np.nanquantile, np.nanstd) if gaps else (np.quantile, np.std)
    low_G, high_G = quantile(value_BG, [0.025, 0.975], axis=0)
    se_G = std(value_BG, axis=0)
    columns = zip(value_G, low_G, high_G, se_G, count_G, samples_G, strict=True)
    return [Effect(float(v), float(lo), float(hi), float(se), round(n), int(s)) for v, lo, hi, se, n, s in columns]
