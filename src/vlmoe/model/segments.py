"""Modalities as data: a sequence is made of parts, and a block looks up what serves each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Where one modality stands in the sequence, and whether some of its positions may be padding."""

    modality: str
    slice: slice
    padded: bool = False


@dataclass
class Part:
    """The embedded tokens of one modality: x_BTD, and valid_BT, True at real tokens (None: all are real)."""

    modality: str
    x_BTD: Tensor
    valid_BT: Tensor | None = None


def join(parts: list[Part]) -> tuple[Tensor, Tensor | None, tuple[Segment, ...]]:
    """Concatenate parts along the sequence.

    Returns x_BTD, valid_BT (None when nothing is padded) and the segments in order.
    """
    if not parts:
        raise ValueError("the backbone needs at least one part: an image, a text or both")
    start, segments = 0, []
    for part in parts:
        stop = start + part.x_BTD.shape[1]
        segments.append(Segment(part.modality, slice(start, stop), part.valid_BT is not None))
        start = stop
    x_BTD = parts[0].x_BTD if len(parts) == 1 else torch.cat([part.x_BTD for part in parts], dim=1)
    if all(part.valid_BT is None for part in parts):
        return x_BTD, None, tuple(segments)
    valid = [
        part.valid_BT if part.valid_BT is not None else x_BTD.new_ones(part.x_BTD.shape[:2], dtype=torch.bool)
        for part in parts
    ]
    return x_BTD, torch.cat(valid, dim=1), tuple(segments)


def causal_mask(segments: tuple[Segment, ...], modality: str, device: torch.device) -> Tensor:
    """bool (1, 1, T, T): who may look at whom when `modality` is written from left to right. Its tokens see the others
    and those before them; the others do not see it."""
    T = segments[-1].slice.stop
    allowed_TT = torch.ones(T, T, dtype=torch.bool, device=device)
    for segment in segments:
        if segment.modality == modality:
            allowed_TT[:, segment.slice] = False
            n = segment.slice.stop - segment.slice.start
            before_TT = torch.ones(n, n, dtype=torch.bool, device=device).tril()
            allowed_TT[segment.slice, segment.slice] = before_TT
    return allowed_TT[None, None]
