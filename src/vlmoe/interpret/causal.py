"""What an expert does: change the routing, and measure what becomes of the loss, per value of every factor.

Two ways to take experts away. "reroute": a token goes to the best of the other experts by the router's probabilities,
with the gate it would have had there (`rules.regate`); gates of a token that keep a fixed sum keep it, so the others'
gates move as well. "silence": the expert's gate is 0 and nothing takes its place; the other gates stay as they are.

A token's loss depends on the others of its sample through attention: taking an expert away also changes what later
layers see of the tokens it served. `only` changes the routing of the tokens with one value of a factor, no others'.

Shape suffixes: E experts · V values of a factor · B resamples · X pairs of an expert and a value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch.utils.data import Dataset

from vlmoe.config import UserError
from vlmoe.data.downstream.loader import EvalData, count_of, open_split, splits_of
from vlmoe.data.loader import Step
from vlmoe.interpret.effects import Effect, Ground, Group
from vlmoe.interpret.recorder import choose_sites
from vlmoe.interpret.recording import Recording
from vlmoe.interpret.rules import applied, forced, reroute, silence
from vlmoe.interpret.sites import Subject
from vlmoe.interpret.statistics import Taking, restrict, taking
from vlmoe.tasks.answer import answer_all
from vlmoe.tasks.downstream import Classifier
from vlmoe.tasks.export import Finetuned
from vlmoe.tasks.registry import collate_of

MODES = {"reroute": reroute, "silence": silence}
LEVEL = 0.05  # all intervals of a matrix hold together with at least 1 - LEVEL
LEAST_SAMPLES = 10  # with this value, for a claim about it
LEAST_LIFT, LEAST_TOKENS = 1.5, 20  # of an expert that looks specialised in a value
NO_LIFT = 1.1  # up to this it shows no preference
ScoreOf = Callable[[], "float | np.ndarray"]  # a task's score, or its parts, one for each example
Experts = Mapping[str, Sequence[int]]  # site -> numbers


@dataclass(frozen=True)
class Ablation:
    """experts: what was taken away or forced. loss: the effect on all predicted tokens of the samples that these sites
    decide for. score: on a task's score, where one was given."""

    experts: dict[str, list[int]]
    mode: str
    loss: Effect
    groups: list[Group]
    score: Effect | None = None


# ------------------------------------------------------------------------------------------------------------- changes
def ablate(
    subject: Subject,
    batches: Iterable[Any] | Ground,
    experts: Experts,
    mode: str = "reroute",
    *,
    only: tuple[str, str] | None = None,
    score: ScoreOf | None = None,
    **options: Any,
) -> Ablation:
    """Take experts away. batches: or their `Ground`, so that the losses before are measured once. only: (factor,
    value), see above. score: what a task scores, measured before and after (see `task_score`). options: of `Ground`.

    Raises UserError: an unknown mode, site or expert, no expert left to take over.
    """
    return _changed(subject, batches, experts, _known(mode), only, score, options)


def force(
    subject: Subject,
    batches: Iterable[Any] | Ground,
    experts: Experts,
    *,
    only: tuple[str, str] | None = None,
    score: ScoreOf | None = None,
    **options: Any,
) -> Ablation:
    """Send every token of the sites, or those of `only`, to the given experts and no others. Else as `ablate`."""
    return _changed(subject, batches, experts, "force", only, score, options)


def _changed(
    subject: Subject, batches: Iterable[Any] | Ground, experts: Experts, mode: str,
    only: tuple[str, str] | None, score: ScoreOf | None, options: dict[str, Any], before: np.ndarray | None = None,
) -> Ablation:  # fmt: skip
    sites = {site.name: site for site in choose_sites(subject, list(experts))}
    rules = {name: {**MODES, "force": forced}[mode](sites[name], numbers) for name, numbers in experts.items()}
    if score is not None and only is not None:
        raise UserError("a score is measured with all tokens changed: give either `only` or `score`")
    ground = batches if isinstance(batches, Ground) else Ground(subject, batches, **options)
    loss, groups = ground.change(rules, only=only)
    effect = None
    if score is not None:
        with applied(subject, rules):
            after = np.asarray(score(), dtype=np.float64)
        effect = paired(np.asarray(score(), dtype=np.float64) if before is None else before, after, ground.resamples)
    return Ablation({name: list(numbers) for name, numbers in experts.items()}, mode, loss, groups, effect)


