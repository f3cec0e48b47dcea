"""What a recording says of its experts: how much each is used, what it takes, and how sure that is.

A token counts for its first choice, dropped or not, or (`choices="all"`) for all experts that served it, by the shares
of their gates. Tokens of which a factor is not known count nowhere in that factor's statistics. All of it describes
what goes together; `causal` tests what does something.

Shape suffixes: N tokens of a site · K chosen experts · E experts · V values of a factor · P permutations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import random_table

from vlmoe.interpret.recording import Recording, Routed, Words

CHOICES = ("first", "all")


@dataclass(frozen=True)
class Contingency:
    """count_EV: tokens (with `choices="all"`, shares of tokens) of each value at each expert. tokens: how many."""

    values: list[str]
    count_EV: np.ndarray
    tokens: int


@dataclass(frozen=True)
class Use:
    """share_E: of the tokens. entropy: mean of the router's distribution, nats. dropped: share of the choices dropped
    for capacity. max_over_mean: of the load, 1 is even. idle: experts without a token."""

    share_E: np.ndarray
    tokens: int
    entropy: float
    dropped: float
    max_over_mean: float
    idle: int

    def as_dict(self) -> dict[str, Any]:
        return {"share": self.share_E.tolist(), **{k: v for k, v in asdict(self).items() if k != "share_E"}}


@dataclass(frozen=True)
class Information:
    """bits: mutual information between expert and factor. chance, chance_high: mean and 97.5% quantile of the same with
    labels permuted between tokens. sample_chance, sample_chance_high: with whole samples' labels permuted, which is
    what counts; see `information`. factor_bits: the factor's entropy, the most there could be. share: (bits -
    sample_chance) / factor_bits.
    """

    bits: float
    chance: float
    chance_high: float
    sample_chance: float
    sample_chance_high: float
    factor_bits: float
    share: float
    tokens: int


def restrict(routed: Routed, keep_T: np.ndarray) -> Routed:
    """The decisions for some of the recorded tokens. keep_T: bool, over the whole token table."""
    keep_N = keep_T[routed.token_N]
    columns = (routed.token_N, routed.expert_NK, routed.gate_NK, routed.kept_NK, routed.entropy_N)
    return Routed(routed.site, *(column[keep_N] for column in columns))


# ------------------------------------------------------------------------------------------------------------------ use
def use(routed: Routed, choices: str = "first") -> Use:
    """How a site's experts are used."""
    if _checked(choices) == "first":
        load_E = np.bincount(routed.first_N[routed.first_N >= 0], minlength=routed.site.experts).astype(float)
    else:
        load_E = weights(routed, choices).sum(axis=0)
    total = load_E.sum()
    real_NK = routed.expert_NK >= 0
    return Use(
        share_E=load_E / max(total, 1e-12),
        tokens=len(routed.token_N),
        entropy=float(routed.entropy_N.mean()) if len(routed.token_N) else 0.0,
        dropped=float((real_NK & ~routed.kept_NK).sum() / max(real_NK.sum(), 1)),
        max_over_mean=float(load_E.max() * len(load_E) / total) if total else 0.0,
        idle=int((load_E == 0).sum()),
    )


def use_by(routed: Routed, words: Words, choices: str = "first") -> dict[str, np.ndarray]:
    """Value -> share_E of the tokens that have it: by kind, by modality, by any factor."""
    table = contingency(routed, words, choices)
    total_V = table.count_EV.sum(axis=0)
    return {v: table.count_EV[:, i] / max(total_V[i], 1e-12) for i, v in enumerate(table.values) if total_V[i] > 0}


