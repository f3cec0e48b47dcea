"""Activation checkpointing that keeps the routing.

A recomputed forward pass may round differently, so that a token near a tie would choose another expert: shapes change
and the gradient belongs to another function. Which expert, which row and what is dropped follow from the outputs of
`ROUTING_OPS` alone, and these outputs are few integers: they are stored in the first pass and read back in the second.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ROUTING_OPS = (
    torch.ops.aten.argmax.default,
    torch.ops.aten.topk.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.aten.argsort.default,
    torch.ops.aten.argsort.stable,
)


def replay_context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=replay_context_fn)`: everything is
    recomputed but the outputs of `ROUTING_OPS`."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ROUTING_OPS else CheckpointPolicy.PREFER_RECOMPUTE
