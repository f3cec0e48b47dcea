"""Everything a report shows of a model, gathered into one plain dictionary.

Keys: title, about (small table), sites, use, information, experts, agreement, paths, sharing, samples, history, drift,
notes. Losses are in nats, information in bits.

Shape suffixes: T recorded tokens · E experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmoe.config import UserError
from vlmoe.interpret import shown as samples_of
from vlmoe.interpret import statistics
from vlmoe.interpret.causal import LEAST_LIFT, LEAST_SAMPLES, LEAST_TOKENS, Ablation, Matrix, ScoreOf, agreement, matrix
from vlmoe.interpret.effects import Effect, Ground, Group
from vlmoe.interpret.recorder import record
from vlmoe.interpret.recording import Recording, Routed, Words
from vlmoe.interpret.sites import Subject

Progress = Callable[[str, int, int], None]
WORD = "word"  # the token itself, as a factor
POSITION = "position"
MOST_POSITIONS = 64
VALUES, TOKENS, PATCHES, EFFECTS = 12, 20, 24, 20  # rows of an expert's lists
MOST_ABLATIONS = 512


def find(
    subject: Subject,
    batches: Iterable[Any],
    *,
    title: str = "model",
    about: dict[str, Any] | None = None,
    ablate: bool = True,
    mode: str = "reroute",
    score: ScoreOf | None = None,
    shown: int = 12,
    permutations: int = 200,
    most_ablations: int = MOST_ABLATIONS,
    history: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Record the batches, and find out what the experts take and what breaks without them.

    ablate: take away experts one by one; of a model with more than `most_ablations` of them, the busiest of each site.
    mode, score: see `causal.ablate`. shown: samples in full. folder: where the recording is kept; None: nowhere.
    progress: called with what is done, how much of it, and of how much.
    """
    kept = list(batches)
    if not kept:
        raise UserError("nothing to look at: no batches were given")
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "recording"
        say = progress or (lambda what, done, total: None)
        say("recording", 0, len(kept))
        recording = record(subject, kept, folder, replace=True)
        said = [*getattr(subject, "notes", ()), *notes]
        tests, problems = _tests(subject, kept, recording, mode, score, most_ablations, say) if ablate else (None, [])
        say("statistics", 0, 1)
        return {
            "title": title,
            "about": dict(about or {}) | {"samples": recording.samples, "tokens": recording.tokens},
            **_looked_at(subject, kept, recording, tests, shown, permutations),
            "history": history,
            "drift": None,
            "notes": said + problems + _explained(tests),
        }


def _looked_at(
    subject: Subject, batches: list[Any], recording: Recording, tests: Matrix | None, shown: int, permutations: int
) -> dict[str, Any]:
    chosen = samples_of.choose(subject, batches, shown)
    number = {sample.key: i for i, sample in enumerate(chosen)}
    key_T, position_T = recording.column("sample"), recording.position_T
    shown_T = np.isin(key_T.code_T, [i for i, key in enumerate(key_T.values) if key in number])
    found: dict[str, Any] = {"sites": [], "use": {}, "information": {}, "experts": {}, "agreement": {}}
    routed, place = {}, {}
    for name in recording.site_order():
        info, decisions = recording.sites[name], recording.at(name)
        routed[name] = decisions
        place[name] = np.full(recording.tokens, -1)
        place[name][decisions.token_N] = np.arange(len(decisions.token_N))
        columns = _columns(recording, decisions)
        used = statistics.use(decisions)
        by_kind = statistics.use_by(decisions, recording.column("kind"))
        found["sites"].append({k: getattr(info, k) for k in ("name", "layer", "modality", "experts", "k")})
        found["use"][name] = used.as_dict() | {"by_kind": {kind: share.tolist() for kind, share in by_kind.items()}}
        said = {
            f: statistics.information(decisions, words, permutations=permutations, sample_T=recording.sample_T)
            for f, words in columns.items()
        }
        found["information"][name] = {f: dataclasses.asdict(i) for f, i in said.items() if i.factor_bits > 0}
        patches = statistics.top_patches(recording, statistics.restrict(decisions, shown_T), PATCHES)
        takings = {f: statistics.taking(decisions, words) for f, words in columns.items() if f != WORD}
        words = statistics.taking(decisions, recording.column("text"))
        found["experts"][name] = [
            {
                "share": float(used.share_E[e]),
                "values": _distinct(statistics.top_values(takings, e, 4 * VALUES), ("tokens", "lift"))[:VALUES],
                "top_tokens": statistics.top_tokens(words, e, TOKENS),
                "top_patches": [
                    {"sample": number[key_T.values[key_T.code_T[t]]], "position": int(position_T[t]),
                     "gate": float(decisions.gate_NK[place[name][t], 0])}
                    for t in patches[e]
                ],
                "ablation": _shown_test(tests, name, e),
            }
            for e in range(info.experts)
        ]  # fmt: skip
        if tests is not None and name in tests.sites:
            found["agreement"][name] = _shown_agreement(recording, tests, name)
    found["paths"] = statistics.paths(recording)
    found["sharing"] = statistics.sharing(recording)
    found["samples"] = [samples_of.describe(sample, recording, routed, place) for sample in chosen]
    return found


