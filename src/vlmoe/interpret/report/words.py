"""The overview in plain words: sentences made of the findings, with links to where the page shows the same.

A paragraph is {"title", "points"}; a point is a list of texts and of links {"text", "to": [view, site, expert]}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from vlmoe.interpret.report.wording import (
    Json,
    Point,
    above_chance,
    by_modality,
    change,
    expert_link,
    is_number,
    link,
    many,
    peak,
    percent,
    plain,
    site_name,
    tokens_with,
    told,
)

BALANCED, UNEVEN = 1.5, 2.5  # times the even share that the busiest expert takes
TELLING_LIFT, TELLING_TOKENS = 1.5, 20  # below these an example is not worth a sentence
COMMON = 0.1  # of a router's tokens must have a factor that is named first
EXAMPLES = 3
MODES = {
    "reroute": "its tokens go to the next best experts",
    "silence": "its part of the output is taken away",
}


def overview(run: Json) -> list[Json]:
    parts = {
        "Balance": _balance(run),
        "Who takes what": _specialisation(run),
        "What breaks without an expert": _causes(run),
        "Where looks deceive": _agreement(run),
        "Images and text in the same experts": _sharing(run),
        "Over training": _history(run),
        "Read with care": _care(run),
    }
    return [{"title": title, "points": points} for title, points in parts.items() if points]


# ------------------------------------------------------------------------------------------------------------- balance
def _balance(run: Json) -> list[Point]:
    points: list[Point] = []
    for modality, sites in by_modality(run).items():
        who = f"The {many(len(sites), f'{modality} router' if modality else 'router')}"
        widest = max(site["experts"] for site in sites)
        if widest < 2:
            points.append(
                [f"{who} {'has one expert' if len(sites) == 1 else 'have one expert each'}: nothing to choose."]
            )
            continue
        if not any(run["use"][site["name"]]["tokens"] for site in sites):
            points.append([f"{who} saw no token."])
            continue
        worst = max(sites, key=lambda s: peak(run["use"][s["name"]]))
        use = run["use"][worst["name"]]
        top = peak(use)
        state = "balanced" if top < BALANCED else "somewhat uneven" if top < UNEVEN else "uneven"
        busiest = max(range(len(use["share"])), key=lambda e: use["share"][e])
        points.append([
            f"{who} {'is' if len(sites) == 1 else 'are'} {state}: the busiest expert, ",
            expert_link(run, worst["name"], busiest),
            f", takes {top:.1f} times an even share.",
        ])  # fmt: skip
    idle = [(s["name"], e) for s in run["sites"] for e, x in enumerate(run["use"][s["name"]]["share"]) if x == 0]
    total = sum(site["experts"] for site in run["sites"])
    if idle:
        point: Point = [f"{many(len(idle), 'expert')} of {total:,} took no token at all: "]
        for i, (site, e) in enumerate(idle[:EXAMPLES]):
            point += [", then " if i else "", expert_link(run, site, e)]
        points.append([*point, " and others." if len(idle) > EXAMPLES else "."])
    elif total > len(run["sites"]):
        points.append([f"None of the {total:,} experts is idle."])
    dropped = {s["name"]: run["use"][s["name"]].get("dropped") or 0 for s in run["sites"]}
    site = max(dropped, key=lambda name: dropped[name])
    if dropped[site] > 0:
        found = next(s for s in run["sites"] if s["name"] == site)
        points.append([
            f"Choices are dropped because an expert was full: at most {percent(dropped[site])} of them, at ",
            link(site_name(found), "use"), ".",
        ])  # fmt: skip
    return points


# ------------------------------------------------------------------------------------------------------ specialisation
def _specialisation(run: Json) -> list[Point]:
    points: list[Point] = []
    for modality, sites in by_modality(run).items():
        rows = [
            (row["share"], site, factor, row)
            for site in sites
            for factor, row in (run["information"].get(site["name"]) or {}).items()
            if is_number(row.get("share")) and above_chance(row)
        ]
        name = f"{modality} expert" if modality else "expert"
        rows = [r for r in rows if r[3]["tokens"] >= COMMON * run["use"][r[1]["name"]]["tokens"]] or rows
        if not rows:
            if any(run["information"].get(site["name"]) for site in sites):
                points.append([f"Which {name} a token goes to tells nothing above chance about the known factors."])
            continue
        share, site, factor, row = max(rows, key=lambda r: r[0])
        points.append([
            f"Which {name} a token goes to tells most about its ",
            link(plain(factor), "information", site["name"]),
            f": {percent(share)} of what there is to know ({row['bits'] - row.get('sample_chance', row['chance']):.2f} "
            f"of {row['factor_bits']:.2f} bits, after taking off what whole samples' labels give when they are "
            f"exchanged), at {site_name(site)}.",
        ])  # fmt: skip
        points += [_example(run, *found) for found in _telling(run, sites)]
    return points


def _telling(run: Json, sites: list[Json]) -> list[tuple[str, int, Json]]:
    """The clearest preferences, of different experts for different values."""
    found = [
        (row["coverage"] * math.log2(row["lift"]), site["name"], e, row)
        for site in sites
        for e, expert in enumerate(run["experts"][site["name"]])
        for row in expert.get("values") or []
        if row["lift"] >= TELLING_LIFT and row["tokens"] >= TELLING_TOKENS and _borne_out(run, site["name"], row)
    ]
    best: list[tuple[str, int, Json]] = []
    for _, site, e, row in sorted(found, key=lambda f: -f[0]):
        if all((site, e) != b[:2] and row["value"] != b[2]["value"] for b in best):
            best.append((site, e, row))
        if len(best) == EXAMPLES:
            break
    return best


def _borne_out(run: Json, site: str, row: Json) -> bool:
    """Whether the expert tells of the row's factor above chance, where that was measured."""
    information = (run["information"].get(site) or {}).get(row["factor"])
    return information is None or above_chance(information)


