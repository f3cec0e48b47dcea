"""Findings as the report gets them, made from planted routing on scenes of the embedded world: small, quick, any shape.

Experts have favourite words and patches, which their shares, lifts and ablations then show. Numbers of the information
table and the intervals are made up to fit; nothing here measures anything.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from typing import Any

import numpy as np
from PIL import Image

from vlmoe.config import WorldConfig
from vlmoe.data.world import World

Json = dict[str, Any]
PATCH, SIZE = 12, 48
GRID = SIZE // PATCH
SHOWN = ("kind", "colour", "word_class", "place", "size")


def findings(
    layers: int = 2,
    experts: int = 8,
    k: int = 2,
    *,
    modalities: tuple[str, ...] = ("vision", "text"),
    shown: int = 9,
    kinds: tuple[str, ...] = ("pair", "image", "text"),
    ablation: bool = True,
    history: bool = True,
    seed: int = 0,
    title: str = "synthetic",
) -> Json:
    """modalities ("",): one router a layer, for all tokens, as in most models of transformers."""
    rng = np.random.default_rng(seed)
    k = min(k, experts)
    sites: list[Json] = [
        {"name": f"{layer}/{m}" if m else str(layer), "layer": layer, "modality": m, "experts": experts, "k": k}
        for m in modalities
        for layer in range(1, 2 * layers, 2)
    ]
    scenes = _scenes(kinds, shown)
    found: Json = {
        "title": title,
        "about": {"recipe": title, "parameters": 2_840_000, "steps": 800, "date": "2026-11-25"},
        "sites": sites, "use": {}, "information": {}, "experts": {}, "agreement": {}, "paths": {}, "sharing": {},
        "samples": [{k: v for k, v in s.items() if k != "factors"} | {"routes": {}, "gates": {}} for s in scenes],
        "history": _history(sites, rng) if history else None,
        "notes": ["Made for a test: nothing here was measured."],
    }  # fmt: skip
    first: dict[str, dict[str, np.ndarray]] = {}
    for site in sites:
        first[site["name"]] = _site(found, site, scenes, rng, ablation)
    _paths(found, first, modalities)
    return found


def _scenes(kinds: tuple[str, ...], shown: int) -> list[Json]:
    worlds = {kind: World(WorldConfig(image_size=SIZE), kind, split="val", patch=PATCH) for kind in kinds}
    out = []
    for i in range(shown):
        kind = kinds[i % len(kinds)]
        sample = worlds[kind][i]
        scene: Json = {
            "key": sample.key, "kind": kind, "image": None, "grid": None, "tokens": None, "hidden": [],
            "hidden_patches": [], "factors": {},
        }  # fmt: skip
        if sample.image is not None:
            data = io.BytesIO()
            Image.fromarray(sample.image).save(data, "PNG")
            scene["image"] = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
            scene["grid"], scene["hidden_patches"] = [GRID, GRID], [1, 6]
            scene["factors"]["vision"] = {f: v for f, v in sample.patch_factors.items() if f in SHOWN}
        if sample.text is not None:
            words, start, classes = sample.text.split(" "), 0, []
            for word in words:
                spans = [s for s in sample.spans if s.start <= start < s.stop]
                classes.append(spans[0].factors.get("word_class", "") if spans else "")
                start += len(word) + 1
            scene["tokens"], scene["hidden"] = words, [2] if len(words) > 2 else []
            scene["factors"]["text"] = {"word_class": classes}
        out.append(scene)
    return out


def _site(
    found: Json, site: Json, scenes: list[Json], rng: np.random.Generator, ablation: bool
) -> dict[str, np.ndarray]:
    """Routes every shown token at one site and fills in what the findings say of it."""
    name, E, k = site["name"], site["experts"], site["k"]
    rows: list[tuple[int, str, int, Json]] = []  # sample, modality, position, factors
    for i, scene in enumerate(scenes):
        for modality, factors in scene["factors"].items():
            if site["modality"] in ("", modality):
                tokens = len(next(iter(factors.values())))
                rows += [(i, modality, p, {f: v[p] for f, v in factors.items()}) for p in range(tokens)]
    taste: dict[tuple[str, str], np.ndarray] = {}
    routes = np.zeros((len(rows), k), dtype=int)
    for n, (_, _, _, factors) in enumerate(rows):
        score: np.ndarray = np.asarray(rng.gumbel(size=E))
        for pair in factors.items():
            score += taste.setdefault(pair, np.asarray(rng.normal(scale=2, size=E)))
        routes[n] = np.argsort(-score)[:k]
    gates = rng.uniform(0.4, 0.9, size=len(rows)).round(3)
    for i, modality in dict.fromkeys((r[0], r[1]) for r in rows):
        at = [n for n, row in enumerate(rows) if row[:2] == (i, modality)]
        found["samples"][i]["routes"].setdefault(name, {})[modality] = routes[at].tolist()
        found["samples"][i]["gates"].setdefault(name, {})[modality] = gates[at].tolist()
    count = np.bincount(routes.ravel(), minlength=E)
    share = count / max(1, count.sum())
    kinds = sorted({scenes[row[0]]["kind"] for row in rows})
    found["use"][name] = {
        "share": share.tolist(), "tokens": len(rows), "entropy": float(rng.uniform(0.5, 1) * math.log(E)),
        "dropped": 0.0, "max_over_mean": float(share.max() * E), "idle": int((count == 0).sum()),
        "by_kind": {
            kind: _share(routes[[scenes[row[0]]["kind"] == kind for row in rows]], E) for kind in kinds
        },
    }  # fmt: skip
    _describe(found, site, rows, routes, gates, rng, ablation)
    if not site["modality"]:
        split = {m: _share(routes[[n for n, row in enumerate(rows) if row[1] == m]], E) for m in ("vision", "text")}
        if all(sum(s) for s in split.values()):
            overlap = float(np.minimum(split["vision"], split["text"]).sum())
            found["sharing"][name] = split | {"overlap": overlap}
    return {m: routes[[n for n, row in enumerate(rows) if row[1] == m]] for m in ("vision", "text")}


def _share(routes: np.ndarray, experts: int) -> list[float]:
    count = np.bincount(routes.ravel(), minlength=experts)
    return (count / max(1, count.sum())).tolist()


def _describe(
    found: Json, site: Json, rows: list[Any], routes: np.ndarray, gates: np.ndarray, rng: np.random.Generator,
    ablation: bool,
) -> None:  # fmt: skip
    """The site's experts, information and agreement."""
    name, E = site["name"], site["experts"]
    values = sorted({pair for row in rows for pair in row[3].items() if pair[1]})
    has = {v: np.array([row[3].get(v[0]) == v[1] for row in rows]) for v in values}
    found["experts"][name], odd, causes, lifts, deltas = [], [], [], [], []
    for e in range(E):
        mine = (routes == e).any(axis=1)
        share = found["use"][name]["share"][e]
        table = []
        for (factor, value), is_value in has.items():
            both = int((mine & is_value).sum())
            if both:
                purity, coverage = both / mine.sum(), both / is_value.sum()
                lift = float(purity / is_value.mean())
                table.append(
                    {"factor": factor, "value": value, "purity": float(purity), "coverage": float(coverage),
                     "lift": lift, "tokens": both}
                )  # fmt: skip
        table.sort(key=lambda row: -row["lift"] * row["tokens"])
        hurt: Json | None = None
        if ablation:
            by = []
            for row in table[:20]:
                delta = 0.03 * row["lift"] * row["coverage"] + float(rng.normal(scale=0.01))
                half = 0.3 / math.sqrt(row["tokens"] + 3)
                by.append(
                    {key: row[key] for key in ("factor", "value", "tokens")}
                    | {"delta": delta, "low": delta - half, "high": delta + half, "cause": delta > 2 * half}
                    | {
                        "low_all": delta - 2 * half,
                        "high_all": delta + 2 * half,
                        "modality": site["modality"] or "text",
                    }
                )
                lifts.append(row["lift"])
                deltas.append(delta)
                if row["lift"] > 2 and delta - half < 0 and row["tokens"] > 3:
                    odd.append({"expert": e} | {k: row[k] for k in ("factor", "value", "lift")} | by[-1])
                elif row["lift"] < 1.2 and delta - half > 0:
                    causes.append({"expert": e} | {k: row[k] for k in ("factor", "value", "lift")} | by[-1])
            loss = 0.4 * float(share)
            hurt = {
                "loss": {"delta": loss, "low": loss - 0.02, "high": loss + 0.02}, "mode": "reroute",
                "by_factor": sorted(by, key=lambda row: -abs(row["delta"])),
            }  # fmt: skip
        words: dict[str, int] = {}
        patches = []
        for n in np.flatnonzero(mine):
            i, modality, position, _ = rows[n]
            if modality == "text":
                word = found["samples"][i]["tokens"][position]
                words[word] = words.get(word, 0) + 1
            else:
                patches.append({"sample": i, "position": position, "gate": float(gates[n])})
        found["experts"][name].append({
            "share": share, "values": table[:12], "ablation": hurt,
            "top_tokens": [{"text": w, "count": c, "lift": 1.5} for w, c in list(words.items())[:16]],
            "top_patches": sorted(patches, key=lambda row: -row["gate"])[:12],
        })  # fmt: skip
    found["information"][name] = {}
    for factor in {f for f, _ in values}:
        h = float(rng.uniform(1, 3))
        bits, chance = float(rng.uniform(0.0, 0.9)) * h, float(rng.uniform(0.01, 0.1))
        found["information"][name][factor] = {
            "bits": bits, "chance": chance, "chance_high": chance * 1.5, "sample_chance": 2 * chance,
            "sample_chance_high": chance * 2.5, "factor_bits": h, "share": (bits - 2 * chance) / h,
            "tokens": len(rows),
        }  # fmt: skip
    if ablation and len(lifts) > 2:
        found["agreement"][name] = {
            "spearman": float(np.corrcoef(np.argsort(np.argsort(lifts)), np.argsort(np.argsort(deltas)))[0, 1]),
            "pairs": len(lifts), "looks_specialised_but_is_not": odd[:8], "cause_without_lift": causes[:8],
        }  # fmt: skip


