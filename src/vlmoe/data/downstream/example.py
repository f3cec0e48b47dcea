"""What a downstream task is asked: one example with its truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(slots=True)
class Example:
    """One example of any downstream task; a task uses the fields it needs.

    key: the data set's own id (question id, image file, pair id), unique in its split.
    images: uint8 (S, S, 3) each: none for NLI, left and right for NLVR2, else one. Empty when only the truth was read.
    text: question (VQA), sentence (NLVR2), premise (NLI); None where the task has none.
    text_pair: NLI's hypothesis.
    references: VQA: the annotators' answers; retrieval and captioning: the captions of the image.
    label: number of the right class in the source's `labels`; None for VQA, retrieval, captioning and where the truth
        is not public (test sets).
    group: examples of one group are judged together (NLVR2: the sentence, for consistency).
    factors: what scores are also split by, name -> value: {"kind": "colour"}.
    exact: answers are compared as they are: normalisation would spoil them ("letter a" loses its letter).
    """

    key: str
    images: tuple[np.ndarray, ...] = ()
    text: str | None = None
    text_pair: str | None = None
    references: tuple[str, ...] = ()
    label: int | None = None
    group: str = ""
    factors: dict[str, str] = field(default_factory=dict)
    exact: bool = False


class Examples(Protocol):
    """A split of a task's data, in a fixed order. `source[i]` is the same on every machine, or raises BadSample.

    task: vqa, nlvr2, retrieval, classify, nli or caption. name: for messages. labels: the classes (VQA: the answers
    that can be given), empty for retrieval and captioning.
    """

    task: str
    name: str
    labels: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def truth(self, index: int) -> Example:
        """The example without its images, which are not read."""
        ...