def _example(run: Json, site: str, expert: int, row: Json) -> Point:
    return [
        f"{percent(row['coverage'])} of the {tokens_with(row)} go to ",
        expert_link(run, site, expert),
        f": {row['lift']:.1f} times as many as without a preference ({many(row['tokens'], 'token')}).",
    ]


# -------------------------------------------------------------------------------------------------------------- causes
def ablations(run: Json) -> Iterator[tuple[str, int, Json]]:
    """Site, expert, ablation, wherever there is one."""
    for site in run["sites"]:
        for e, expert in enumerate(run["experts"][site["name"]]):
            if expert.get("ablation"):
                yield site["name"], e, expert["ablation"]


def _causes(run: Json) -> list[Point]:
    tests = [t for t in ablations(run) if is_number(t[2]["loss"].get("delta"))]
    if not tests:
        return [["No expert was taken away, so this report shows what goes along with what, not what causes what."]]
    modes = {t[2].get("mode", "reroute") for t in tests}
    how = " or ".join(MODES.get(m, m) for m in sorted(modes))
    hurt = [t for t in tests if t[2]["loss"]["low"] > 0]
    points: list[Point] = [[
        f"{many(len(tests), 'expert')} {'was' if len(tests) == 1 else 'were'} taken away, one at a time ({how}). The "
        f"change of the loss has a 95% interval above zero for {f'{len(hurt):,}' if hurt else 'none'} of them."
    ]]  # fmt: skip
    if hurt:
        site, e, test = max(hurt, key=lambda t: t[2]["loss"]["delta"])
        loss = change(test["loss"])
        points.append(["Missed most: ", expert_link(run, site, e), f"; without it the mean loss changes by {loss}."])
    points += _worst(run, tests)
    better = [t for t in tests if t[2]["loss"]["high"] < 0]
    if better:
        site, e, test = min(better, key=lambda t: t[2]["loss"]["delta"])
        points.append([
            f"The loss is lower without {many(len(better), 'expert')}, most of all without ", expert_link(run, site, e),
            f" ({change(test['loss'])}).",
        ])  # fmt: skip
    return points


def _worst(run: Json, tests: list[tuple[str, int, Json]]) -> list[Point]:
    """The largest effects on tokens with one value, each of another expert: those shown to be causes, where the
    findings tell, else those whose interval lies above zero."""
    rows = [(row, site, e) for site, e, test in tests for row in test.get("by_factor") or [] if row["low"] > 0]
    judged = any("cause" in row for row, _, _ in rows)
    if judged:
        rows = [found for found in rows if found[0].get("cause")]
        if not rows:
            return [["No expert was shown to be needed for one kind of tokens more than for others."]]
    best: dict[tuple[str, int], Json] = {}
    for row, site, e in sorted(rows, key=lambda r: -r[0]["delta"]):
        best.setdefault((site, e), row)
    points: list[Point] = [
        ["Without ", expert_link(run, *at), f" the loss of {tokens_with(row)} changes by {change(row)}."]
        for at, row in list(best.items())[:EXAMPLES]
    ]
    if judged:
        points.insert(0, [
            f"{many(len(rows), 'cause')} of {many(len(best), 'expert')} confirmed: taking the expert away hurts some "
            "kind of tokens, and more than others, even when all comparisons are counted. The largest:"
        ])  # fmt: skip
    return points


def _agreement(run: Json) -> list[Point]:
    points: list[Point] = []
    known = [(a["spearman"], site) for site, a in run["agreement"].items() if is_number(a.get("spearman"))]
    if known:
        low, high = min(known)[0], max(known)[0]
        span = f"{low:.2f}" if len(known) == 1 else f"{low:.2f} to {high:.2f}, by router"
        points.append([
            "What an expert prefers and what breaks without it go together with a rank correlation of ",
            link(span.replace("-", "\N{MINUS SIGN}"), "agreement"), " (1: same order, 0: nothing in common).",
        ])  # fmt: skip
    odd = [(r, site) for site, a in run["agreement"].items() for r in a.get("looks_specialised_but_is_not") or []]
    if odd:
        row, site = max(odd, key=lambda o: o[0]["lift"])
        points.append([
            f"{many(len(odd), 'preference')} {'is' if len(odd) == 1 else 'are'} not borne out when the expert is taken "
            "away. The strongest of them: ", expert_link(run, site, row["expert"]),
            f" takes {tokens_with(row)} {row['lift']:.1f} times as often as without a preference, yet without it their "
            f"loss changes by {change(row)}, which does not show that they need it.",
        ])  # fmt: skip
    hidden = [(r, site) for site, a in run["agreement"].items() for r in a.get("cause_without_lift") or []]
    if hidden:
        row, site = max(hidden, key=lambda o: o[0]["delta"])
        points.append([
            f"{many(len(hidden), 'effect')} would not be guessed from routing. The largest: without ",
            expert_link(run, site, row["expert"]),
            f" the loss of {tokens_with(row)} changes by {change(row)}, though it does not prefer them.",
        ])  # fmt: skip
    return points


