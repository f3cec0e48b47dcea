"""How the overview says numbers, names and links. A point of the overview is a list of texts and of links."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

Json = dict[str, Any]
Point = list[str | Json]


def link(text: str, *to: Any) -> Json:
    return {"text": text, "to": list(to)}


def site_name(site: Json) -> str:
    return f"layer {site['layer']}" + (f" · {site['modality']}" if site["modality"] else "")


def expert_link(run: Json, site: str, expert: int) -> Json:
    found = next(s for s in run["sites"] if s["name"] == site)
    return link(f"{site_name(found)}, expert {expert}", "expert", site, expert)


def many(n: int, one: str, more: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else more or one + 's'}"


def percent(x: float) -> str:
    return f"{100 * x:.0f}%" if x == 0 or abs(x) >= 0.1 else f"{100 * x:.1f}%"


def change(row: Json) -> str:
    """A change of loss with its interval, in decimals that show three digits of the largest of them."""
    most = max(abs(row[key]) for key in ("delta", "low", "high"))
    digits = min(6, max(0, 2 - math.floor(math.log10(most)))) if most > 0 else 2
    text = f"{row['delta']:+.{digits}f} nats [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
    return text.replace("-", "\N{MINUS SIGN}")


def plain(factor: str) -> str:
    return factor.replace("_", " ")


def is_number(x: Any) -> TypeGuard[float]:
    return isinstance(x, int | float) and math.isfinite(x)


def by_modality(run: Json) -> dict[str, list[Json]]:
    groups: dict[str, list[Json]] = {}
    for site in run["sites"]:
        groups.setdefault(site["modality"], []).append(site)
    return groups


def peak(use: Json) -> float:
    """Busiest expert over the even share; recomputed where findings do not say."""
    given = use.get("max_over_mean")
    return given if is_number(given) else max(use["share"], default=0.0) * len(use["share"])


def above_chance(row: Json) -> bool:
    """Whether the bits are more than permuted labels give, by token and (where findings have it) by sample."""
    return row["bits"] > max(row["chance_high"], row.get("sample_chance_high", 0.0))


def told(row: Json) -> float:
    """Share of a factor's bits that the expert tells; none where chance gives as many."""
    return row["share"] if above_chance(row) else 0.0


def tokens_with(row: Json) -> str:
    """The tokens a row is about, in words."""
    kind = {"vision": "image tokens", "text": "text tokens"}.get(row.get("modality", ""), "tokens")
    return f"{kind} with {plain(row['factor'])} “{row['value']}”"