def _paths(found: Json, first: dict[str, dict[str, np.ndarray]], modalities: tuple[str, ...]) -> None:
    for modality in ("vision", "text"):
        order = [s["name"] for s in found["sites"] if s["modality"] in ("", modality)]
        if len(order) < 2 or not len(first[order[0]][modality]):
            continue
        links = []
        for a, b in itertools.pairwise(order):
            from_N, to_N = first[a][modality][:, 0], first[b][modality][:, 0]
            for i, j in sorted(set(zip(from_N.tolist(), to_N.tolist(), strict=True))):
                count = int(((from_N == i) & (to_N == j)).sum())
                lift = count * len(from_N) / ((from_N == i).sum() * (to_N == j).sum())
                links.append({"from": [a, i], "to": [b, j], "count": count, "lift": float(lift)})
        found["paths"][modality] = {"layers": order, "links": links}


def _history(sites: list[Json], rng: np.random.Generator) -> Json:
    steps = list(range(20, 801, 20))
    out: Json = {"steps": steps, "sites": {}}
    for site in sites:
        E = site["experts"]
        logits = rng.normal(scale=2, size=E)
        share = [np.exp(logits * (0.1 + math.exp(-s / 150))) for s in steps]
        share = [x / x.sum() for x in share]
        out["sites"][site["name"]] = {
            "share": [x.tolist() for x in share], "max_load": [float(x.max() * E) for x in share],
            "entropy": [float(-(x * np.log(x)).sum()) for x in share],
            "churn": [0.4 * math.exp(-s / 300) for s in steps], "dropped": [0.0] * len(steps),
        }  # fmt: skip
    return out
