"""Where a model routes, whatever model it is: the protocol that the recorder, the statistics, the causal tests and the
report work on. `interpret.own` speaks it for our models, `interpret.hf` for those of transformers.

A batch is a table of tokens, one row for each position of each sequence, sequence after sequence. A site is one router:
it decides for the rows of its modality, or for all rows, in that order.

Shape suffixes: R rows (all tokens of a batch) · N rows a site decides for · K chosen experts of a token · E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class Choice:
    """What a router decided for the N tokens it was given, padding included.

    expert_NK: chosen experts, best first. gate_NK: the weights their outputs are added with. kept_NK: False where a
    choice does not count (dropped for capacity, padding). probs_NE: the router's distribution over experts.
    """

    expert_NK: Tensor
    gate_NK: Tensor
    kept_NK: Tensor
    probs_NE: Tensor


class Site(Protocol):
    """One router of a model. name: as shown, "3/vision" or "12". modality: whose tokens it gets; "" for all."""

    name: str
    layer: int
    modality: str
    experts: int
    k: int

    def watch(self, see: Callable[[Choice], None]) -> RemovableHandle:
        """Call `see` with each decision, after each forward pass, until the handle is removed."""
        ...

    def change(self, rule: Callable[[Choice], Choice]) -> RemovableHandle:
        """Put `rule`'s experts and gates in the place of the router's own, until the handle is removed. A gate of 0
        takes an expert's part away. kept_NK and probs_NE of the new choice are not looked at."""
        ...


@dataclass
class TokenTable:
    """The R tokens of a batch, sequence after sequence.

    samples: key of each sequence. sample_R: which of them a token belongs to. modality_R: "vision" or "text".
    position_R: the patch's number, row by row (-1: a class token), or the token's place in its text. valid_R: False at
    padding. text_R: the token in words, "" for patches. factors: name -> what is known of each token, "" where nothing.
    """

    kind: str  # pair, image or text
    samples: list[str]
    sample_R: np.ndarray
    modality_R: np.ndarray
    position_R: np.ndarray
    valid_R: np.ndarray
    text_R: np.ndarray
    factors: dict[str, np.ndarray] = field(default_factory=dict)

    def rows_of(self, site: Site) -> np.ndarray:
        """Numbers of the rows that a site decides for."""
        if not site.modality:
            return np.arange(len(self.sample_R))
        return np.flatnonzero(self.modality_R == site.modality)


class Subject(Protocol):
    """A model to look at, and how to feed it. A batch is whatever `tokens`, `run` and `losses` agree on."""

    model: nn.Module
    sites: list[Site]

    def tokens(self, batch: Any) -> TokenTable: ...

    def run(self, batch: Any) -> Any:
        """A forward pass, without gradient."""
        ...

    def losses(self, batch: Any) -> np.ndarray:
        """(R,) float: the loss of predicting each token, in nats; nan where it is not predicted."""
        ...
