"""Routers: modules that turn tokens into a `Routing`. One protocol, `router(x_ND, mask_N) -> Routing`.

| type | choice | source |
|-|-|-|
| softmax | token's k largest logits of a linear map, gates by softmax | Shazeer et al. 2017, V-MoE |
| sigmoid | the same, each gate by its own sigmoid | DeepSeek-V3 |
| cosine | the same, logits are cosines in a small space over a learned temperature | X-MoE, Tutel |
| expert_choice | each expert's best tokens | Zhou et al. 2022 |
| hash | fixed random projection, equal gates: learns nothing, the baseline | after Roller et al. 2021 |

Soft MoE has no choice to make and is a layer of its own (`vlmoe.moe.soft`). Logits are float32 or better whatever
autocast says: bfloat16 logits flip choices and blunt the softmax (ST-MoE, section 3).

Shape suffixes: N tokens · D width · E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.moe.routing import Routing, choose_tokens, route

ROUTER_INIT_STD = 0.02
MAX_SCALE = 100.0  # of the cosine router: temperature 0.01


class Router(nn.Module):
    """A linear map to logits; each token takes the k best, gates by softmax.

    noise: std of the noise on the logits in training. bias_rate: step of the selection bias that `balance` moves
    against the load; 0: there is none.
    """

    scores = "softmax"
    bias_E: Tensor

    def __init__(
        self, width: int, experts: int, k: int = 1, *, renormalize: bool = False, noise: float = 0.0,
        bias_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.k, self.renormalize, self.noise, self.bias_rate = k, renormalize, noise, bias_rate
        self.weight = nn.Parameter(torch.empty(experts, width))
        if bias_rate > 0:
            self.register_buffer("bias_E", torch.zeros(experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=ROUTER_INIT_STD)
        if self.bias_rate > 0:
            self.bias_E.zero_()

    def logits(self, x_ND: Tensor) -> Tensor:
        """logits_NE of x_ND, which is float32 or better."""
        return x_ND @ self.weight.to(x_ND.dtype).t()

    def forward(self, x_ND: Tensor, mask_N: Tensor | None = None) -> Routing:
        """mask_N: False at padding. Autocast is switched off for the logits."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return self.choose(self.logits(x_ND.to(dtype)), mask_N)

    def choose(self, logits_NE: Tensor, mask_N: Tensor | None) -> Routing:
        bias_E = self.bias_E if self.bias_rate > 0 else None
        return route(
            logits_NE, self.k, noise_std=self._noise(), renormalize=self.renormalize, scores=self.scores, bias_E=bias_E
        )

    @torch.no_grad()
    def balance(self, load_E: Tensor, scale: Tensor | float = 1.0) -> None:
        """Move the selection bias by `bias_rate` against the sign of each expert's excess load (Wang et al. 2024).

        load_E: choices of the whole step. Called once a step, after the update. scale: 0 leaves the bias as it is. A
        frozen router's stays too.
        """
        if self.bias_rate > 0 and self.weight.requires_grad:
            load_E = load_E.to(self.bias_E.dtype)
            self.bias_E += self.bias_rate * scale * (load_E.mean() - load_E).sign()

    def _noise(self) -> float:
        return self.noise if self.training else 0.0


class SigmoidRouter(Router):
    """Each gate is its expert's own sigmoid score: experts do not compete for a token's probability."""

    scores = "sigmoid"


class CosineRouter(Router):
    """Logits are cosines between the projected token and a learned direction for each expert, over a temperature: the
    size of neither grows the logits (Chi et al. 2022, X-MoE)."""

    def __init__(self, width: int, experts: int, k: int = 1, **options: object) -> None:
        dim = min(width, 256)
        super().__init__(dim, experts, k, **options)  # type: ignore[arg-type]
        self.project = nn.Parameter(torch.empty(dim, width))
        self.log_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "project"):  # not yet when the base class's constructor calls this
            nn.init.normal_(self.project, std=self.project.shape[1] ** -0.5)
            self.log_scale.fill_(math.log(2))

    def logits(self, x_ND: Tensor) -> Tensor:
        directions_ED = F.normalize(self.weight.to(x_ND.dtype), dim=-1)
        x_ND = F.normalize(x_ND @ self.project.to(x_ND.dtype).t(), dim=-1)
        scale = self.log_scale.to(x_ND.dtype).exp().clamp_max(MAX_SCALE)
        return scale * (x_ND @ directions_ED.t())


class ExpertChoiceRouter(Router):
    """Each expert takes its best tokens; `factor` is the capacity factor, 1 gives the compute of token choice."""

    def __init__(self, width: int, experts: int, k: int = 1, *, factor: float = 1.0, **options: object) -> None:
        super().__init__(width, experts, k, **options)  # type: ignore[arg-type]
        self.factor = factor

    def choose(self, logits_NE: Tensor, mask_N: Tensor | None) -> Routing:
        return choose_tokens(logits_NE, self.k, mask_N, factor=self.factor, noise_std=self._noise())


class HashRouter(Router):
    """Experts by a fixed random projection of the token, all k gates 1/k: nothing is learned, similar tokens meet."""

    def __init__(self, width: int, experts: int, k: int = 1, **options: object) -> None:
        super().__init__(width, experts, k, **options)  # type: ignore[arg-type]
        self.weight.requires_grad_(False)

    def choose(self, logits_NE: Tensor, mask_N: Tensor | None) -> Routing:
        found = route(logits_NE, self.k)
        gate_NK = torch.full_like(found.gate_NK, 1 / self.k)
        return Routing(found.expert_index_NK, gate_NK, logits_NE, logits_NE, found.probs_NE, 0.0)


ROUTERS: dict[str, type[Router]] = {
    "softmax": Router,
    "sigmoid": SigmoidRouter,
    "cosine": CosineRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
}
LEARNED = ("softmax", "sigmoid", "cosine")  # the task's gradient reaches them through the gates of the chosen experts