def use_by_task(recordings: Mapping[str, Recording], choices: str = "first") -> dict[str, dict[str, np.ndarray]]:
    """Site -> task -> share_E. recordings: task -> its recording; sites need not be the same in all."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for task, recording in recordings.items():
        for site in recording.site_order():
            found.setdefault(site, {})[task] = use(recording.at(site), choices).share_E
    return found


def weights(routed: Routed, choices: str = "first") -> np.ndarray:
    """(N, E): what each token counts for each expert; a row sums to 1, or to 0 for a token that has none."""
    N, E = len(routed.token_N), routed.site.experts
    weight_NE = np.zeros((N, E))
    if _checked(choices) == "first":
        has_N = routed.first_N >= 0
        weight_NE[np.flatnonzero(has_N), routed.first_N[has_N]] = 1
        return weight_NE
    gate_NK = np.where(routed.kept_NK, np.abs(routed.gate_NK), 0.0)
    share_NK = gate_NK / np.maximum(gate_NK.sum(axis=1, keepdims=True), 1e-12)
    row_NK = np.broadcast_to(np.arange(N)[:, None], share_NK.shape)
    np.add.at(weight_NE, (row_NK[routed.kept_NK], routed.expert_NK[routed.kept_NK]), share_NK[routed.kept_NK])
    return weight_NE


def contingency(routed: Routed, words: Words, choices: str = "first") -> Contingency:
    """Experts by values, over the tokens whose value is known ("" is not). Values that do not occur are left out."""
    code_N = words.code_T[routed.token_N]
    if _checked(choices) == "first":
        known_N = np.array([v != "" for v in words.values], dtype=bool)[code_N] & (routed.first_N >= 0)
        shape = (routed.site.experts, len(words.values))
        flat_N = routed.first_N[known_N].astype(np.int64) * shape[1] + code_N[known_N]
        count_EV = np.bincount(flat_N, minlength=shape[0] * shape[1]).reshape(shape)
        tokens = int(known_N.sum())
    else:
        weight_NE = weights(routed, choices)
        one_NV = np.eye(len(words.values))[code_N]
        count_EV = weight_NE.T @ one_NV
        count_EV[:, [v == "" for v in words.values]] = 0
        tokens = round(count_EV.sum())
    here = np.flatnonzero(count_EV.sum(axis=0))
    return Contingency([words.values[v] for v in here], count_EV[:, here], tokens)


# ---------------------------------------------------------------------------------------------------------- information
def information(
    routed: Routed, words: Words, choices: str = "first", permutations: int = 200, seed: int = 0,
    sample_T: np.ndarray | None = None,
) -> Information:  # fmt: skip
    """Mutual information between expert and factor, beside what permuted labels give: any finite table shows some.

    Two chances. Labels permuted between tokens keep both margins; for counts that is drawing tables with these margins
    (`scipy.stats.random_table`), whatever the number of tokens. It is too low wherever tokens of one sample are alike:
    a caption's twenty tokens with one colour are one observation, not twenty. So labels are also permuted by sample
    (sample_T: the sample of each recorded token; None: each token is its own): a sample gets the known labels of
    another one, in their order, from a random place on and around again as often as its length asks for. What tokens
    of a sample have in common stays so on either side, in experts and in labels, and only what ties the two is cut.
    A factor that is constant in a sample is just exchanged between samples; one that goes by the place within, such as
    the place itself, is turned against it. (Rows of patches follow each other, so a turned image keeps its
    neighbourhoods, but for its edges.)
    """
    table = contingency(routed, words, choices)
    if table.tokens == 0:
        return Information(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    count_EV = table.count_EV[table.count_EV.sum(axis=1) > 0]
    bits, rng = float(mutual_bits(count_EV)), np.random.default_rng(seed)
    if not permutations:
        chance_P = np.zeros(1)
    elif choices == "first":
        drawn = random_table(count_EV.sum(axis=1), count_EV.sum(axis=0)).rvs(permutations, random_state=rng)
        chance_P = mutual_bits(drawn)
    else:
        chance_P = _permuted(routed, words, permutations, rng, None)
    by_sample_P = chance_P
    if sample_T is not None and permutations:
        by_sample_P = _permuted(routed, words, permutations, rng, sample_T, choices)
    factor_bits = float(_entropy(count_EV.sum(axis=0)))
    high, sample_high = (float(np.quantile(c_P, 0.975)) for c_P in (chance_P, by_sample_P))
    chance, sample_chance = float(chance_P.mean()), float(by_sample_P.mean())
    share = (bits - sample_chance) / factor_bits if factor_bits > 0 else 0.0
    return Information(bits, chance, high, sample_chance, sample_high, factor_bits, share, table.tokens)


def mutual_bits(count: np.ndarray) -> np.ndarray:
    """Mutual information, in bits, of a table of counts (..., E, V)."""
    joint = _entropy(count.reshape(*count.shape[:-2], -1))
    return np.maximum(_entropy(count.sum(axis=-1)) + _entropy(count.sum(axis=-2)) - joint, 0.0)


def _entropy(count: np.ndarray) -> np.ndarray:
    """Over the last axis, in bits."""
    p = count / np.maximum(count.sum(axis=-1, keepdims=True), 1e-300)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)


def _permuted(
    routed: Routed, words: Words, permutations: int, rng: np.random.Generator, sample_T: np.ndarray | None,
    choices: str = "all",
) -> np.ndarray:  # fmt: skip
    """(P,) bits after permuting the known labels, between tokens or (sample_T) by sample."""
    code_N = words.code_T[routed.token_N]
    known_N = np.array([v != "" for v in words.values], dtype=bool)[code_N]
    if choices == "first":
        known_N = known_N & (routed.first_N >= 0)
    rows = np.flatnonzero(known_N)
    if sample_T is not None:
        rows = rows[np.argsort(sample_T[routed.token_N[rows]], kind="stable")]
    code_N, V = code_N[rows], len(words.values)
    first_N = routed.first_N[rows].astype(np.int64) * V
    weight_NE = weights(routed, "all")[rows] if choices == "all" else None
    found = []
    for order_N in _orders(len(rows), None if sample_T is None else sample_T[routed.token_N[rows]], permutations, rng):
        if weight_NE is None:
            count = np.bincount(first_N + code_N[order_N], minlength=routed.site.experts * V)
            found.append(mutual_bits(count.reshape(-1, V)))
        else:
            found.append(mutual_bits(weight_NE.T @ np.eye(V)[code_N[order_N]]))
    return np.array(found)


def _orders(N: int, sample_N: np.ndarray | None, permutations: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Which token's label each token gets. sample_N: sorted."""
    if sample_N is None:
        yield from (rng.permutation(N) for _ in range(permutations))
        return
    _, start_S, row_N, length_S = np.unique(sample_N, return_index=True, return_inverse=True, return_counts=True)
    place_N = np.arange(N) - start_S[row_N]
    for _ in range(permutations):
        other_S = rng.permutation(len(start_S))
        turn_S = rng.integers(length_S[other_S])
        yield start_S[other_S][row_N] + (place_N + turn_S[row_N]) % length_S[other_S][row_N]