def paired(before: np.ndarray, after: np.ndarray, resamples: int, seed: int = 0) -> Effect:
    """The change of a score. Its interval is a paired bootstrap over examples, nan where the score is one number."""
    delta = after - before
    if delta.ndim == 0:
        return Effect(float(delta), np.nan, np.nan, np.nan, 1, 1)
    pick = np.random.default_rng(seed).integers(len(delta), size=(resamples, len(delta)))
    mean_B = delta[pick].mean(axis=1)
    low, high = np.quantile(mean_B, [0.025, 0.975])
    return Effect(float(delta.mean()), float(low), float(high), float(mean_B.std()), len(delta), len(delta))


def task_score(
    trained: Finetuned, split: str | None = None, samples: int | None = None, batch: int | None = None
) -> ScoreOf:
    """A function that answers a split of a fine-tuned run's task and gives its main score, as `vlmoe eval` does: one
    value for each example where the score is their mean (all classifiers), else the number.

    split: None: the one that chooses the best weights. samples, batch: None: the recipe's. The examples are kept.
    """
    recipe, model = trained.recipe, trained.model
    examples = open_split(recipe, split or splits_of(recipe)[0], trained.labels or None)
    count = min(len(examples), samples or count_of(recipe, examples, split or splits_of(recipe)[0]))
    collate = collate_of(recipe, trained.labels, trained.text_tokenizer)
    data = EvalData(examples, collate, count, batch or recipe.eval.batch)
    kept = _Kept([data[n] for n in range(len(data))])
    device = next(model.parameters()).device

    def score() -> float | np.ndarray:
        seen = answer_all(model, kept, device)  # type: ignore[arg-type]
        if not isinstance(model, Classifier):
            return seen.scores(model)[model.main].value
        each = [model.score([a], [e])[model.main] for a, e in zip(seen.answers, seen.examples, strict=True)]
        return np.array([s.value for s in each if s.n])

    return score


class _Kept(Dataset[Step]):
    """Steps that need not be made again."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Step:
        return self.steps[number]


# -------------------------------------------------------------------------------------------------------------- matrix
@dataclass
class Matrix:
    """Experts of some sites, each taken away alone. sites: name -> expert -> `Ablation`. comparisons: how many groups
    of at least LEAST_SAMPLES samples were looked at, all experts together."""

    mode: str
    sites: dict[str, dict[int, Ablation]]

    @functools.cached_property
    def comparisons(self) -> int:
        return sum(sum(map(enough, a.groups)) for row in self.sites.values() for a in row.values())

    def interval(self, effect: Effect) -> tuple[float, float]:
        """Bonferroni: all comparisons' intervals hold together with 95%. A bootstrap does not resolve quantiles that
        far out, so this is its standard error times Student's t at 1 - LEVEL / (2 comparisons), samples - 1 degrees."""
        t = float(stats.t.ppf(1 - LEVEL / (2 * max(self.comparisons, 1)), max(effect.samples - 1, 1)))
        return effect.delta - t * effect.se, effect.delta + t * effect.se

    def is_cause(self, group: Group) -> bool:
        """Whether the expert's absence makes the loss of this value's tokens worse, and worse than that of others."""
        return (
            enough(group)
            and group.contrast is not None
            and self.interval(group.effect)[0] > 0
            and self.interval(group.contrast)[0] > 0
        )

    def causes(self, site: str) -> list[tuple[int, Group]]:
        """(expert, group) of each cause at a site."""
        return [(e, g) for e, a in self.sites[site].items() for g in a.groups if self.is_cause(g)]

    def table(self, site: str, factor: str, modality: str) -> tuple[list[str], np.ndarray]:
        """The values of a factor, and delta_EV: the change of their tokens' loss without each expert of `sites`."""
        rows = [
            {g.value: g.effect.delta for g in a.groups if (g.modality, g.factor) == (modality, factor)}
            for a in self.sites[site].values()
        ]
        values = list(dict.fromkeys(v for row in rows for v in row))
        return values, np.array([[row[v] for v in values] for row in rows])


def enough(group: Group) -> bool:
    """Whether there are samples enough to claim something of a group, and others to compare it with."""
    return group.effect.samples >= LEAST_SAMPLES and group.contrast is not None


