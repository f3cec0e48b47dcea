"""Losses that keep experts in use and logits small. Pure functions of a `Routing` and a token mask.

mask_N is True at real tokens; padding never counts. Each loss is a scalar with gradient; over no tokens at all it is 0.

Shape suffixes: N tokens · E experts · K chosen experts of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmoe.moe.routing import Routing, probabilities


def count_tokens(routing: Routing, mask_N: Tensor | None) -> Tensor:
    """Real tokens: int64 scalar on the routing's device."""
    if mask_N is None:
        tokens, device = routing.logits_NE.shape[0], routing.logits_NE.device
        return torch.full((), tokens, dtype=torch.int64, device=device)  # no copy from the host, which would wait
    return mask_N.sum()


def load_of(routing: Routing, mask_N: Tensor | None) -> Tensor:
    """load_E: how many real tokens chose each expert, before any is dropped for capacity (int64)."""
    index_NK = routing.expert_index_NK
    counted_NK = routing.chosen_NK
    if mask_N is not None:
        real_NK = mask_N[:, None].expand_as(index_NK)
        counted_NK = real_NK if counted_NK is None else counted_NK & real_NK
    weight_NK = torch.ones_like(index_NK) if counted_NK is None else counted_NK.to(index_NK.dtype)
    load_E = index_NK.new_zeros(routing.logits_NE.shape[1])
    return load_E.scatter_add_(0, index_NK.reshape(-1), weight_NK.reshape(-1))  # bincount would wait for the GPU


def importance_of(routing: Routing, mask_N: Tensor | None) -> Tensor:
    """importance_E: the probabilities of the noise-free logits, summed over real tokens (V-MoE, eq. 6)."""
    return _sum(_clean(routing), mask_N)


