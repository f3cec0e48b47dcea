"""Tokens to experts on other processes.

Which choices are kept, and the router's losses, are settled on the process that has the tokens: each micro-batch is
served as if its process had all experts. Experts get the gradients of every process's tokens, summed.

Shape suffixes: N tokens · K chosen experts of a token · D width · E experts · H experts held here · P processes ·
S rows of this process's tokens, by process and expert · G rows received, by process and expert · R rows by expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vlmoe.distributed.collectives import exchange_counts, exchange_rows
from vlmoe.moe.dispatch import Groups, Plan, Slots, lay_out, permute, unpermute
from vlmoe.moe.routing import Routing


@dataclass(frozen=True)
class Trip:
    """sent, received: rows to and from each process. plan: of the rows received, by expert."""

    sent: list[int]
    received: list[int]
    plan: Plan


class PeerDispatcher:
    """For experts dealt out over a group: process p of P has the p-th part of the layer's own experts, and of those
    that modalities have in common, which it computes after its own.

    Waits for the device twice in a pass: the sizes of messages must be known on the host.
    """

    def __init__(self, group: dist.ProcessGroup, own: int, common: int = 0) -> None:
        self.group, self.peers = group, dist.get_world_size(group)
        self.own, self.common = own // self.peers, common // self.peers  # on each process

    def dispatch(
        self, x_ND: Tensor, routing: Routing, kept_NK: Tensor | None, slots: Slots | None
    ) -> tuple[Tensor, Groups, tuple[Plan, Trip]]:
        index_NK = self._by_process(routing.expert_index_NK)
        plan = lay_out(index_NK, kept_NK, self.peers * (self.own + self.common), lambda need: need)
        x_RD, groups, trip = self.send(permute(x_ND, plan), plan.groups, slots)
        return x_RD, groups, (plan, trip)

    def combine(self, y_RD: Tensor, gate_NK: Tensor, ticket: tuple[Plan, Trip]) -> Tensor:
        plan, trip = ticket
        return unpermute(self.fetch(y_RD, trip), gate_NK, plan)

    def send(self, x_SD: Tensor, groups: Groups, slots: Slots | None) -> tuple[Tensor, Groups, Trip]:
        count_PH = groups.count_E.view(self.peers, -1)
        from_PH = exchange_counts(count_PH, self.group)
        sent, received = torch.stack([count_PH.sum(dim=1), from_PH.sum(dim=1)]).tolist()
        x_GD = exchange_rows(x_SD, sent, received, self.group)
        expert_PH = torch.arange(from_PH.shape[1], device=x_SD.device).expand_as(from_PH)
        expert_G = expert_PH.reshape(-1).repeat_interleave(from_PH.reshape(-1), output_size=len(x_GD))
        plan = lay_out(expert_G[:, None], None, from_PH.shape[1], slots)
        return permute(x_GD, plan), plan.groups, Trip(sent, received, plan)

    def fetch(self, y_RD: Tensor, ticket: Trip) -> Tensor:
        return exchange_rows(unpermute(y_RD, None, ticket.plan), ticket.received, ticket.sent, self.group)

    def _by_process(self, index_NK: Tensor) -> Tensor:
        """Experts renumbered: all of the first process, its own ones and then common ones; all of the second; ..."""
        if not self.common:
            return index_NK
        here, common_NK = self.own + self.common, index_NK - self.peers * self.own
        return torch.where(
            common_NK < 0,
            index_NK // self.own * here + index_NK % self.own,
            common_NK // self.common * here + self.own + common_NK % self.common,
        )
