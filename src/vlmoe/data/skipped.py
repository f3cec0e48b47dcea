"""Bad samples: written down once each, counted, and an error when there are too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmoe.config import UserError

if TYPE_CHECKING:
    from vlmoe.data.loader import Step

PATIENCE = 200  # samples drawn before a share means anything


def drawn_of(step: Step) -> int:
    return step.drawn + step.lost


def bad_of(step: Step) -> int:
    return len(step.bad) + step.lost


class BadBudget:
    """Counts samples drawn and samples skipped over a run. Of a lost shard all samples count, as far as known.

    path: file that gets one JSON line {"step", "key", "reason"} for each skip; None writes none. `max_share`: the share
    of skipped samples that the run may reach, judged from the 200th drawn sample on, and by `finish` at the end.
    """

    def __init__(self, path: str | Path | None, max_share: float) -> None:
        self.path = Path(path) if path is not None else None
        self.max_share = max_share
        self.drawn = self.bad = self.steps = 0
        self.last = ("", "")

    def add(self, step: Step) -> None:
        """Write down and count one micro-batch. Raises UserError when too many samples are bad."""
        self.write(step, self.steps)
        self.count(drawn_of(step), bad_of(step))

    def write(self, step: Step, number: int) -> None:
        """A line for each bad sample of micro-batch `number`."""
        if not step.bad:
            return
        self.last = step.bad[-1]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for key, reason in step.bad:
                    file.write(json.dumps({"step": number, "key": key, "reason": reason}, ensure_ascii=False) + "\n")

    def count(self, drawn: int, bad: int, micro_batches: int = 1) -> None:
        """Count samples of so many micro-batches. Raises UserError when too many are bad."""
        self.drawn += drawn
        self.bad += bad
        self.steps += micro_batches
        if self.drawn >= PATIENCE:
            self._judge()

    def finish(self) -> None:
        """The data has come to its end: judge however few samples there were."""
        self._judge()

    def _judge(self) -> None:
        if self.drawn and self.bad / self.drawn > self.max_share:
            key, reason = self.last
            where = f"; all of them: {self.path}" if self.path is not None else ""
            raise UserError(
                f"{self.bad} of {self.drawn} samples had to be skipped, more than data.max_bad_share = "
                f"{self.max_share} allows. The last: {key}: {reason}{where}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words, fit for JSON."""
        return {"drawn": self.drawn, "bad": self.bad, "steps": self.steps, "last": list(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn, self.bad, self.steps = int(state["drawn"]), int(state["bad"]), int(state["steps"])
        key, reason = state["last"]
        self.last = (str(key), str(reason))
