"""Write down every routing decision of a model, streamed to Parquet at bounded memory.

A recording is a folder. tokens.parquet: one row a token (sample, kind, modality, position, text and one column
"factor.NAME" for each factor). routing.parquet: one row for each token and site (token: the row's number in
tokens.parquet; site: its number in recording.json; experts and gates, best first; kept: false where dropped for
capacity; entropy of the router's distribution, in nats). recording.json: the sites and the counts. The folder gets its
name when all is written, so an interrupted recording is never taken for a whole one.

Only what is read off the model happens in the caller's thread; encoding and writing do not hold it up (`writing`).

Shape suffixes: R rows (all tokens of a batch) · N tokens of a site · M those recorded · K chosen experts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmoe.config import UserError
from vlmoe.data.counter import hash64
from vlmoe.interpret.coding import MOST, Coded, Vocabulary
from vlmoe.interpret.recording import DESCRIPTION, FACTOR, FORMAT, Recording
from vlmoe.interpret.sites import Choice, Site, Subject, TokenTable
from vlmoe.interpret.writing import SiteRows, TokenRows, Writer


class RecordingError(UserError):
    """A recording that cannot be written or does not fit the model; the message names the place."""


def record(subject: Subject, batches: Iterable[Any], folder: str | Path, **options: Any) -> Recording:
    """Run every batch and write its decisions into a new folder. options: see `Recorder`."""
    with Recorder(subject, folder, **options) as recorder:
        for batch in batches:
            recorder.run(batch)
    return Recording.load(folder)


class Recorder:
    """Records while it is open: `with Recorder(subject, folder) as r: r.run(batch)`.

    sites: names of those to record; layers: numbers of those; None: all. rate: share of the samples, chosen by a hash
    of their key, so that any run records the same ones. about: plain values to keep with the recording. replace: an
    earlier recording in the folder goes away once this one is whole.

    Raises RecordingError: the folder is taken or cannot be written, no such site, a rate that is no share.
    """

    def __init__(
        self,
        subject: Subject,
        folder: str | Path,
        *,
        sites: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        rate: float = 1.0,
        about: dict[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        self.subject, self.folder, self.rate, self.about = subject, Path(folder), rate, about or {}
        self.replace = replace
        if not 0 < rate <= 1:
            raise RecordingError(f"rate: expected a share of the samples above 0 and up to 1, got {rate}")
        if self.folder.exists() and not (replace and (self.folder / DESCRIPTION).is_file()):
            raise RecordingError(f"{folder}: is already there; record into a new folder")
        self.sites = choose_sites(subject, sites, layers)
        self._seen: dict[str, list[Choice]] | None = None
        self._count = self._samples = 0
        self._vocabularies: dict[str, Vocabulary] = {}

    def __enter__(self) -> Recorder:
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from None
        self._writer = Writer(self._partial)
        self._handles = [site.watch(lambda choice, name=site.name: self._see(name, choice)) for site in self.sites]  # type: ignore[misc]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        try:
            self._writer.close(whole=kind is None)
            if kind is None:
                self._finish()
        except OSError as problem:
            raise self._unwritable(problem) from None
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def run(self, batch: Any) -> Any:
        """The subject's own `run`, recorded."""
        with self.batch(batch):
            return self.subject.run(batch)

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """Record whatever forward pass of this batch happens inside: once through the backbone for each of its rows."""
        self._seen = {site.name: [] for site in self.sites}
        try:
            yield
            self._take(self.subject.tokens(batch), self._seen)
        finally:
            self._seen = None

    def _see(self, name: str, choice: Choice) -> None:
        if self._seen is not None:
            self._seen[name].append(choice)

    def _take(self, table: TokenTable, seen: dict[str, list[Choice]]) -> None:
        keep_R = table.valid_R
        chosen = np.ones(len(table.samples), dtype=bool)
        if self.rate < 1:
            chosen = np.array([hash64("recorded", key) < self.rate * 2.0**64 for key in table.samples], dtype=bool)
            keep_R = keep_R & chosen[table.sample_R]
        number_R = np.cumsum(keep_R) + (self._count - 1)
        routed: dict[int, SiteRows] = {}
        for number, site in enumerate(self.sites):
            if seen[site.name]:
                choice = join(seen[site.name])
                rows_N = fitting_rows(table, site, len(choice.expert_NK))
                routed[number] = _site_rows(choice, keep_R[rows_N], number_R[rows_N])
        try:
            self._writer.add(_columns(table, keep_R, self._vocabularies), routed)
        except OSError as error:  # of the row group before, met by the writing thread
            raise self._unwritable(error) from None
        self._count += int(np.count_nonzero(keep_R))
        self._samples += int(chosen.sum())

    def _unwritable(self, error: OSError) -> RecordingError:
        return RecordingError(f"{self.folder}: cannot be written: {error.strerror or error}")

    def _finish(self) -> None:
        about = {
            "format": FORMAT,
            "tokens": self._count,
            "samples": self._samples,
            "rate": self.rate,
            "sites": [
                {"name": s.name, "layer": s.layer, "modality": s.modality, "experts": s.experts, "k": s.k}
                | {"common": getattr(s, "common", 0)}
                for s in self.sites
            ],
            "about": self.about,
        }
        (self._partial / DESCRIPTION).write_text(json.dumps(about, indent=1))
        if self.replace:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self._partial, self.folder)


