"""A scaling law for sparse models, fitted to finished runs: loss from parameters, experts and tokens.

N: parameters of a token, embeddings left out. E: the expansion, all feed-forward parameters over those of a token (1
for a dense model; the number of experts for top-1 everywhere). D: tokens seen, padding left out. Two forms:

    additive     L = c + a N^-alpha E^-gamma + b D^-beta
    interacting  L = c + a N^-(alpha + delta ln E) E^-gamma + b D^-(beta + zeta ln E) E^-omega

Experts that multiply the parameters' part are Clark et al.'s (2022); tokens beside them, as in Krajewski et al. (2024);
the interacting form is Ludziejewski et al.'s (2025). What the best loss c is, short runs can hardly tell: read the law
near the runs it was fitted to.

Fitted by least squares on log loss with Huber's loss, so that a run gone wrong does not bend it, from several starts;
intervals from refits to configurations drawn with replacement, a model and length with the runs of all its seeds
together (seeds of one configuration share its error of fit, so they are no independent evidence of the law), with the
runs' own scatter added. The optimiser works within bounds; where a value or an end of an interval lies on one, the runs
do not determine it and the law says so.

Shape suffixes: R runs · P parameters of the law · B refits · Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from vlmoe.study.collect import Row, finished, groups
from vlmoe.study.declare import StudyError

HUBER = 0.01  # of log loss: residuals beyond 1% count linearly
REFITS = 200
INTERVAL = 0.95
AT_BOUND = 1e-3  # of the range that the optimiser may use: nearer to its end counts as on it
CLEARLY = 0.9  # the richer form must have so much less error on left-out models
HELD_OUT = 0.2  # share of the runs, those with the most FLOPs
AXES = {"params_active": "parameters per token", "expansion": "experts", "tokens": "tokens", "flops": "training FLOPs"}
NAMES = {
    "additive": ("log_a", "alpha", "log_b", "beta", "gamma", "best"),
    "interacting": ("log_a", "alpha", "log_b", "beta", "gamma", "best", "delta", "omega", "zeta"),
}
LOW = {"alpha": 0.0, "beta": 0.0, "gamma": -0.5, "best": -12.0, "delta": -0.3, "omega": -0.5, "zeta": -0.3}
HIGH = {"alpha": 3.0, "beta": 3.0, "gamma": 3.0, "best": 12.0, "delta": 0.3, "omega": 0.5, "zeta": 0.3}


@dataclass
class Data:
    """Arrays over runs, N and D relative to their geometric means."""

    n: np.ndarray
    e: np.ndarray
    d: np.ndarray
    loss: np.ndarray

    def __getitem__(self, pick: np.ndarray) -> Data:
        return Data(self.n[pick], self.e[pick], self.d[pick], self.loss[pick])


@dataclass
class Fit:
    """form: of the law. parameters: name -> value, at N and D relative to `centre`; `best` is c. draws_BP: of the
    refits. scatter_R: residuals of log loss. ranges: axis -> least and most of the runs. runs: how many. floor,
    vector_P: the fit as the numerics have it."""

    form: str
    parameters: dict[str, float]
    centre: tuple[float, float]
    floor: float
    draws_BP: np.ndarray
    scatter_R: np.ndarray
    ranges: dict[str, tuple[float, float]]
    runs: int
    vector_P: np.ndarray

    def predict(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """loss, low, high (95%) for rows with params_active, expansion and tokens."""
        data = _data(rows, self.centre)
        best = _loss(self.form, self.vector_P, data, self.floor)
        rng = np.random.default_rng(0)
        refits_BQ = np.stack([_loss(self.form, draw, data, self.floor) for draw in self.draws_BP])
        noise_BQ = rng.choice(self.scatter_R, size=(8, *refits_BQ.shape))
        many = (refits_BQ[None] * np.exp(noise_BQ)).reshape(-1, len(best))
        low, high = np.quantile(many, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
        return [
            {"loss": float(m), "low": float(min(lo, m)), "high": float(max(hi, m))}
            for m, lo, hi in zip(best, low, high, strict=True)
        ]

    def at_bound(self) -> list[str]:
        """Parameters whose value is where the optimiser had to stop."""
        return [name for name, ends in zip(NAMES[self.form], _ends(self.form, self.vector_P), strict=True) if ends]

    def outside(self, row: Row) -> dict[str, float]:
        """Axis -> how many times beyond the nearest run; empty where the row is within what was fitted."""
        found = {}
        for axis, (low, high) in self.ranges.items():
            value = row.get(axis)
            if value is not None and value > high * 1.001:
                found[axis] = value / high
            elif value is not None and value < low / 1.001:
                found[axis] = low / value
        return found

    def formula(self) -> str:
        p, (n, d) = self.parameters, self.centre
        more = "" if self.form == "additive" else " (with delta, omega, zeta: see the parameters)"
        return (
            f"L = {p['best']:.3g} + {p['a']:.3g} (N/{n:.3g})^{-p['alpha']:.3g} E^{-p['gamma']:.3g} "
            f"+ {p['b']:.3g} (D/{d:.3g})^{-p['beta']:.3g}{more}"
        )

    def as_dict(self) -> dict[str, Any]:
        low, high = np.quantile(self.draws_BP, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
        return {
            "form": self.form,
            "formula": self.formula(),
            "parameters": self.parameters,
            "intervals": {
                name: [self._shown(name, lo), self._shown(name, hi)]
                for name, lo, hi in zip(NAMES[self.form], low.tolist(), high.tolist(), strict=True)
            },
            "at_bound": self.at_bound(),
            "intervals_at_bound": {
                name: found
                for name, *ends in zip(NAMES[self.form], _ends(self.form, low), _ends(self.form, high), strict=True)
                if (found := [end for end, which in zip(("low", "high"), ends, strict=True) if which])
            },
            "centre": {"params_active": self.centre[0], "tokens": self.centre[1]},
            "scatter": float(np.std(self.scatter_R)),
            "ranges": {axis: list(range_) for axis, range_ in self.ranges.items()},
            "runs": self.runs,
        }

    def _shown(self, name: str, value: float) -> float:
        return float(self.floor / (1 + np.exp(-value))) if name == "best" else value


def fit(rows: Sequence[Row], form: str | None = None, refits: int = REFITS) -> Fit:
    """Fit a law to finished runs. form: None picks the one that predicts left-out models better.

    Raises StudyError: too few different runs.
    """
    runs = finished(rows)
    different = len({(r["params_active"], r["expansion"], r["tokens"]) for r in runs})
    clusters = configurations(runs)
    if different < len(NAMES["additive"]) + 2:
        raise StudyError(
            f"a scaling law has {len(NAMES['additive'])} parameters and needs at least "
            f"{len(NAMES['additive']) + 2} finished runs that differ in model or length; there are {different}"
        )
    form, data = form or _better_form(runs), _data(runs)
    vector, floor = _best(form, data)
    residual_R = np.log(data.loss) - np.log(_loss(form, vector, data, floor))
    scatter_R = residual_R * np.sqrt(len(runs) / max(1, len(runs) - len(vector)))
    rng = np.random.default_rng(0)
    draws: list[np.ndarray] = []
    while len(draws) < refits:
        pick = rng.integers(len(clusters), size=len(clusters))
        if len(np.unique(pick)) >= min(len(vector), different - 1):
            draws.append(_refit(form, data[np.concatenate([clusters[i] for i in pick])], floor, vector))
    raw = dict(zip(NAMES[form], vector.tolist(), strict=True))
    shown = {"a": float(np.exp(raw["log_a"])), "b": float(np.exp(raw["log_b"]))}
    shown |= {k: v for k, v in raw.items() if not k.startswith("log_")}
    shown["best"] = float(floor / (1 + np.exp(-raw["best"])))
    ranges = {axis: (min(r[axis] for r in runs), max(r[axis] for r in runs)) for axis in AXES}
    return Fit(form, shown, _centre(runs), floor, np.stack(draws), scatter_R, ranges, len(runs), vector)


def configurations(runs: Sequence[Row]) -> list[np.ndarray]:
    """Of each model and length the places of its runs, all seeds: what a refit draws as one."""
    places: dict[tuple[str, int], list[int]] = {}
    for place, run in enumerate(runs):
        places.setdefault((run["model"], run["steps"]), []).append(place)
    return [np.array(found) for found in places.values()]


def check(rows: Sequence[Row], form: str | None = None, refits: int = REFITS) -> dict[str, Any] | None:
    """Fit without the runs of most FLOPs (a fifth) and predict them: extrapolation in compute. What leaves the fit is
    all that a width and depth has of a length, dense and sparse, every seed: a twin in the fit would give the others
    away. None where too few runs would be left."""
    runs = finished(rows)
    sizes = groups(runs, "width", "depth", "steps").values()
    by_length = sorted(sizes, key=lambda group: -max(r["flops"] for r in group))
    out: list[Row] = []
    for group in by_length:
        if out and len(out) + len(group) > max(2, HELD_OUT * len(runs)):
            break
        out += group
    left = [r for r in runs if not any(r is o for o in out)]
    try:
        law = fit(left, form, refits)
    except StudyError:
        return None
    found = []
    for row, guess in zip(out, law.predict(out), strict=True):
        inside = guess["low"] <= row["loss"] <= guess["high"]
        found.append({"run": row["run"], "measured": row["loss"], **guess, "inside": inside})
    errors = [abs(np.log(f["loss"] / f["measured"])) for f in found]
    return {
        "form": law.form, "fitted": len(left), "at_bound": law.at_bound(), "runs": found,
        "mean_error": float(np.mean(errors)), "inside": sum(f["inside"] for f in found) / len(found),
    }  # fmt: skip


def _better_form(runs: Sequence[Row]) -> str:
    """By the error on each model in turn, left out of the fit. The richer form needs runs to spare."""
    models = groups(runs, "model")
    if len(models) < 4 or len(runs) < 3 * len(NAMES["interacting"]):
        return "additive"
    errors = dict.fromkeys(NAMES, 0.0)
    centre = _centre(runs)
    whole = {form: _best(form, _data(runs, centre))[0] for form in NAMES}
    for model, out in models.items():
        left = _data([r for r in runs if r["model"] != model], centre)
        floor, data = float(left.loss.min()), _data(out, centre)
        for form in NAMES:
            vector = _refit(form, left, floor, whole[form])
            errors[form] += float(np.abs(np.log(_loss(form, vector, data, floor) / data.loss)).sum())
    return "interacting" if errors["interacting"] < CLEARLY * errors["additive"] else "additive"


# ------------------------------------------------------------------------------------------------------------ numerics
def _centre(rows: Sequence[Row]) -> tuple[float, float]:
    return tuple(float(np.exp(np.mean(np.log([r[k] for r in rows])))) for k in ("params_active", "tokens"))  # type: ignore[return-value]


def _data(rows: Sequence[Row], centre: tuple[float, float] | None = None) -> Data:
    n0, d0 = centre or _centre(rows)
    columns = [[float(r.get(k) or 1.0) for r in rows] for k in ("params_active", "expansion", "tokens", "loss")]
    n, e, d, loss = (np.array(c) for c in columns)
    return Data(n / n0, e, d / d0, loss)


def _terms(form: str, vector: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The part of the loss that parameters and experts take away, and that of tokens."""
    log_a, alpha, log_b, beta, gamma, _ = vector[:6]
    delta, omega, zeta = vector[6:] if form == "interacting" else (0.0, 0.0, 0.0)
    n, e, d = np.log(data.n), np.log(data.e), np.log(data.d)
    size = np.exp(np.clip(log_a - (alpha + delta * e) * n - gamma * e, -50, 50))
    return size, np.exp(np.clip(log_b - (beta + zeta * e) * d - omega * e, -50, 50))


