"""Make a model repeat the decisions of a recording.

On the model that was recorded, in batches of the same samples, the outputs are bit for bit the same: gates are stored
exactly. On another model, or after a change of its weights, the routing is held fixed while everything else moves.

Shape suffixes: R rows (all tokens of a batch) · N tokens of a site · K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vlmoe.config import UserError
from vlmoe.interpret.recorder import choose_sites
from vlmoe.interpret.recording import Recording
from vlmoe.interpret.sites import Choice, Site, Subject, TokenTable

MODALITIES = ("vision", "text")


class ReplayError(UserError):
    """A recording that does not hold what the model asks for; the message names the site and the token."""


@contextmanager
def replay(subject: Subject, recording: Recording, sites: Sequence[str] | None = None) -> Iterator[Subject]:
    """While it is open, `subject.run(batch)` and `subject.losses(batch)` route as the recording did.

    sites: names of those to hold; None: all of the model. A token is known by sample, modality and position, so batches
    may be cut otherwise than they were recorded. Choices that were dropped for capacity are not served.

    Raises:
        ReplayError: a site that was not recorded or has other experts; a key that was recorded twice; on running, a
            batch with tokens that were not recorded, or whose experts have no room for what they served then.
    """
    chosen = choose_sites(subject, sites)
    for site in chosen:
        if site.name not in recording.sites:
            raise ReplayError(f"site {site.name}: not in {recording.folder}; it holds {', '.join(recording.sites)}")
        if recording.sites[site.name].experts != site.experts:
            raise ReplayError(
                f"site {site.name}: has {site.experts} experts, {recording.folder} has "
                f"{recording.sites[site.name].experts}"
            )
    rows, held = _Rows(recording), [_Held(site, recording) for site in chosen]
    handles = [h.site.change(h.rule) for h in held] + [h.site.watch(h.check) for h in held]
    calls = {name: getattr(subject, name) for name in ("run", "losses")}

    def replayed(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(batch: Any) -> Any:
            table = subject.tokens(batch)
            row_R = rows.find(table)
            for h in held:
                h.start(table, row_R)
            return call(batch)

        return run

    try:
        for name, call in calls.items():
            setattr(subject, name, replayed(call))
        yield subject
    finally:
        for name in calls:
            delattr(subject, name)  # the class's own come back
        for handle in handles:
            handle.remove()


class _Rows:
    """Where a token stands in the recording's table."""

    def __init__(self, recording: Recording) -> None:
        sample, modality = recording.column("sample"), recording.column("modality")
        self.code = {key: i for i, key in enumerate(sample.values)}
        self.low = int(recording.position_T.min(initial=-1))  # below 0: class tokens, marks of an image
        self.width = int(recording.position_T.max(initial=0)) - self.low + 1
        side_T = np.array([MODALITIES.index(m) for m in modality.values], dtype=np.int64)[modality.code_T]
        key_T = self._key(sample.code_T.astype(np.int64), side_T, recording.position_T)
        self.order = np.argsort(key_T, kind="stable")
        self.key = key_T[self.order]
        twice = np.flatnonzero(self.key[1:] == self.key[:-1])
        if len(twice):
            name = sample.values[sample.code_T[self.order[twice[0]]]]
            raise ReplayError(f"sample '{name}' was recorded twice: which of its decisions to repeat is not known")

    def find(self, table: TokenTable) -> np.ndarray:
        """For each row of a batch its row in the recording, -1 where it is not there."""
        code_R = np.array([self.code.get(key, -1) for key in table.samples], dtype=np.int64)[table.sample_R]
        side_R = np.where(table.modality_R == "text", MODALITIES.index("text"), MODALITIES.index("vision"))
        key_R = self._key(code_R, side_R, table.position_R)
        at_R = np.searchsorted(self.key, key_R).clip(max=max(len(self.key) - 1, 0))
        if not len(self.key):
            return np.full(len(key_R), -1)
        inside_R = (table.position_R >= self.low) & (table.position_R < self.low + self.width)
        known_R = (self.key[at_R] == key_R) & (code_R >= 0) & inside_R
        return np.where(known_R, self.order[at_R], -1)

    def _key(self, code: np.ndarray, side: np.ndarray, position: np.ndarray) -> np.ndarray:
        return (code * len(MODALITIES) + side) * self.width + position - self.low


