"""One HTML file from findings: style, scripts and data inside, nothing fetched.

The page is `page/page.html`; its scripts and styles are the other files of that folder, in the order of SCRIPTS. Texts
of the overview are made in `words`, everything else is drawn in the browser from the embedded data.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import gzip
import html
import json
import math
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from vlmoe.interpret.report import words
from vlmoe.interpret.report.check import ReportError, complete

SCRIPTS = (
    "core.js", "draw.js", "overview.js", "use.js", "tokens.js", "samples.js", "expert.js", "information.js",
    "agreement.js", "paths.js", "history.js", "compare.js", "start.js",
)  # fmt: skip
PLAIN = 500_000  # bytes of JSON that are embedded as they are, for reading; more are compressed
LIMIT = 10_000_000  # bytes of the whole file
DIGITS = 5  # significant ones of every number


def build(findings: dict[str, Any], out: Path, compare: dict[str, Any] | None = None, limit: int = LIMIT) -> Path:
    """Writes the page of one or two findings (shape: `vlmoe.interpret.findings`) to `out` and returns it.

    A page over `limit` bytes shows fewer samples, then shorter lists, and says so among its notes.
    Raises ReportError: findings that lack what the page needs, a file that cannot be written.
    """
    runs = [complete(findings)]
    if compare is not None:
        runs.append(complete(compare, "findings to compare with"))
    page = _page(runs)
    for samples, rows in ((24, 12), (16, 12), (12, 8), (8, 6), (4, 4), (2, 3)):
        if len(page) <= limit:
            break
        page = _page([_shorten(run, samples, rows) for run in runs])
    _write(out, page)
    return out


def _page(runs: list[dict[str, Any]]) -> bytes:
    drift = next((run["drift"] for run in reversed(runs) if run["drift"]), None)
    data = {
        "runs": [run | {"words": words.overview(run)} for run in runs],
        "drift": drift if len(runs) == 2 else None,
        "compared": words.compared(runs[0], runs[1], drift) if len(runs) == 2 else [],
    }
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    encoding = "plain"
    if len(text) > PLAIN:
        text, encoding = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode(), "gzip"
    folder = resources.files("vlmoe.interpret.report") / "page"
    scripts = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    title = " and ".join(run["title"] for run in runs)
    parts = {
        "title": html.escape(f"{title} · routing report"),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "scripts": f"(() => {{\n{scripts}\n}})();",
        "encoding": encoding,
        "data": text.replace("<", "\\u003c"),  # only ever inside a JSON string, so the browser reads the same
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page).encode()


def _plain(value: Any) -> Any:
    """Only what JSON has: numbers rounded, those that are not finite as null, numpy's as Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, np.bool_):
        return bool(value)
    return str(value)


def _shorten(run: dict[str, Any], samples: int, rows: int) -> dict[str, Any]:
    """The findings with at most so many samples, and rows in each list of an expert."""
    run = copy.deepcopy(run)
    total = len(run["samples"])
    run["samples"] = run["samples"][:samples]
    for site in run["experts"].values():
        for expert in site:
            expert["top_patches"] = [p for p in expert.get("top_patches") or [] if p["sample"] < samples][:rows]
            for key in ("values", "top_tokens"):
                expert[key] = (expert.get(key) or [])[:rows]
            if expert.get("ablation"):
                expert["ablation"]["by_factor"] = (expert["ablation"].get("by_factor") or [])[:rows]
    run["notes"].append(
        f"To keep this file small it holds {min(samples, total)} of {total} samples, and at most {rows} rows in each "
        "list of an expert."
    )
    return run


def _write(out: Path, page: bytes) -> None:
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(page)
        os.replace(temporary, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ReportError(f"{out}: cannot be written: {error.strerror or error}") from None