def balance_loss(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e: f_e is expert e's share of the choices, P_e its mean probability (Switch, eq. 4-6; GShard).

    1 when balanced, E when collapsed, for any k: f sums to one. The gradient flows through P alone.
    """
    return balance_of(load_of(routing, mask_N), probability_of(routing, mask_N), count_tokens(routing, mask_N))


def probability_of(routing: Routing, mask_N: Tensor | None) -> Tensor:
    """probability_E: the probabilities the choice was made on, summed over real tokens, with gradient."""
    return _sum(routing.probs_NE, mask_N)


def balance_of(load_E: Tensor, probability_E: Tensor, tokens: Tensor) -> Tensor:
    """The balance loss from sums: so that choices and probabilities may be those of several passes, micro-batches or
    processes. tokens: how many `probability_E` is summed over."""
    load_E = load_E.to(probability_E.dtype)
    share_E = load_E / load_E.sum().clamp(min=1)
    return len(load_E) * (share_E * (probability_E / tokens.clamp(min=1))).sum()


def importance_loss(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' importance (V-MoE, eq. 7)."""
    return _squared_variation(importance_of(routing, mask_N))


def load_loss(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' expected load (V-MoE, eq. 8-10).

    A token counts for an expert with the probability that the expert would be among its top k were that expert's noise
    drawn again: 1 - Phi((threshold - logit) / std), the threshold being the noisy logit of the k-th expert chosen; with
    a selection bias, the logit at which the expert's biased score would equal that expert's (`_thresholds`).

    Raises:
        ValueError: the routing was made without noise, so the probability is not defined.
    """
    if routing.noise_std <= 0:
        raise ValueError("the load loss needs a routing made with noise (noise_std above 0), got 0")
    excess_NE = (routing.logits_NE - _thresholds(routing)) / routing.noise_std
    chance_NE = 0.5 * torch.erfc(excess_NE / -math.sqrt(2))  # erfc keeps small chances that 1 - cdf rounds to zero
    return _squared_variation(_mean(chance_NE, mask_N))


def _thresholds(routing: Routing) -> Tensor:
    """The logit, (N, 1) or (N, E), above which an expert is chosen before the k-th expert that was, all other noise as
    it is. With a selection bias the choice is by score plus bias, so it depends on how much larger the k-th expert's
    bias is: d. For sigmoid scores s(l) > s(l_k) + d. A softmax's scores all change with l: with S the sum of the other
    experts' exp(logit), (exp(l) - exp(l_k)) / (exp(l) + S) > d, so exp(l) > (exp(l_k) + d S) / (1 - d)."""
    last_N1 = routing.expert_index_NK[:, -1:]
    kth_N1 = routing.noisy_NE.gather(-1, last_N1)
    if routing.bias_E is None:
        return kth_N1
    tiny = torch.finfo(kth_N1.dtype).eps
    bias_E = routing.bias_E.to(kth_N1.dtype)
    d_NE = (bias_E[last_N1] - bias_E).clamp(max=1 - tiny)
    if routing.scores == "sigmoid":
        return (kth_N1.sigmoid() + d_NE).logit(eps=tiny)
    others_NE = _log_sum_of_others(routing.noisy_NE)
    ratio_NE = (others_NE - kth_N1).clamp(max=60).exp()
    return kth_N1 + (d_NE * ratio_NE).clamp(min=tiny - 1).log1p() - (-d_NE).log1p()


def _log_sum_of_others(logits_NE: Tensor) -> Tensor:
    """log(sum(exp(logit))) over all experts but each one. Quadratic in the experts, but a difference of sums would lose
    what stands beside a large logit."""
    E = logits_NE.shape[1]
    own_EE = torch.eye(E, dtype=torch.bool, device=logits_NE.device)
    return logits_NE[:, None, :].expand(-1, E, E).masked_fill(own_EE, -math.inf).logsumexp(dim=-1)


def z_loss(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """Mean of log(sum(exp(logits)))^2 over tokens (ST-MoE, eq. 5), on the noise-free logits."""
    return _mean(routing.logits_NE.logsumexp(dim=-1).square(), mask_N)


def gate_entropy(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """Mean entropy, in nats, of a token's distribution over experts, without noise; log(E) is no preference. With
    gradient it is LIMoE's local loss (Mustafa et al. 2022, eq. 3), which makes choices decided."""
    if routing.scores == "softmax":
        log_NE = routing.logits_NE.log_softmax(dim=-1)
        return _mean(-(log_NE.exp() * log_NE).sum(dim=-1), mask_N)
    return _mean(_entropy(_clean(routing)), mask_N)


def logit_size(routing: Routing, mask_N: Tensor | None = None) -> Tensor:
    """Root mean square of the noise-free logits: what grows before a router saturates."""
    return _mean(routing.logits_NE.square().mean(dim=-1), mask_N).sqrt()


def global_entropy_loss(routing: Routing, mask_N: Tensor | None = None, *, experts: float | None = None) -> Tensor:
    """max(0, log(experts) - H), H being the entropy of the tokens' mean distribution (LIMoE, eq. 4 and 5).

    experts: how many should at least be in use, LIMoE's threshold exp(tau); None: all of them.
    """
    mean_E = _mean(_clean(routing), mask_N)
    wanted = math.log(len(mean_E) if experts is None else experts)
    if mask_N is not None:  # over no tokens at all there is nothing to spread
        return (wanted - _entropy(mean_E)).clamp(min=0).masked_fill(~mask_N.any(), 0)
    return (wanted - _entropy(mean_E)).clamp(min=0)


def _clean(routing: Routing) -> Tensor:
    """The probabilities without noise."""
    return routing.probs_NE if routing.noise_std == 0 else probabilities(routing.logits_NE, routing.scores)


def _entropy(probs_E: Tensor) -> Tensor:
    """Over the last axis, in nats."""
    return -(probs_E * probs_E.clamp(min=torch.finfo(probs_E.dtype).tiny).log()).sum(dim=-1)


def _sum(values: Tensor, mask_N: Tensor | None) -> Tensor:
    if mask_N is None:
        return values.sum(dim=0)
    mask = mask_N if values.ndim == 1 else mask_N[:, None]
    return values.masked_fill(~mask, 0).sum(dim=0)  # not a product: padding may hold nan


def _mean(values: Tensor, mask_N: Tensor | None) -> Tensor:
    """Over real tokens."""
    if mask_N is None:
        return values.sum(dim=0) / max(len(values), 1)
    return _sum(values, mask_N) / mask_N.sum().clamp(min=1)


def _squared_variation(values_E: Tensor) -> Tensor:
    """(std / mean)^2 with the population's std, as published; the unbiased one is E/(E-1) times as large."""
    mean = values_E.mean()
    variance = values_E.var(correction=0)
    return variance / mean.square().clamp(min=torch.finfo(values_E.dtype).tiny)
