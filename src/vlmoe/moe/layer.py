"""The sparse layer: router, dispatcher, experts, and back. Each is an object that may be replaced.

Shape suffixes: N tokens · D width · E experts · K chosen experts of a token · R rows in expert order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe.moe import balance
from vlmoe.moe.capacity import PRIORITIES, keep_choices
from vlmoe.moe.dispatch import Dispatcher, Groups, LocalDispatcher
from vlmoe.moe.experts import Experts, FeedForward
from vlmoe.moe.routers import LEARNED, ROUTERS, ExpertChoiceRouter, HashRouter, Router
from vlmoe.moe.routing import Routing

LOSSES: dict[str, Callable[..., Tensor]] = {
    "balance": balance.balance_loss,
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "z": balance.z_loss,
    "local_entropy": balance.gate_entropy,
    "global_entropy": balance.global_entropy_loss,
}
SCOPES = ("pass", "micro", "step", "global")


@dataclass
class Sums:
    """What a balance loss over more than one pass is made of: summed probabilities with gradient, and the weight."""

    probability_E: Tensor
    weight: float
    scope: str


@dataclass
class RoutingStats:
    """What one forward pass did. Padding is left out of everything but the per-token fields.

    loss: the weighted sum of `losses`, with gradient; add it to the model's loss. losses: name -> unweighted scalar,
    detached, for each loss of weight above 0. load_E: choices of each expert before dropping (int64). tokens: real
    tokens. expert_index_NK, gate_NK, kept_NK: the choice of each token, best first; kept is False where dropped or
    padding. All but `loss`, `balance` and `routing` are detached; scalars stay on the device. balance: set when the
    balance loss spans more than this pass: then it is not in `loss`, and who joins the passes adds it
    (`balance.balance_of`). routing, mask_N: what the measures below are of; each costs a look at all tokens, so it is
    taken when asked for.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    load_E: Tensor
    tokens: Tensor
    expert_index_NK: Tensor
    gate_NK: Tensor
    kept_NK: Tensor
    routing: Routing
    mask_N: Tensor | None
    balance: Sums | None = None

    @property
    def dropped(self) -> Tensor:
        """Choices dropped for capacity."""
        return self.load_E.sum() - self.kept_NK.sum()

    @property
    def unserved(self) -> Tensor:
        """Real tokens left with no expert."""
        return self.tokens - self.kept_NK.any(dim=1).sum()

    @property
    @torch.no_grad()
    def importance_E(self) -> Tensor:
        """Summed noise-free probabilities."""
        return balance.importance_of(self.routing, self.mask_N)

    @property
    @torch.no_grad()
    def entropy(self) -> Tensor:
        """Of a token's distribution over experts, mean, in nats."""
        return balance.gate_entropy(self.routing, self.mask_N)

    @property
    @torch.no_grad()
    def logit_size(self) -> Tensor:
        """Root mean square of the noise-free logits."""
        return balance.logit_size(self.routing, self.mask_N)