class _Held:
    """One site's decisions, and those of them that the running batch needs."""

    def __init__(self, site: Site, recording: Recording) -> None:
        self.site, self.recording = site, recording
        routed = recording.at(site.name)
        self.place_T = np.full(recording.tokens, -1)
        self.place_T[routed.token_N] = np.arange(len(routed.token_N))
        self.expert_NK = torch.from_numpy(np.maximum(routed.expert_NK, 0).astype(np.int64))
        self.gate_NK = torch.from_numpy(np.where(routed.kept_NK, routed.gate_NK, 0))
        self.kept_NK = torch.from_numpy(routed.kept_NK)
        self.table: TokenTable | None = None
        self.asked = self.checked = 0

    def start(self, table: TokenTable, row_R: np.ndarray) -> None:
        self.asked = self.checked = 0
        self.table, self.rows_N = table, table.rows_of(self.site)
        row_N = row_R[self.rows_N]
        self.place_N = np.where(row_N >= 0, self.place_T[row_N], -1)
        self.real_N = table.valid_R[self.rows_N]

    def rule(self, choice: Choice) -> Choice:
        """The recorded experts and gates; padding keeps what the router chose."""
        N, device = len(choice.expert_NK), choice.expert_NK.device
        now = slice(self.asked, self.asked + N)
        self.asked += N
        if self.table is None or self.asked > len(self.rows_N):
            raise ReplayError(f"site {self.site.name}: run batches through the subject while they are replayed")
        lost = np.flatnonzero(self.real_N[now] & (self.place_N[now] < 0))
        if len(lost):
            row = self.rows_N[now][lost[0]]
            raise ReplayError(
                f"site {self.site.name}: {self._name(row)} is not in {self.recording.folder}"
                + (f", which holds {self.recording.rate:.0%} of the samples" if self.recording.rate < 1 else "")
            )
        place_N = torch.from_numpy(np.maximum(self.place_N[now], 0))
        held_N1 = torch.from_numpy(self.place_N[now] >= 0).to(device)[:, None]
        if not len(self.expert_NK):
            return choice
        sides = [(self.expert_NK[place_N], self.gate_NK[place_N]), (choice.expert_NK, choice.gate_NK)]
        K = max(expert.shape[1] for expert, _ in sides)
        sides = [(F.pad(e, (0, K - e.shape[1])), F.pad(g, (0, K - g.shape[1]))) for e, g in sides]
        expert_NK = torch.where(held_N1, sides[0][0].to(device), sides[1][0].to(torch.int64))
        gate_NK = torch.where(held_N1, sides[0][1].to(choice.gate_NK), sides[1][1])
        return replace(choice, expert_NK=expert_NK, gate_NK=gate_NK)

    def check(self, choice: Choice) -> None:
        """What was served then must be served now."""
        N = len(choice.expert_NK)
        now = slice(self.checked, self.checked + N)
        self.checked += N
        if not len(self.kept_NK):
            return
        served_NK = self.kept_NK[np.maximum(self.place_N[now], 0)]
        K = min(served_NK.shape[1], choice.kept_NK.shape[1])
        lost_NK = served_NK[:, :K] & ~choice.kept_NK.cpu()[:, :K]
        lost = np.flatnonzero(lost_NK.any(dim=1).numpy() & (self.place_N[now] >= 0))
        if len(lost):
            row = self.rows_N[now][lost[0]]
            raise ReplayError(
                f"site {self.site.name}: an expert has no room for {self._name(row)}, which it served when it was "
                "recorded: with a capacity, run the same batches"
            )

    def _name(self, row: int) -> str:
        assert self.table is not None
        t = self.table
        return f"sample '{t.samples[t.sample_R[row]]}', {t.modality_R[row]} {t.position_R[row]},"
