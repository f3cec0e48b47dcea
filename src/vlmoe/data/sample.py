"""What a source yields: one sample with its ground truth, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

KINDS = ("image", "text", "pair")
ENDLESS = 1 << 40  # a source this long is taken in its own order: it never repeats, or shuffles itself


@dataclass(frozen=True, slots=True)
class Span:
    """A range of characters of a text and the factors that hold for it: factor name -> value in words."""

    start: int
    stop: int
    factors: dict[str, str]


@dataclass(slots=True)
class Sample:
    """One image, text or pair, before tokenizers and masking.

    image: uint8 (H, W, 3), or None for text-only. text: None for image-only.
    patch_factors: factor name -> one value in words for each patch, row by row; filled only by sources that know the
    truth. spans: what is known of ranges of the text; likewise.
    codes: (P,) visual codes stored beside the image, for `visual_tokenizer.type: codes`.
    taken: in words, what of the entry this is where it is not all: "the first of several images".
    """

    key: str
    image: np.ndarray | None = None
    text: str | None = None
    codes: np.ndarray | None = None
    patch_factors: dict[str, list[str]] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    taken: tuple[str, ...] = ()


class BadSample(Exception):  # noqa: N818 - it is data about a sample, reported and counted, not only an error
    """A sample that cannot be used: its key and the reason, in words. samples: how many it stands for, above 1 where a
    whole shard is lost."""

    def __init__(self, key: str, reason: str, samples: int = 1) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason, self.samples = key, reason, samples

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, int]]:  # crosses worker processes
        return BadSample, (self.key, self.reason, self.samples)


class Source(Protocol):
    """Random access to samples of one kind. `source[i]` is the same sample on every machine, or raises BadSample."""

    kind: str

    def __len__(self) -> int:
        """Samples in one epoch; a source that never repeats gives a length nobody reaches (2**62)."""
        ...

    def __getitem__(self, index: int) -> Sample: ...