# ------------------------------------------------------------------------------------------------------- what it takes
@dataclass(frozen=True)
class Taking:
    """What experts take of a factor's values. purity_EV: a value's share of the expert's tokens; coverage_EV: the share
    of a value's tokens that go to the expert; lift_EV: purity over the value's share of all tokens, 1 is no preference.
    """

    values: list[str]
    count_EV: np.ndarray
    purity_EV: np.ndarray
    coverage_EV: np.ndarray
    lift_EV: np.ndarray


def taking(routed: Routed, words: Words, choices: str = "first") -> Taking:
    """Purity, coverage and lift of every expert and value; 0 for an expert without tokens."""
    table = contingency(routed, words, choices)
    count_EV, total = table.count_EV, max(table.count_EV.sum(), 1e-12)
    expert_E1 = np.maximum(count_EV.sum(axis=1, keepdims=True), 1e-12)
    value_V = count_EV.sum(axis=0)
    purity_EV = count_EV / expert_E1
    return Taking(table.values, count_EV, purity_EV, count_EV / value_V, purity_EV / (value_V / total))


def top_values(takings: Mapping[str, Taking], expert: int, n: int = 12) -> list[dict[str, Any]]:
    """An expert's most telling values of all factors: most tokens times log lift, its part of the mutual information.

    takings: factor -> what `taking` says.
    """
    rows = []
    for factor, t in takings.items():
        for v, value in enumerate(t.values):
            count, lift = float(t.count_EV[expert, v]), float(t.lift_EV[expert, v])
            if lift > 1:
                row = {"factor": factor, "value": value, "purity": float(t.purity_EV[expert, v])}
                row |= {"coverage": float(t.coverage_EV[expert, v]), "lift": lift, "tokens": round(count)}
                rows.append((count * np.log2(lift), row))
    rows.sort(key=lambda r: -r[0])
    return [row for _, row in rows[:n]]


def top_tokens(taken: Taking, expert: int, n: int = 20, least: int = 2) -> list[dict[str, Any]]:
    """The words an expert takes most tellingly, as `top_values`; taken: of the column "text". least: tokens each."""
    found = top_values({"": taken}, expert, len(taken.values))
    return [{"text": f["value"], "count": f["tokens"], "lift": f["lift"]} for f in found if f["tokens"] >= least][:n]


