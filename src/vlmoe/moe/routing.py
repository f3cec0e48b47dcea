"""Which experts each token goes to, and with what weight.

`route` is token choice: each token takes its k best experts. `choose_tokens` is expert choice: each expert takes its
best tokens. Both are pure functions of logits; `vlmoe.moe.routers` holds the modules that make logits.

Shape suffixes: N tokens · E experts · K chosen experts of a token · C tokens of an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The router's choice for N tokens.

    expert_index_NK: chosen experts, best first. gate_NK: their weights, with gradient. logits_NE: the router's output
    without noise. noisy_NE: the logits the choice was made on (logits_NE itself without noise). probs_NE: the
    probabilities of noisy_NE, see `probabilities`. noise_std: standard deviation of the noise in noisy_NE, 0 for none.
    All but the index are float32 (float64 for float64 tokens). scores: "softmax" or "sigmoid", which `probabilities`
    takes. chosen_NK: False where a token has fewer than K experts, which only expert choice leaves; None: all are used.
    bias_E: added to the scores for the choice, see `route`; None: there was none.
    """

    expert_index_NK: Tensor
    gate_NK: Tensor
    logits_NE: Tensor
    noisy_NE: Tensor
    probs_NE: Tensor
    noise_std: float
    scores: str = "softmax"
    chosen_NK: Tensor | None = None
    bias_E: Tensor | None = None


def probabilities(logits_NE: Tensor, scores: str = "softmax") -> Tensor:
    """A distribution over experts for each token: softmax, or sigmoid scores divided by their sum (DeepSeek-V3)."""
    if scores == "softmax":
        return logits_NE.softmax(dim=-1)
    score_NE = logits_NE.sigmoid()
    return score_NE / score_NE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(score_NE.dtype).tiny)


def route(
    logits_NE: Tensor,
    k: int,
    *,
    noise_std: float = 0.0,
    renormalize: bool = False,
    scores: str = "softmax",
    bias_E: Tensor | None = None,
) -> Routing:
    """Each token takes its k experts of largest logit; gates are the softmax over all experts (V-MoE, eq. 2-4).

    noise_std adds that much Gaussian noise to the logits first. renormalize divides the k gates by their sum. scores:
    "sigmoid" gates each expert by its own score. bias_E is added to the scores for the choice alone, the gates do not
    have it (Wang et al. 2024, auxiliary-loss-free balancing).
    The choice follows from the output of `argmax` or `topk` alone (see `vlmoe.moe.replay`).
    """
    noisy_NE = logits_NE + noise_std * torch.randn_like(logits_NE) if noise_std > 0 else logits_NE
    probs_NE = probabilities(noisy_NE, scores)
    score_NE = noisy_NE.sigmoid() if scores == "sigmoid" else probs_NE
    chosen_from = noisy_NE.detach() if bias_E is None else score_NE.detach() + bias_E
    # argmax is several times as fast as topk
    expert_index_NK = chosen_from.argmax(-1, keepdim=True) if k == 1 else chosen_from.topk(k, dim=-1).indices
    gate_NK = score_NE.gather(-1, expert_index_NK)
    if renormalize:
        gate_NK = gate_NK / gate_NK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(gate_NK.dtype).tiny)
    return Routing(expert_index_NK, gate_NK, logits_NE, noisy_NE, probs_NE, noise_std, scores, bias_E=bias_E)


def choose_tokens(
    logits_NE: Tensor, k: int, mask_N: Tensor | None = None, *, factor: float = 1.0, noise_std: float = 0.0
) -> Routing:
    """Each expert takes the ceil(factor * k * real tokens / E) tokens that give it the most (Zhou et al. 2022, expert
    choice); gates are the softmax over experts. Load is even by construction; a token may end with no expert or many,
    and its output depends on its company.
    """
    N, E = logits_NE.shape
    noisy_NE = logits_NE + noise_std * torch.randn_like(logits_NE) if noise_std > 0 else logits_NE
    probs_NE = noisy_NE.softmax(dim=-1)
    wish_NE = probs_NE.detach()
    if mask_N is not None:
        wish_NE = wish_NE.masked_fill(~mask_N[:, None], -1)
    C = min(N, math.ceil(N * factor * k / E - 1e-6))
    index_CE = wish_NE.topk(C, dim=0).indices
    taken_CE = torch.ones_like(index_CE, dtype=torch.bool)
    if mask_N is not None:  # how many tokens are real is only known on the device
        places = torch.ceil(mask_N.sum().double() * (factor * k / E) - 1e-6)
        taken_CE = (torch.arange(C, device=index_CE.device) < places)[:, None] & mask_N[index_CE]
    taken_NE = torch.zeros_like(wish_NE, dtype=torch.bool).scatter_(0, index_CE, taken_CE)
    K = max(1, int(taken_NE.sum(dim=1).max())) if N else 1
    expert_index_NK = wish_NE.masked_fill(~taken_NE, -2).topk(K, dim=-1).indices
    chosen_NK = taken_NE.gather(-1, expert_index_NK)
    gate_NK = probs_NE.gather(-1, expert_index_NK).masked_fill(~chosen_NK, 0)
    return Routing(expert_index_NK, gate_NK, logits_NE, noisy_NE, probs_NE, noise_std, chosen_NK=chosen_NK)