def matrix(
    subject: Subject,
    batches: Iterable[Any] | Ground,
    experts: Experts | None = None,
    *,
    mode: str = "reroute",
    score: ScoreOf | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Matrix:
    """Take away each of the experts alone. experts: site -> numbers; None: all of all sites. Sites that no batch passes
    are left out. progress: called with the number of experts done and of all. The rest is as `ablate`."""
    ground = batches if isinstance(batches, Ground) else Ground(subject, batches, **options)
    passed = set().union(*ground.called)
    sites = choose_sites(subject, None if experts is None else list(experts))
    wanted = {s.name: range(s.experts) if experts is None else experts[s.name] for s in sites if s.name in passed}
    total, done, found = sum(map(len, wanted.values())), 0, Matrix(mode, {})
    before = None if score is None else np.asarray(score(), dtype=np.float64)
    for name, numbers in wanted.items():
        row = found.sites[name] = {}
        for expert in numbers:
            row[expert] = _changed(subject, ground, {name: [expert]}, _known(mode), None, score, {}, before)
            done += 1
            if progress is not None:
                progress(done, total)
    return found


def _known(mode: str) -> str:
    if mode not in MODES:
        raise UserError(f"mode '{mode}': expected {' or '.join(MODES)}")
    return mode


# ----------------------------------------------------------------------------------------------------------- agreement
@dataclass(frozen=True)
class Pair:
    """An expert and a value: what the expert takes (lift, tokens), and what its absence does. low, high: the interval
    that holds together with all others of the matrix (`Matrix.interval`)."""

    expert: int
    modality: str
    factor: str
    value: str
    lift: float
    tokens: int
    delta: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Between what goes together and what does something, at one site.

    spearman: rank correlation of lift and delta over `pairs` of an expert and a value; interval: its 95% bootstrap
    interval over samples. causes: pairs whose tokens get worse without the expert, and worse than those of other values
    (`Matrix.is_cause`): an expert whose absence hurts all alike is the cause of none. looks_specialised_but_is_not:
    lift of at least LEAST_LIFT on at least LEAST_TOKENS tokens, whose loss does not get measurably worse.
    cause_without_lift: a cause, and lift of at most NO_LIFT.
    """

    spearman: float
    interval: tuple[float, float]
    pairs: int
    causes: list[Pair]
    looks_specialised_but_is_not: list[Pair]
    cause_without_lift: list[Pair]


def agreement(recording: Recording, found: Matrix, site: str) -> Agreement:
    """recording: of the same model, best on the same batches; with the factors that the matrix was measured by."""
    routed, info = recording.at(site), recording.sites[site]
    modality, takings = recording.column("modality"), dict[tuple[str, str], Taking | None]()
    causes, only_looks, without, lifts, spreads, deltas = [], [], [], [], [], []
    for expert, ablation in found.sites[site].items():
        for group in filter(enough, ablation.groups):
            if info.modality not in ("", group.modality):
                continue
            family = group.modality, group.factor
            if family not in takings:
                known = group.factor in recording.factors
                part = restrict(routed, modality.where(group.modality))
                takings[family] = taking(part, recording.factor(group.factor)) if known else None
            taken = takings[family]
            if taken is None or group.value not in taken.values:
                continue
            v, effect = taken.values.index(group.value), group.effect
            lift, tokens = float(taken.lift_EV[expert, v]), int(taken.count_EV[expert, v])
            pair = Pair(expert, *family, group.value, lift, tokens, effect.delta, *found.interval(effect))
            lifts.append(lift)
            deltas.append(effect.delta)
            spreads.append(group.spread_B)
            if found.is_cause(group):
                causes.append(pair)
                if lift <= NO_LIFT:
                    without.append(pair)
            if lift >= LEAST_LIFT and tokens >= LEAST_TOKENS and pair.low <= 0:
                only_looks.append(pair)
    only_looks.sort(key=lambda p: -p.lift)
    for pairs in (causes, without):
        pairs.sort(key=lambda p: -p.delta)
    spearman, interval = _spearman(np.array(lifts), np.array(deltas), np.array(spreads))
    return Agreement(spearman, interval, len(lifts), causes, only_looks, without)


def _spearman(lift_X: np.ndarray, delta_X: np.ndarray, delta_XB: np.ndarray) -> tuple[float, tuple[float, float]]:
    """nan where there is nothing to rank."""
    if len(lift_X) < 3 or np.ptp(lift_X) == 0 or np.ptp(delta_X) == 0:
        return np.nan, (np.nan, np.nan)
    lift_X = stats.zscore(stats.rankdata(lift_X))
    rank_XB = stats.zscore(stats.rankdata(np.c_[delta_X, np.nan_to_num(delta_XB)], axis=0), axis=0)
    found_B = lift_X @ rank_XB / len(lift_X)
    low, high = np.nanquantile(found_B[1:], [0.025, 0.975])
    return float(found_B[0]), (float(low), float(high))
