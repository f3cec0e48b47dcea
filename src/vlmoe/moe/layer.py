"""The sparse layer: router, dispatch, experts, combine.

Shape suffixes: N tokens · D width · E experts · K chosen experts of a token · R rows in expert order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmoe.config import ModalityConfig
from vlmoe.moe import balance
from vlmoe.moe.dispatch import PRIORITIES, Plan, combine, dispatch, plan_dispatch
from vlmoe.moe.experts import Experts
from vlmoe.moe.routing import Router, Routing, route

LOSSES: dict[str, Callable[[Routing, Tensor | None], Tensor]] = {
    "balance": balance.balance_loss,
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "z": balance.z_loss,
}


@dataclass
class RoutingStats:
    """What one forward pass did. Padding is left out of everything but the per-token fields.

    loss: the weighted sum of `losses`, with gradient; add it to the model's loss. losses: name -> unweighted scalar,
    detached, for each loss of weight above 0. load_E: choices of each expert before dropping (int64). importance_E:
    summed noise-free probabilities. dropped: choices dropped for capacity. tokens: real tokens. entropy: of a token's
    distribution over experts, mean, in nats. expert_index_NK, gate_NK, kept_NK: the choice of each token, best first;
    kept is False where dropped or padding. All but `loss` are detached; scalars stay on the device.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    load_E: Tensor
    importance_E: Tensor
    dropped: Tensor
    tokens: Tensor
    entropy: Tensor
    expert_index_NK: Tensor
    gate_NK: Tensor
    kept_NK: Tensor


class MoELayer(nn.Module):
    """A mixture of feed-forward experts in place of a dense layer: each token is served by the k experts its router
    prefers.

    width, hidden: of the layer and of each expert. activation, bias, inner_norm: of the experts, see `FeedForward`.
    renormalize: divide the k gates by their sum. noise: std of the noise on the logits in training, in units of
    1/experts. capacity_factor: an expert takes at most ceil(factor * k * tokens / experts) choices in training
    (capacity_factor_eval: in evaluation); None takes all. priority: who keeps a place, "batch" the largest gates,
    "arrival" the first tokens. balance, importance, load, z: weights of the losses in `vlmoe.moe.balance`. dropout: of
    the experts' hidden units, in training (ST-MoE's expert dropout).
    backend: how experts are computed, "loop", "padded", "grouped", or "auto" by device, dtype and shape; all give the
    same numbers.

    Raises:
        ValueError: an argument out of range; the message names it.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        k: int = 1,
        *,
        activation: str = "gelu",
        bias: bool = True,
        inner_norm: bool = False,
        renormalize: bool = False,
        noise: float = 1.0,
        capacity_factor: float | None = None,
        capacity_factor_eval: float | None = None,
        priority: str = "batch",
        balance: float = 0.01,
        importance: float = 0.0,
        load: float = 0.0,
        z: float = 0.001,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.experts = Experts(width, hidden, experts, activation, bias, inner_norm, dropout, backend)
        self.router = Router(width, experts)
        if not 1 <= k <= experts:
            raise ValueError(f"k: expected 1 to experts ({experts}), got {k}")
        if priority not in PRIORITIES:
            raise ValueError(f"priority: expected one of {', '.join(PRIORITIES)}, got {priority!r}")
        for name, factor in (("capacity_factor", capacity_factor), ("capacity_factor_eval", capacity_factor_eval)):
            if factor is not None and not factor > 0:
                raise ValueError(f"{name}: expected a number above 0, or None for dropless, got {factor}")
        weights = {"balance": balance, "importance": importance, "load": load, "z": z}
        for name, value in {"noise": noise, **weights}.items():
            if not value >= 0:
                raise ValueError(f"{name}: expected a number not below 0, got {value}")
        if load > 0 and noise == 0:
            raise ValueError("load: the load loss is defined by the router's noise; expected noise above 0, got 0")
        self.width, self.num_experts, self.k = width, experts, k
        self.renormalize, self.noise, self.priority = renormalize, noise, priority
        self.capacity_factor, self.capacity_factor_eval = capacity_factor, capacity_factor_eval
        self.loss_weights = weights

    @classmethod
    def from_config(cls, width: int, hidden: int, activation: str, inner_norm: bool, side: ModalityConfig) -> MoELayer:
        """The layer a recipe describes."""
        options = vars(side.router) | {"dropout": side.expert_dropout}
        return cls(width, hidden, side.experts, activation=activation, inner_norm=inner_norm, **options)

    def reset_parameters(self) -> None:
        """Draw all weights anew; gives values to a module built on the meta device after `to_empty`."""
        self.experts.reset_parameters()
        self.router.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """y of x's shape (..., D), zero at padding, and how it was routed. mask: bool (...), False at padding.

        Under autocast the experts run in autocast's dtype, which y then has; the router and the losses stay in float32.

        Raises:
            ValueError: a shape or mask dtype that does not fit; the message says what was expected.
        """
        self._check(x, mask)
        x_ND = x.reshape(-1, self.width)
        mask_N = None
        if mask is not None:
            mask_N = mask.reshape(-1)
            x_ND = x_ND.masked_fill(~mask_N[:, None], 0)  # padding may hold anything, nan included
        noise_std = self.noise / self.num_experts if self.training else 0.0
        routing = route(self.router(x_ND), self.k, noise_std=noise_std, renormalize=self.renormalize)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.experts.w1.dtype
        plan = plan_dispatch(
            routing,
            mask_N,
            capacity_factor=self.capacity_factor if self.training else self.capacity_factor_eval,
            priority=self.priority,
            slots=self.experts.slots(dtype),
        )
        with torch.autocast(device, enabled=False):
            y_RD = self.experts(dispatch(x_ND.to(dtype), plan), plan)
            y_ND = combine(y_RD, routing.gate_NK, plan)
        return y_ND.view(x.shape), self._stats(routing, mask_N, plan)

    def _stats(self, routing: Routing, mask_N: Tensor | None, plan: Plan) -> RoutingStats:
        losses = {
            name: LOSSES[name](routing, mask_N)
            for name, weight in self.loss_weights.items()
            if weight > 0 and not (name == "load" and routing.noise_std == 0)  # evaluation has no noise
        }
        loss = routing.logits_NE.new_zeros(())
        for name, value in losses.items():
            loss = loss + self.loss_weights[name] * value
        with torch.no_grad():
            load_E = balance.load_of(routing, mask_N)
            kept_NK = plan.kept_NK
            if kept_NK is None:
                kept_NK = torch.ones_like(routing.expert_index_NK, dtype=torch.bool)
            return RoutingStats(
                loss=loss,
                losses={name: value.detach() for name, value in losses.items()},
                load_E=load_E,
                importance_E=balance.importance_of(routing, mask_N),
                dropped=load_E.sum() - kept_NK.sum(),
                tokens=balance.count_tokens(routing, mask_N),
                entropy=balance.gate_entropy(routing, mask_N),
                expert_index_NK=routing.expert_index_NK,
                gate_NK=routing.gate_NK.detach(),
                kept_NK=kept_NK,
            )

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.ndim < 1 or x.shape[-1] != self.width:
            raise ValueError(f"x: expected shape (..., {self.width}), got {tuple(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool of shape {tuple(x.shape[:-1])}, got {mask.dtype} of {tuple(mask.shape)}"
            )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}, backend={self.experts.backend}"