# ----------------------------------------------------------------------------------------------- sharing, time, caveats
def _sharing(run: Json) -> list[Point]:
    rows = [(s["overlap"], site) for site, s in run["sharing"].items() if is_number(s.get("overlap"))]
    if not rows:
        return []
    low, high = min(rows), max(rows)
    names = {s["name"]: site_name(s) for s in run["sites"]}
    if len(rows) == 1:
        return [
            [
                "Images and text may choose the same experts; ",
                link(percent(low[0]), "sharing"),
                " of their use overlaps.",
            ]
        ]
    return [[
        "Images and text may choose the same experts. Their use overlaps least at ", link(names[low[1]], "sharing"),
        f" ({percent(low[0])}) and most at ", link(names[high[1]], "sharing"), f" ({percent(high[0])}).",
    ]]  # fmt: skip


def _history(run: Json) -> list[Point]:
    history = run["history"]
    if not history or not history["steps"]:
        return []
    names = {s["name"]: site_name(s) for s in run["sites"]}
    loads = {
        site: [x for x in h.get("max_load") or [] if is_number(x)]
        for site, h in history["sites"].items()
        if site in names
    }
    loads = {site: load for site, load in loads.items() if load}
    if not loads:
        return []
    worst = max(loads, key=lambda site: max(loads[site]))
    return [[
        f"In {history['steps'][-1]:,} steps the busiest expert of ", link(names[worst], "history"),
        f" went from {loads[worst][0]:.1f} to {loads[worst][-1]:.1f} times an even share; its highest was "
        f"{max(loads[worst]):.1f}.",
    ]]  # fmt: skip


def _care(run: Json) -> list[Point]:
    points: list[Point] = [[note] for note in run["notes"]]
    tests = list(ablations(run))
    intervals = len(tests) + sum(len(t[2].get("by_factor") or []) for t in tests)
    if intervals >= 20:
        points.append([
            f"Every interval of 95% misses the truth once in 20 times: of the {intervals:,} of single experts here "
            f"about {round(0.05 * intervals):,} do. Trust what is marked as a cause, and what repeats over seeds."
        ])  # fmt: skip
    few = [s for s in run["sites"] if run["use"][s["name"]]["tokens"] < 30 * s["experts"]]
    if few:
        points.append([
            f"{many(len(few), 'router')} decided for fewer than 30 tokens per expert; shares and lifts there are rough."
        ])  # fmt: skip
    return points


# ---------------------------------------------------------------------------------------------------------- comparison
def compared(a: Json, b: Json, drift: Json | None) -> list[Point]:
    """What differs between two runs, A and B."""
    both = [s for s in a["sites"] if s["name"] in b["use"]]
    if not both:
        return [["The two models have no router of the same name, so nothing can be set side by side layer by layer."]]
    points: list[Point] = []
    mean = [sum(peak(run["use"][s["name"]]) for s in both) / len(both) for run in (a, b)]
    points.append([
        f"Busiest expert, mean over {many(len(both), 'router')}: {mean[0]:.2f} times an even share in A, {mean[1]:.2f} "
        f"in B ({'A' if mean[0] < mean[1] else 'B'} is more even)."
    ])  # fmt: skip
    gaps = [
        (told(rows_b[factor]) - told(row), site, factor, told(row), told(rows_b[factor]))
        for site in both
        for rows_b in [b["information"].get(site["name"]) or {}]
        for factor, row in (a["information"].get(site["name"]) or {}).items()
        if factor in rows_b and is_number(row.get("share")) and is_number(rows_b[factor].get("share"))
    ]
    if gaps:
        _, site, factor, in_a, in_b = max(gaps, key=lambda g: abs(g[0]))
        points.append([
            f"Their experts differ most in what they tell about {plain(factor)}, at {site_name(site)}: {percent(in_a)} "
            f"of its bits in A, {percent(in_b)} in B."
        ])  # fmt: skip
    moved = [(row["matched"], site) for site in both for row in [(drift or {}).get(site["name"]) or {}] if row]
    if moved:
        most, site = max(moved, key=lambda m: m[0])
        points.append([
            f"With the experts of B renumbered to fit A, the same token goes to another expert in up to "
            f"{percent(most)} of cases ({site_name(site)})."
        ])  # fmt: skip
    return points