def choose_sites(subject: Subject, names: Sequence[str] | None, layers: Sequence[int] | None = None) -> list[Site]:
    """A subject's sites by name, by layer, or by both. Raises RecordingError for one that it does not have."""
    known = {site.name: site for site in subject.sites}
    for name in names or ():
        if name not in known:
            raise RecordingError(f"no site '{name}' in this model; there are {', '.join(known) or 'none'}")
    have = sorted({site.layer for site in subject.sites})
    for layer in layers or ():
        if layer not in have:
            raise RecordingError(f"no router in layer {layer} of this model; there are some in {have}")
    return [
        site
        for site in subject.sites
        if (names is None or site.name in names) and (layers is None or site.layer in layers)
    ]


def fitting_rows(table: TokenTable, site: Site, count: int) -> np.ndarray:
    """The rows of the table that a site decides for. Raises RecordingError when there are not `count` of them."""
    rows_N = table.rows_of(site)
    if len(rows_N) != count:
        raise RecordingError(
            f"site {site.name} decided for {count} tokens, but the batch has {len(rows_N)} rows for it: "
            "run each batch once, whole"
        )
    return rows_N


def join(choices: list[Choice]) -> Choice:
    """The decisions of several passes one after the other, all as wide as the widest; fillers have gate 0."""
    if len(choices) == 1:
        return choices[0]
    K = max(c.expert_NK.shape[1] for c in choices)
    parts = [[F.pad(t, (0, K - t.shape[1])) for t in (c.expert_NK, c.gate_NK, c.kept_NK)] for c in choices]
    expert_NK, gate_NK, kept_NK = (torch.cat(p) for p in zip(*parts, strict=True))
    return Choice(expert_NK, gate_NK, kept_NK, torch.cat([c.probs_NE for c in choices]))


def entropy(probs_NE: Tensor) -> Tensor:
    """Of each token's distribution over experts, in nats."""
    return torch.special.entr(probs_NE.float()).sum(dim=-1)


def _site_rows(choice: Choice, keep_N: np.ndarray, token_N: np.ndarray) -> SiteRows:
    gate_NK = choice.gate_NK if choice.gate_NK.dtype == torch.float64 else choice.gate_NK.float()
    parts = (choice.expert_NK.to(torch.int16), gate_NK, choice.kept_NK, entropy(choice.probs_NE))
    columns = [token_N, *(part.detach().cpu().numpy() for part in parts)]
    return SiteRows(*(columns if keep_N.all() else [column[keep_N] for column in columns]))


def _columns(table: TokenTable, keep_R: np.ndarray, vocabularies: dict[str, Vocabulary]) -> TokenRows:
    """The rows to keep, words as numbers: the table's own where it has them (`CodedTable`)."""
    sample_M = table.sample_R[keep_R]
    words = {"sample": Coded(sample_M, table.samples), "kind": Coded(np.zeros_like(sample_M), [table.kind])}
    coded = getattr(table, "codes", None)
    if coded is None:
        plain = {"modality": table.modality_R, "text": table.text_R}
        plain |= {FACTOR + name: values_R for name, values_R in table.factors.items()}
        for name, values_R in plain.items():
            if name not in vocabularies or len(vocabularies[name]) > MOST:
                vocabularies[name] = Vocabulary()
            words[name] = vocabularies[name].code(values_R[keep_R])
    else:
        words |= {name: Coded(column.code_R[keep_R], column.values) for name, column in coded.items()}
    return TokenRows(table.position_R[keep_R], words)
