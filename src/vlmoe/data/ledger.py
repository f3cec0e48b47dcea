"""What a reader of a stream has found in its shards, turn by turn, so that a resumed run need not look again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmoe.config import UserError, parse_json


@dataclass(frozen=True)
class Turn:
    """One shard as one reader met it.

    entries: places it takes in the reader's stream. lost: why it could not be read, then it takes one place; samples:
    how many it is thought to have had.
    """

    shard: str
    entries: int
    lost: str = ""
    samples: int = 0


class Ledger:
    """A reader's turns, from the first on without a gap: in memory, and in a file if `path` is given.

    about: what the turns follow from. Several processes may keep the same ledger: the one that writes a turn first
    decides it for all, so that a shard that fails once and then not takes the same place for everyone.

    Raises UserError when the file is of something else, or cannot be read.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.turns: list[Turn] = []
        self._read = 0  # bytes of the file
        if path is not None and path.exists():
            self.add([])

    def add(self, found: Sequence[Turn]) -> None:
        """Take turns over that others have written since, then write what `found`, which follows on `self.turns`, has
        beyond them."""
        if self.path is None:
            self.turns += found
            return
        first = len(self.turns)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)  # works between machines, too
                self._take(file)
                new = found[len(self.turns) - first :]
                lines = ([] if self._read else [self.about]) + [
                    {k: v for k, v in asdict(turn).items() if v or k == "entries"} for turn in new
                ]
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
                file.flush()
                self._read = file.tell()
        except OSError as error:
            raise UserError(
                f"{self.path}: the position in the data cannot be kept: {error.strerror or error}"
            ) from None
        self.turns += new

    def _take(self, file: Any) -> None:
        file.seek(self._read)
        raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):  # the writer was killed; nobody writes now
            os.ftruncate(file.fileno(), self._read + len(whole))
        for number, line in enumerate(whole.splitlines()):
            where = f"{self.path}, byte {self._read}, line {number + 1} from there"
            record = parse_json(line, where)
            if not self._read and not number:
                self._check(record)
                continue
            try:
                self.turns.append(Turn(**record))
            except TypeError:
                raise UserError(
                    f"{where}: no record of a shard; remove the file to have the data counted anew"
                ) from None
        self._read += len(whole)
        file.seek(0, os.SEEK_END)

    def _check(self, then: Any) -> None:
        if then == self.about:
            return
        keys = [k for k, v in self.about.items() if not isinstance(then, dict) or then.get(k) != v]
        raise UserError(
            f"{self.path}: was written for other data or another order of them ({', '.join(keys)}): shards have been "
            "added, removed or renamed since, or keys of the recipe changed. Restore them, or choose another run.dir"
        )
