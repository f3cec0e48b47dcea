"""A closed or full standard output costs no run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from vlmoe.train.output import forgiving_output
from rich.console import Console
with forgiving_output() as lost:
    for n in range(2000):
        print("line", n)
        print("line", n, file=sys.stderr)
        Console().print("line", n)
open(sys.argv[1], "w").write(f"done {len(lost)}")
"""


@pytest.mark.parametrize("closed", ["pipe", "full", "none"])
def test_lost_output(tmp_path: Path, closed: str) -> None:
    done = tmp_path / "done"
    command = [sys.executable, "-c", CODE, str(done)]
    if closed == "pipe":
        read, write = os.pipe()
        os.close(read)
        code = subprocess.run(command, stdout=write, stderr=write).returncode
        os.close(write)
    elif closed == "full":
        with open("/dev/full", "w") as full:
            code = subprocess.run(command, stdout=full, stderr=full).returncode
    else:
        code = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]).returncode
    assert code == 0
    assert done.read_text() == ("done 2" if closed == "full" else "done 0")