class MoELayer(nn.Module):
    """A mixture of feed-forward experts in place of a dense layer: each token is served by the k experts its router
    prefers.

    width, hidden: of the layer and of each expert. activation, bias, inner_norm: of the experts, see `FeedForward`.
    shared: so many experts more that serve every token, with gate 1 (DeepSeekMoE). common: so many experts more that
    the router may choose, which are another module's: `forward` gets them. router: a type of `vlmoe.moe.routers`.
    bias_rate: step of the selection bias (`Router.balance`), 0 for none.
    renormalize: divide the k gates by their sum, which with k = 1 would leave the router without a gradient from the
    task and is refused. noise: std of the noise on the logits in training, in units of
    1/experts. capacity_factor: an expert takes at most ceil(factor * k * tokens / experts) choices in training
    (capacity_factor_eval: in evaluation); None takes all. priority: who keeps a place, "batch" the largest gates,
    "arrival" the first tokens, "first_batch" and "first_arrival" the same after all better choices (`keep_choices`).
    balance, importance, load, z, local_entropy, global_entropy: weights of the losses in
    `vlmoe.moe.balance`; global_experts is the last one's threshold. balance_over: what the balance loss is computed
    over, one "pass" of this layer, or more (see `RoutingStats.balance`). dropout: of the experts' hidden units, in
    training (ST-MoE's expert dropout).
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
        shared: int = 0,
        common: int = 0,
        router: str = "softmax",
        bias_rate: float = 0.0,
        renormalize: bool = False,
        noise: float = 1.0,
        capacity_factor: float | None = None,
        capacity_factor_eval: float | None = None,
        priority: str = "batch",
        balance: float = 0.01,
        importance: float = 0.0,
        load: float = 0.0,
        z: float = 0.001,
        local_entropy: float = 0.0,
        global_entropy: float = 0.0,
        global_experts: float | None = None,
        balance_over: str = "pass",
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.experts = Experts(width, hidden, experts, activation, bias, inner_norm, dropout, backend)
        total = experts + common
        if not 1 <= k <= total:
            raise ValueError(f"k: expected 1 to experts ({total}), got {k}")
        if router not in ROUTERS:
            raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {router!r}")
        if balance_over not in SCOPES:
            raise ValueError(f"balance_over: expected one of {', '.join(SCOPES)}, got {balance_over!r}")
        for name, count in (("shared", shared), ("common", common)):
            if count < 0:
                raise ValueError(f"{name}: expected a number of experts, not below 0, got {count}")
        self.shared = FeedForward(width, shared * hidden, activation, bias, inner_norm) if shared else None
        if priority not in PRIORITIES:
            raise ValueError(f"priority: expected one of {', '.join(PRIORITIES)}, got {priority!r}")
        for name, factor in (("capacity_factor", capacity_factor), ("capacity_factor_eval", capacity_factor_eval)):
            if factor is not None and not factor > 0:
                raise ValueError(f"{name}: expected a number above 0, or None for dropless, got {factor}")
        weights = {"balance": balance, "importance": importance, "load": load, "z": z}
        weights |= {"local_entropy": local_entropy, "global_entropy": global_entropy}
        for name, value in {"noise": noise, "bias_rate": bias_rate, **weights}.items():
            if not value >= 0:
                raise ValueError(f"{name}: expected a number not below 0, got {value}")
        if load > 0 and noise == 0:
            raise ValueError("load: the load loss is defined by the router's noise; expected noise above 0, got 0")
        if renormalize and k == 1 and router in LEARNED:
            raise ValueError("renormalize: one gate divided by itself is 1 whatever the router says, so the router "
                             "would get no gradient from the task; expected k above 1, or False")  # fmt: skip
        if global_experts is not None and not 1 <= global_experts <= total:
            raise ValueError(f"global_experts: expected 1 to experts ({total}), got {global_experts}")
        options: dict[str, Any] = {"renormalize": renormalize, "noise": noise / total, "bias_rate": bias_rate}
        if router == "expert_choice":  # its capacity is the choice itself, and even by construction
            options["factor"] = capacity_factor or 1.0
            capacity_factor = capacity_factor_eval = None
        self.router: Router = ROUTERS[router](width, total, k, **options)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.width, self.num_experts, self.common, self.k, self.priority = width, total, common, k, priority
        self.capacity_factor, self.capacity_factor_eval = capacity_factor, capacity_factor_eval
        if isinstance(self.router, HashRouter):
            weights = {}
        if isinstance(self.router, ExpertChoiceRouter):
            weights = {"z": z}
        self.loss_weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.global_experts, self.balance_over = global_experts, balance_over
        self.pressure = 1.0  # a factor on the routing losses, which training may raise while routing is not healthy

    def reset_parameters(self) -> None:
        """Draw all weights anew; gives values to a module built on the meta device after `to_empty`."""
        self.experts.reset_parameters()
        self.router.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, common: Experts | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """y of x's shape (..., D), zero at padding, and how it was routed. mask: bool (...), False at padding. common:
        the experts that follow the layer's own in the router's count.

        Experts run in x's dtype, under autocast in its dtype, which y then has; the router and the losses stay in
        float32.

        Raises:
            ValueError: a shape or mask dtype that does not fit; the message says what was expected.
        """
        self._check(x, mask, common)
        x_ND = x.reshape(-1, self.width)
        mask_N = None
        if mask is not None:
            mask_N = mask.reshape(-1)
            x_ND = x_ND.masked_fill(~mask_N[:, None], 0)  # padding may hold anything, nan included
        routing: Routing = self.router(x_ND, mask_N)
        factor = self.capacity_factor if self.training else self.capacity_factor_eval
        kept_NK = keep_choices(routing, mask_N, factor, self.priority)
        dtype = dtype_for(x)
        with torch.autocast(x.device.type, enabled=False):
            x_RD, groups, ticket = self.dispatcher.dispatch(x_ND.to(dtype), routing, kept_NK, self.experts.slots())
            y_ND = self.dispatcher.combine(self._serve(x_RD, groups, common), routing.gate_NK, ticket)
            if self.shared is not None:
                y_ND = y_ND + self.shared(x_ND.to(dtype))  # cast again: gradients add up in x's dtype
        if self.shared is not None and mask_N is not None:
            y_ND = y_ND.masked_fill(~mask_N[:, None], 0)
        return y_ND.view(x.shape), self._stats(routing, mask_N, kept_NK)

    def _serve(self, x_RD: Tensor, groups: Groups, common: Experts | None) -> Tensor:
        if common is None:
            return self.experts(x_RD, groups)
        own, others = groups.split(self.experts.held)
        return torch.cat([self.experts(x_RD[: own.rows], own), common(x_RD[own.rows :], others)])

    def _stats(self, routing: Routing, mask_N: Tensor | None, kept_NK: Tensor | None) -> RoutingStats:
        losses, loss = {}, routing.logits_NE.new_zeros(())
        for name, weight in self.loss_weights.items():
            if name == "load" and routing.noise_std == 0:  # evaluation has no noise
                continue
            options = {"experts": self.global_experts} if name == "global_entropy" else {}
            losses[name] = LOSSES[name](routing, mask_N, **options)
            if name != "balance" or self.balance_over == "pass":
                loss = loss + weight * losses[name]
        loss = loss * self.pressure
        sums = None
        if "balance" in losses and self.balance_over != "pass":
            weight = self.loss_weights["balance"] * self.pressure
            sums = Sums(balance.probability_of(routing, mask_N), weight, self.balance_over)
        if kept_NK is None:
            kept_NK = torch.ones_like(routing.expert_index_NK, dtype=torch.bool)
        return RoutingStats(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            load_E=balance.load_of(routing, mask_N),
            tokens=balance.count_tokens(routing, mask_N),
            expert_index_NK=routing.expert_index_NK,
            gate_NK=routing.gate_NK.detach(),
            kept_NK=kept_NK,
            routing=routing,
            mask_N=mask_N,
            balance=sums,
        )

    def _check(self, x: Tensor, mask: Tensor | None, common: Experts | None) -> None:
        if x.ndim < 1 or x.shape[-1] != self.width:
            raise ValueError(f"x: expected shape (..., {self.width}), got {tuple(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool of shape {tuple(x.shape[:-1])}, got {mask.dtype} of {tuple(mask.shape)}"
            )

        if (0 if common is None else common.num_experts) != self.common:
            raise ValueError(f"common: expected {self.common} experts, got {common}")

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}, backend={self.experts.backend}"


def dtype_for(x: Tensor) -> torch.dtype:
    """What x is computed in: autocast's dtype, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
