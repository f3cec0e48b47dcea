"""Scores are made of numbers: nan and infinity are refused where answers are computed, before any of them counts as
right or wrong (the argmax of nan is a class like any other, and nothing is larger than nan)."""

from __future__ import annotations

from torch import Tensor

from vlmoe.config import UserError


class NotFinite(UserError):  # noqa: N818 - it says what is wrong with a model's answers
    """A model's outputs are no numbers; the message says how many, and of what."""

    def __init__(self, broken: int, total: int, what: str) -> None:
        super().__init__(
            f"{broken} of {total} {what} are no numbers (nan or infinite), so there is nothing to score; the weights "
            "are damaged, or the model overflows in this precision"
        )


def first_choice(logits_MV: Tensor, what: str) -> Tensor:
    """The argmax of each row (M,). Raises NotFinite where a row holds nan or infinity."""
    broken = int((~logits_MV.isfinite().all(dim=-1)).sum())
    if broken:
        raise NotFinite(broken, logits_MV.shape[:-1].numel(), what)
    return logits_MV.argmax(dim=-1)
