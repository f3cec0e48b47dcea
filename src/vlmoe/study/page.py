"""Sections of text, a table and a picture, as Markdown and as one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Section:
    """text: paragraphs of Markdown, with *emphasis* and `code` only. picture: a PNG in the report's folder; left out
    where the file is missing."""

    title: str
    text: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    picture: str = ""


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        if section.title:
            parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text.strip())
        if section.picture:
            parts.append(f"![{section.title}]({section.picture})")
        if section.rows:
            rows = [section.head, ["-"] * len(section.head), *section.rows]
            parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """One file to look at: no scripts, nothing fetched."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts = [f"<h2>{html.escape(section.title)}</h2>"] if section.title else []
        paragraphs = [_inline(p) for p in re.split(r"\n\s*\n", section.text.strip()) if p.strip()]
        lead = ' class="lead"' if not section.title else ""
        parts += [f"<p{lead}>{p}</p>" for p in paragraphs]
        if section.picture and (folder / section.picture).is_file():
            data = base64.b64encode((folder / section.picture).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
        if section.rows:
            parts.append(_table(section))
        body.append("<section>" + "\n".join(parts) + "</section>")
    return TEMPLATE.format(title=html.escape(title), body="\n".join(body))


def _table(section: Section) -> str:
    numeric = [all(_is_number(row[i]) for row in section.rows) for i in range(len(section.head))]

    def cell(tag: str, text: str, column: int) -> str:
        kind = ' class="number"' if numeric[column] else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text, i) for i, text in enumerate(section.head))
    rows = ["".join(cell("td", text, i) for i, text in enumerate(row)) for row in section.rows]
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def _is_number(text: str) -> bool:
    return not text or bool(re.match(r"[≥≤~]? ?[-+]?[\d.,]+", text)) or text == "-"


def _inline(text: str) -> str:
    text = html.escape(" ".join(text.split()))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem 4rem; background: #fff; color: #222;
  font: 15px/1.55 system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }}
h2 {{ font-size: 1.15rem; margin: 2.6rem 0 .4rem; padding-top: .9rem; border-top: 1px solid #ddd; }}
p {{ max-width: 52rem; margin: .5rem 0; color: #444; }}
p.lead {{ font-size: 1.08rem; color: #111; }}
code {{ font: .92em ui-monospace, "DejaVu Sans Mono", monospace; background: #f3f3f3; padding: .05em .3em;
  overflow-wrap: anywhere; }}
img {{ display: block; max-width: 100%; margin: 1rem 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: top; white-space: nowrap; }}
th {{ font-weight: 600; color: #555; border-bottom: 1px solid #999; }}
td {{ border-bottom: 1px solid #eee; }}
.number {{ text-align: right; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
