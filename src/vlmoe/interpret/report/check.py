"""Whether findings hold what the page reads, said in one line when they do not."""

from __future__ import annotations

from typing import Any

from vlmoe.config import UserError

REQUIRED: dict[str, type] = {"title": str, "sites": list, "use": dict, "experts": dict, "samples": list}
OPTIONAL: dict[str, Any] = {
    "about": {}, "information": {}, "agreement": {}, "paths": {}, "sharing": {}, "history": None, "drift": None,
    "notes": [],
}  # fmt: skip
SITE = ("name", "layer", "modality", "experts", "k")
USE = ("share", "tokens")
SAMPLE = ("key", "kind", "routes")


class ReportError(UserError):
    """Findings that cannot be shown; the message names the key and what was expected."""


def complete(findings: dict[str, Any], name: str = "findings") -> dict[str, Any]:
    """The findings with every optional key in its place.

    Raises ReportError: a key is missing, of a wrong type, or two parts do not fit each other.
    """
    if not isinstance(findings, dict):
        raise ReportError(f"{name}: got {type(findings).__name__}, wanted a dict")
    for key, kind in REQUIRED.items():
        if key not in findings:
            raise ReportError(f"{name}: key '{key}' is missing; wanted {', '.join(REQUIRED)}")
        if not isinstance(findings[key], kind):
            raise ReportError(f"{name}: key '{key}' got {type(findings[key]).__name__}, wanted {kind.__name__}")
    if not findings["sites"]:
        raise ReportError(f"{name}: key 'sites' is empty: a model without routers has no routing to show")
    for i, site in enumerate(findings["sites"]):
        _has(site, SITE, f"{name}: sites[{i}]")
        _check_site(findings, site, name)
    for i, sample in enumerate(findings["samples"]):
        _has(sample, SAMPLE, f"{name}: samples[{i}]")
    return {key: _empty(value) for key, value in OPTIONAL.items()} | findings


def _check_site(findings: dict[str, Any], site: dict[str, Any], name: str) -> None:
    label, experts = site["name"], site["experts"]
    for key in ("use", "experts"):
        if label not in findings[key]:
            raise ReportError(f"{name}: key '{key}' lacks the site '{label}'")
    _has(findings["use"][label], USE, f"{name}: use['{label}']")
    for key, got in (("use", findings["use"][label]["share"]), ("experts", findings["experts"][label])):
        if len(got) != experts:
            raise ReportError(f"{name}: {key}['{label}'] got {len(got)} experts, wanted {experts} as in sites")
    samples = len(findings["samples"])
    for e, expert in enumerate(findings["experts"][label]):
        for patch in expert.get("top_patches") or []:
            if not 0 <= patch["sample"] < samples:
                where = f"{name}: experts['{label}'][{e}]"
                raise ReportError(f"{where}: a top patch is of sample {patch['sample']}, wanted 0 to {samples - 1}")


def _has(group: Any, keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if not isinstance(group, dict) or key not in group]
    if missing:
        raise ReportError(f"{where}: key '{missing[0]}' is missing; wanted {', '.join(keys)}")


def _empty(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value
