"""Writes the committed reports anew from the runs that they keep: figures, text, tables and pictures by today's code.

    python benchmarks/recount_studies.py

Nothing is trained. FLOPs of reports of before padding was charged to all layers alike are recounted, see
`vlmoe.study.recount`. Each picture goes where the report shows it from (docs/images).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from vlmoe.study.collect import CSV
from vlmoe.study.plan import REPORT, read_report
from vlmoe.study.recount import recount
from vlmoe.study.report import MARKDOWN, headline, write_report

RESULTS = Path(__file__).parent / "results"
PICTURE = re.compile(r"!\[(.*)\]\((.*)\)")
ANALYSES = ("saved", "frontier", "ablation", "law", "map", "crossings")


def rewrite(folder: Path, console: Console) -> None:
    """One report."""
    shown = dict(PICTURE.findall((folder / MARKDOWN).read_text()))
    about = {k: v for k, v in recount(read_report(folder)).items() if k not in ANALYSES}
    with tempfile.TemporaryDirectory() as made:
        new = Path(made)
        report = write_report(about, new)
        lines = []
        for line in (new / MARKDOWN).read_text().split("\n"):
            if not (found := PICTURE.fullmatch(line)):
                lines.append(line)
            elif where := shown.get(found[1]):
                shutil.copyfile(new / found[2], (folder / where).resolve())
                lines.append(f"![{found[1]}]({where})")
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
        (folder / MARKDOWN).write_text(text)
        for name in (REPORT, CSV):
            shutil.copyfile(new / name, folder / name)
    console.print(f"{folder.name}: {' '.join(headline(report))}\n", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    for study in sorted(RESULTS.glob("study-*")):
        rewrite(study, Console())