def _loss(form: str, vector: np.ndarray, data: Data, floor: float) -> np.ndarray:
    """floor: the least loss of any run, below which the best loss c lies."""
    size, tokens = _terms(form, vector, data)
    return floor / (1 + np.exp(-vector[5])) + size + tokens


def _slope(form: str, vector: np.ndarray, data: Data, floor: float) -> np.ndarray:
    """(R, P): of log loss by the parameters."""
    size, tokens = _terms(form, vector, data)
    n, e, d = np.log(data.n), np.log(data.e), np.log(data.d)
    share = 1 / (1 + np.exp(-vector[5]))
    columns = [size, -n * size, tokens, -d * tokens, -e * size, np.full_like(n, floor * share * (1 - share))]
    if form == "interacting":
        columns += [-e * n * size, -e * tokens, -e * d * tokens]
    return np.stack(columns, axis=1) / (floor * share + size + tokens)[:, None]


def _bounds(form: str) -> tuple[list[float], list[float]]:
    return [LOW.get(n, -20.0) for n in NAMES[form]], [HIGH.get(n, 20.0) for n in NAMES[form]]


def _ends(form: str, vector: np.ndarray) -> list[str]:
    """Of each parameter "low" or "high" where it lies on that bound, else ""."""
    found = []
    for value, low, high in zip(vector.tolist(), *_bounds(form), strict=True):
        near = AT_BOUND * (high - low)
        found.append("low" if value - low < near else "high" if high - value < near else "")
    return found