def top_patches(recording: Recording, routed: Routed, n: int = 24) -> list[np.ndarray]:
    """For each expert the rows of the image patches that have it as first choice, largest gates first."""
    vision_T = recording.column("modality").where("vision") & (recording.position_T >= 0)
    here_N = vision_T[routed.token_N]
    order = np.argsort(-routed.gate_NK[:, 0], kind="stable")
    order = order[here_N[order]]
    first = routed.first_N[order]
    return [routed.token_N[order[first == e][:n]] for e in range(routed.site.experts)]


# ---------------------------------------------------------------------------------------------------------------- paths
def paths(recording: Recording, sites: Iterable[str] | None = None, most: int = 64) -> dict[str, dict[str, Any]]:
    """Modality -> its sites in order of layers, and how tokens go on from first expert to first expert.

    {"layers": names, "links": [{"from": [site, expert], "to": [site, expert], "count", "lift"}]}. lift: over what
    independent choices would give. most: links kept between two neighbouring sites, those of most tokens. Only tokens
    that pass both sites count.
    """
    modality = recording.column("modality")
    wanted = set(recording.sites if sites is None else sites)
    found: dict[str, dict[str, Any]] = {}
    for name in modality.values:
        here_T = modality.where(name)
        layers = [s for s in recording.site_order() if s in wanted and recording.sites[s].modality in ("", name)]
        links: list[dict[str, Any]] = []
        before: tuple[str, np.ndarray] | None = None
        for site in layers:
            routed = recording.at(site)
            first_T = np.full(recording.tokens, -1)
            first_T[routed.token_N] = routed.first_N
            first_T[~here_T] = -1
            if before is not None:
                links += _links(before[0], site, before[1], first_T, most)
            before = site, first_T
        if layers:
            found[name] = {"layers": layers, "links": links}
    return found


def _links(a: str, b: str, first_a: np.ndarray, first_b: np.ndarray, most: int) -> list[dict[str, Any]]:
    both = (first_a >= 0) & (first_b >= 0)
    if not both.any():
        return []
    shape = int(first_a.max()) + 1, int(first_b.max()) + 1
    count = np.bincount(first_a[both] * shape[1] + first_b[both], minlength=shape[0] * shape[1]).reshape(shape)
    expected = count.sum(axis=1, keepdims=True) * count.sum(axis=0) / count.sum()
    order = np.argsort(-count, axis=None, kind="stable")[: min(most, int((count > 0).sum()))]
    return [
        {"from": [a, int(i)], "to": [b, int(j)], "count": int(count[i, j]), "lift": float(count[i, j] / expected[i, j])}
        for i, j in (divmod(int(o), shape[1]) for o in order)
    ]


# -------------------------------------------------------------------------------------------------------------- sharing
def sharing(recording: Recording, choices: str = "first") -> dict[str, dict[str, Any]]:
    """Site -> {"vision", "text": share_E of each modality's tokens, "overlap": sum of the smaller of both, 1 is alike},
    where both modalities may choose the same experts: at a site that gets all tokens, or through common experts, which
    are the last ones of both sites of a layer. Elsewhere there is nothing to share, and no entry."""
    found: dict[str, dict[str, Any]] = {}
    modality = recording.column("modality")
    for name, site in recording.sites.items():
        if not site.modality:
            shares = use_by(recording.at(name), modality, choices)
            if {"vision", "text"} <= set(shares):
                found[name] = _overlap(shares["vision"], shares["text"])
        elif site.common:
            partner = _partner(recording, name)
            if partner is None:
                continue
            own, others = (use(recording.at(n), choices).share_E for n in (name, partner))
            theirs = np.zeros_like(own)
            theirs[-site.common :] = others[-site.common :]
            pair = (own, theirs) if site.modality == "vision" else (theirs, own)
            found[name] = _overlap(*pair)
    return found


def _partner(recording: Recording, name: str) -> str | None:
    """The other modality's site of the same layer."""
    site = recording.sites[name]
    others = (n for n, s in recording.sites.items() if s.layer == site.layer and s.modality not in ("", site.modality))
    return next(others, None)


def _overlap(vision_E: np.ndarray, text_E: np.ndarray) -> dict[str, Any]:
    overlap = float(np.minimum(vision_E, text_E).sum())
    return {"vision": vision_E.tolist(), "text": text_E.tolist(), "overlap": overlap}


def _checked(choices: str) -> str:
    if choices not in CHOICES:
        raise ValueError(f"choices: expected {' or '.join(CHOICES)}, got {choices!r}")
    return choices
