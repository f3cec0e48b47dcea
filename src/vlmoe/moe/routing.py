"""Which experts each token goes to, and with what weight: token-choice top-k routing.

Shape suffixes: N tokens · D width · E experts · K chosen experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROUTER_INIT_STD = 0.02


@dataclass(frozen=True)
class Routing:
    """The router's choice for N tokens.

    expert_index_NK: chosen experts, best first. gate_NK: their weights, with gradient. logits_NE: the router's output
    without noise. noisy_NE: the logits the choice was made on (logits_NE itself without noise). probs_NE: softmax of
    noisy_NE. noise_std: standard deviation of the noise in noisy_NE, 0 for none. All but the index are float32
    (float64 for float64 tokens).
    """

    expert_index_NK: Tensor
    gate_NK: Tensor
    logits_NE: Tensor
    noisy_NE: Tensor
    probs_NE: Tensor
    noise_std: float


def route(logits_NE: Tensor, k: int, *, noise_std: float = 0.0, renormalize: bool = False) -> Routing:
    """Each token takes its k experts of largest logit; gates are the softmax over all experts (V-MoE, eq. 2-4).

    noise_std adds that much Gaussian noise to the logits first. renormalize divides the k gates by their sum.
    The choice follows from the output of `argmax` or `topk` alone (see `vlmoe.moe.replay`).
    """
    noisy_NE = logits_NE + noise_std * torch.randn_like(logits_NE) if noise_std > 0 else logits_NE
    probs_NE = noisy_NE.softmax(dim=-1)
    chosen_from = noisy_NE.detach()
    # argmax is several times as fast as topk
    expert_index_NK = chosen_from.argmax(-1, keepdim=True) if k == 1 else chosen_from.topk(k, dim=-1).indices
    gate_NK = probs_NE.gather(-1, expert_index_NK)
    if renormalize:
        gate_NK = gate_NK / gate_NK.sum(dim=-1, keepdim=True)
    return Routing(expert_index_NK, gate_NK, logits_NE, noisy_NE, probs_NE, noise_std)


class Router(nn.Module):
    """A linear map from tokens to expert logits, always in float32 or better: bfloat16 logits flip choices and blunt
    the softmax (ST-MoE, section 3)."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=ROUTER_INIT_STD)

    def forward(self, x_ND: Tensor) -> Tensor:
        """logits_NE of x_ND; autocast is switched off for the product."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return x_ND.to(dtype) @ self.weight.to(dtype).t()
