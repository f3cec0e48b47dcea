"""What a model is fed: a batch of one kind, as tensors.

Shape suffixes: B batch · P patches · T text tokens · H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # target of a position that is not predicted


@dataclass
class Batch:
    """Samples of one kind. Image fields are None for texts, text fields are None for images.

    image_BCHW: uint8. patch_mask_BP: True where the patch is hidden and must be predicted. codes_BP: precomputed
    visual codes, when the data carries them. text_BT: token ids, hidden ones already replaced by the mask token.
    valid_BT: True at real tokens, False at padding. target_BT: the true id where a token is hidden, IGNORE elsewhere.
    hidden_patch_M, hidden_token_M: where patches and tokens are hidden, as numbers in the flattened (B, P) and (B, T);
    found when the batch leaves the host, because a device would have to be waited for.
    label_B: a task's classes, int64 (B,), -1 where unknown; or its answers' scores, float32 (B, L).
    keys: one per sample. patch_factors, token_factors: factor name -> value in words per patch / token, one list per
    sample; empty unless asked for.
    """

    keys: list[str] = field(default_factory=list)
    image_BCHW: Tensor | None = None
    patch_mask_BP: Tensor | None = None
    codes_BP: Tensor | None = None
    text_BT: Tensor | None = None
    valid_BT: Tensor | None = None
    target_BT: Tensor | None = None
    label_B: Tensor | None = None
    hidden_patch_M: Tensor | None = None
    hidden_token_M: Tensor | None = None
    patch_factors: list[dict[str, list[str]]] = field(default_factory=list)
    token_factors: list[dict[str, list[str]]] = field(default_factory=list)

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        return self._located()._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._located()._each(Tensor.pin_memory)

    def head(self, n: int) -> Batch:
        """A copy of the first n samples, without the factors and the hidden positions."""
        bare = replace(self, keys=self.keys[:n], patch_factors=[], token_factors=[])
        bare.hidden_patch_M = bare.hidden_token_M = None
        return bare._each(lambda tensor: tensor[:n].clone())

    def hidden_patches(self) -> Tensor:
        """`hidden_patch_M`, found now where it was not before."""
        assert self.patch_mask_BP is not None
        return _where(self.patch_mask_BP) if self.hidden_patch_M is None else self.hidden_patch_M

    def hidden_tokens(self) -> Tensor:
        """`hidden_token_M`, found now where it was not before."""
        assert self.target_BT is not None
        return _where(self.target_BT != IGNORE) if self.hidden_token_M is None else self.hidden_token_M

    def _located(self) -> Batch:
        return replace(
            self,
            hidden_patch_M=None if self.patch_mask_BP is None else self.hidden_patches(),
            hidden_token_M=None if self.target_BT is None else self.hidden_tokens(),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)

    def __len__(self) -> int:
        return len(self.keys)


def _where(hidden: Tensor) -> Tensor:
    return hidden.flatten().nonzero().flatten()
