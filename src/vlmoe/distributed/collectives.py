"""Rows to other processes and back.

Every process of a group must call these, in the same order, with or without rows: one that does not leaves all others
waiting. The backward pass calls them too, so outputs must enter the loss on every process, if with a weight of zero.

Shape suffixes: P processes · S rows to send · R rows received · D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def exchange_counts(count_PX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row p goes to process p; row p of what comes back is from process p."""
    found_PX = torch.empty_like(count_PX)
    dist.all_to_all_single(found_PX, count_PX.contiguous(), group=group)
    return found_PX


def exchange_rows(x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """The first sent[0] rows go to process 0, the next sent[1] to process 1, ...; the result has received[0] rows from
    process 0 first. With gradient, which goes the way back."""
    return _Exchange.apply(x_SD, sent, received, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = sent, received, group
        return _all_to_all(x_SD, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _all_to_all(grad_RD, received, sent, group), None, None, None


def _all_to_all(x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    found_RD = x_SD.new_empty(sum(received), *x_SD.shape[1:])
    dist.all_to_all_single(found_RD, x_SD.contiguous(), received, sent, group=group)
    return found_RD