def _solve(form: str, data: Data, floor: float, start: np.ndarray) -> tuple[np.ndarray, float]:
    target = np.log(data.loss)

    found = least_squares(
        lambda vector: np.log(_loss(form, vector, data, floor)) - target, start, bounds=_bounds(form),
        jac=lambda vector: _slope(form, vector, data, floor), loss="huber", f_scale=HUBER, max_nfev=100,
    )  # fmt: skip
    return found.x, float(found.cost)


def _best(form: str, data: Data) -> tuple[np.ndarray, float]:
    """The best of several starts; the richer form starts from the simpler one, which it contains."""
    floor, typical = float(data.loss.min()), float(np.median(data.loss))
    if form == "interacting":
        start = np.concatenate([_best("additive", data)[0], np.zeros(3)])
        return _refit(form, data, floor, start), floor
    found = []
    for alpha in (0.2, 0.8):
        for beta in (0.2, 0.8):
            for share in (-2.0, 1.0):  # of c in the least loss: 12%, 73%
                over = np.log(max(typical - floor / (1 + np.exp(-share)), 0.1 * typical) / 2)
                found.append(_solve(form, data, floor, np.array([over, alpha, over, beta, 0.1, share])))
    return min(found, key=lambda pair: pair[1])[0], floor


def _refit(form: str, data: Data, floor: float, start: np.ndarray) -> np.ndarray:
    low, high = (np.array(b) for b in _bounds(form))
    return _solve(form, data, floor, np.clip(start, low + 1e-6, high - 1e-6))[0]
