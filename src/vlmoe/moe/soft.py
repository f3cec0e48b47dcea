"""Soft mixture of experts: no choice, every expert works on mixtures of a sequence's tokens (Puigcerver et al. 2023).

Shape suffixes: B sequences · T tokens · D width · E experts · P slots of an expert · S = E*P slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.moe.balance import logit_size
from vlmoe.moe.dispatch import Groups
from vlmoe.moe.experts import Experts
from vlmoe.moe.layer import MoELayer, RoutingStats, dtype_for
from vlmoe.moe.routing import Routing


class SoftRouter(nn.Module):
    """Logits of tokens against slots: cosines times a learned scale, which keeps the softmax useful at any width."""

    def __init__(self, width: int, experts: int, slots: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts * slots, width))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        self.scale.fill_(1.0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """logits_BTS, float32 or better."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            slots_SD = self.scale.to(dtype) * F.normalize(self.weight.to(dtype), dim=-1)
            return F.normalize(x_BTD.to(dtype), dim=-1) @ slots_SD.t() * x_BTD.shape[-1] ** 0.5


class SoftMoELayer(MoELayer):
    """`MoELayer` in everything but the choice: each slot is a mixture of a sequence's tokens (softmax over tokens),
    each token a mixture of the slots' outputs (softmax over slots).

    slots: of each expert, for each sequence. Compute follows slots, not tokens: experts * slots = k * tokens costs what
    top-k does. A token sees all others of its sequence, so the layer cannot write text from left to right. In the
    statistics a token counts for the expert that gives most of its output, with that expert's weight as its gate.
    """

    def __init__(self, width: int, hidden: int, experts: int, k: int = 1, *, slots: int = 1, **options: object) -> None:
        options["renormalize"] = False  # there are no k gates
        super().__init__(width, hidden, experts, k, **options)  # type: ignore[arg-type]
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        self.slots = slots
        self.router = SoftRouter(width, experts, slots)  # type: ignore[assignment]
        self.loss_weights = {}

    def forward(
        self, x: Tensor, mask: Tensor | None = None, common: Experts | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """x: (B, T, D) or (T, D), one sequence."""
        self._check(x, mask, common)
        x_BTD = x if x.ndim == 3 else x.reshape(1, -1, self.width)
        mask_BT = None if mask is None else mask.reshape(x_BTD.shape[:2])
        if mask_BT is not None:
            x_BTD = x_BTD.masked_fill(~mask_BT[..., None], 0)
        logits_BTS = self.router(x_BTD)
        mix_BTS = logits_BTS
        if mask_BT is not None:  # finite, so that a sequence of padding alone gives no nan: its tokens are zero
            mix_BTS = logits_BTS.masked_fill(~mask_BT[..., None], torch.finfo(logits_BTS.dtype).min)
        dispatch_BTS = mix_BTS.softmax(dim=1)
        combine_BTS = logits_BTS.softmax(dim=2)
        dtype = dtype_for(x)
        with torch.autocast(x.device.type, enabled=False):
            mixed_SBD = torch.einsum("bts,btd->sbd", dispatch_BTS, x_BTD.to(dispatch_BTS.dtype)).to(dtype)
            y_SBD = self._serve_mixed(mixed_SBD).to(combine_BTS.dtype)
            y_BTD = torch.einsum("bts,sbd->btd", combine_BTS, y_SBD).to(dtype)
            if self.shared is not None:
                y_BTD = y_BTD + self.shared(x_BTD.to(dtype))
        if mask_BT is not None:
            y_BTD = y_BTD.masked_fill(~mask_BT[..., None], 0)
        return y_BTD.view(x.shape), self._soft_stats(combine_BTS.detach(), mask_BT, logits_BTS)

    def _serve_mixed(self, mixed_SBD: Tensor) -> Tensor:
        """Every expert has its slots of all sequences, already in order."""
        E, each = self.num_experts, self.slots * mixed_SBD.shape[1]
        groups = Groups(torch.full((E,), each, device=mixed_SBD.device), [each] * E, E * each)
        x_RD, groups, ticket = self.dispatcher.send(mixed_SBD.flatten(0, 1), groups, self.experts.slots())
        return self.dispatcher.fetch(self.experts(x_RD, groups), ticket).view(mixed_SBD.shape)

    @torch.no_grad()
    def _soft_stats(self, combine_BTS: Tensor, mask_BT: Tensor | None, logits_BTS: Tensor) -> RoutingStats:
        share_NE = combine_BTS.flatten(0, 1).unflatten(1, (self.num_experts, self.slots)).sum(dim=2)
        mask_N = None if mask_BT is None else mask_BT.reshape(-1)
        real_N = share_NE.new_ones(len(share_NE), dtype=torch.bool) if mask_N is None else mask_N
        gate_N1, index_N1 = share_NE.max(dim=1, keepdim=True)
        log_NE = share_NE.clamp_min(torch.finfo(share_NE.dtype).tiny).log()  # logits whose softmax the shares are
        counted_N = real_N.to(torch.int64)
        return _SoftStats(
            loss=logits_BTS.new_zeros(()),
            losses={},
            load_E=counted_N.new_zeros(self.num_experts).scatter_add_(0, index_N1[:, 0], counted_N),
            tokens=counted_N.sum(),
            expert_index_NK=index_N1,
            gate_NK=gate_N1,
            kept_NK=real_N[:, None],
            routing=Routing(index_N1, gate_N1, log_NE, log_NE, share_NE, 0.0),
            mask_N=mask_N,
            logits_BTS=logits_BTS,
        )


@dataclass
class _SoftStats(RoutingStats):
    """The router's logits are those of slots."""

    logits_BTS: Tensor | None = None

    @property
    @torch.no_grad()
    def logit_size(self) -> Tensor:
        assert self.logits_BTS is not None
        return logit_size(replace(self.routing, logits_NE=self.logits_BTS.flatten(0, 1)), self.mask_N)