def _columns(recording: Recording, routed: Routed) -> dict[str, Words]:
    """What the experts of a site may go by: the factors, the word, and the place in an image."""
    columns = {name: recording.factor(name) for name in recording.factors}
    if (recording.column("modality").where("text")[routed.token_N]).any():
        columns[WORD] = recording.column("text")
    vision_T = recording.column("modality").where("vision") & (recording.position_T >= 0)
    if vision_T[routed.token_N].any() and POSITION not in columns:
        last = int(recording.position_T[vision_T].max())
        if last < MOST_POSITIONS:
            code_T = np.where(vision_T, recording.position_T + 1, 0)
            columns[POSITION] = Words(code_T, ["", *map(str, range(last + 1))])
    return columns


# --------------------------------------------------------------------------------------------------------------- tests
def _tests(
    subject: Subject, batches: list[Any], recording: Recording, mode: str, score: ScoreOf | None, most: int,
    say: Progress,
) -> tuple[Matrix | None, list[str]]:  # fmt: skip
    """The causal tests, and what is to be said of them."""
    say("losses before", 0, 1)
    try:
        ground = Ground(subject, batches)
    except UserError as error:
        return None, [f"No expert was taken away: {error}."]
    total = sum(site.experts for site in recording.sites.values())
    experts: dict[str, Sequence[int]] = {}
    for name, info in recording.sites.items():
        count = info.experts if total <= most else max(1, most * info.experts // total)
        share_E = statistics.use(recording.at(name)).share_E
        experts[name] = sorted(np.argsort(-share_E, kind="stable")[:count].tolist())
    problems = []
    if total > most:
        problems.append(f"Of {total} experts the {sum(map(len, experts.values()))} busiest were taken away.")
    untouched = sorted(set(recording.sites) - set().union(*ground.called))
    if untouched:
        problems.append(f"No token passed {', '.join(untouched)}: nothing was measured there.")
    found = matrix(
        subject, ground, experts, mode=mode, score=score, progress=lambda done, n: say("experts taken away", done, n)
    )
    return found, problems


def _explained(tests: Matrix | None) -> list[str]:
    if tests is None:
        return []
    how = {
        "reroute": "its tokens go to the next best expert by the router's probabilities, with the gate they would have "
        "had there",
        "silence": "its gate is 0 and nothing takes its place",
    }[tests.mode]
    return [
        f"Without an expert means: {how}. The loss is that of hidden or next tokens; a token's loss also hangs on the "
        "others of its sample, through attention.",
        f"The lists of agreement use intervals that hold together with 95% over all {tests.comparisons} comparisons "
        f"(Bonferroni); an expert looks specialised from a lift of {LEAST_LIFT} on {LEAST_TOKENS} tokens, and values "
        f"seen in fewer than {LEAST_SAMPLES} samples are left out.",
    ]


def _shown_test(tests: Matrix | None, site: str, expert: int) -> dict[str, Any] | None:
    ablation: Ablation | None = None if tests is None else tests.sites.get(site, {}).get(expert)
    if tests is None or ablation is None:
        return None
    rows = [_row(tests, group) for group in ablation.groups if group.effect.samples >= LEAST_SAMPLES]
    rows.sort(key=lambda row: -abs(row["delta"]))
    found: dict[str, Any] = {"loss": _numbers(ablation.loss), "mode": ablation.mode}
    found["by_factor"] = _distinct(rows, ("modality", "delta", "tokens"))[:EFFECTS]
    if ablation.score is not None:
        found["score"] = _numbers(ablation.score)
    return found


def _row(tests: Matrix, group: Group) -> dict[str, Any]:
    """low_all, high_all: the interval that holds together with all others. cause: see `Matrix.is_cause`."""
    low, high = tests.interval(group.effect)
    row = {"factor": group.factor, "value": group.value, "modality": group.modality, **_numbers(group.effect)}
    return row | {"low_all": low, "high_all": high, "cause": tests.is_cause(group)}


def _numbers(effect: Effect) -> dict[str, Any]:
    found = {key: getattr(effect, key) for key in ("delta", "low", "high", "tokens", "samples")}
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in found.items()}


def _distinct(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows that differ: values of several factors that are the same tokens ("object: none", "kind: background") are
    shown once, the others named in "also"."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        same = found.setdefault(tuple(row[k] for k in keys), row)
        if same is not row:
            same.setdefault("also", []).append(f"{row['factor']}: {row['value']}")
    return list(found.values())


def _shown_agreement(recording: Recording, tests: Matrix, site: str) -> dict[str, Any]:
    found = agreement(recording, tests, site)
    known = not math.isnan(found.spearman)
    pairs = {
        name: _distinct([dataclasses.asdict(p) for p in getattr(found, name)], ("expert", "tokens", "lift", "delta"))
        for name in ("causes", "looks_specialised_but_is_not", "cause_without_lift")
    }
    interval = list(found.interval) if known else None
    return {"spearman": found.spearman if known else None, "interval": interval, "pairs": found.pairs, **pairs}


def write(findings: dict[str, Any], path: Path) -> None:
    """As JSON; the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(findings, allow_nan=False))
    temporary.replace(path)
