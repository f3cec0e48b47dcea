"""What stands between the layer and its experts: objects that can be replaced, and weights that may lie elsewhere."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.own_forward import only_in_own_forward
from vlmoe.moe import ROUTERS, Experts, LocalDispatcher, MoELayer, SoftMoELayer, replay_context_fn
from vlmoe.moe.dispatch import Groups, Plan, Slots
from vlmoe.moe.routing import Routing

D, H, E = 8, 12, 4


def make(router: str, **options: Any) -> MoELayer:
    torch.manual_seed(0)
    made = (
        SoftMoELayer(D, H, E, slots=2, **options) if router == "soft" else MoELayer(D, H, E, router=router, **options)
    )
    with torch.no_grad():
        made.router.weight.mul_(50)
        for p in made.experts.parameters():
            p.normal_(std=0.3)
    return made.double()


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize("router", [*ROUTERS, "soft"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_parameter_is_read_outside_its_own_forward(router: str, backend: str, autocast: bool) -> None:
    """Also in the backward pass, where activation checkpointing runs forward again."""
    extra: dict[str, Any] = {} if router == "soft" else {"common": 2, "k": 2, "capacity_factor": 0.8}
    moe = make(router, shared=1, inner_norm=True, backend=backend, **extra)
    both = nn.ModuleList([moe] if router == "soft" else [moe, Experts(D, H, 2, inner_norm=True).double()])
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 9) > 0.3
    with only_in_own_forward(both), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, stats = checkpoint(moe, x, mask, *both[1:], use_reentrant=False, context_fn=replay_context_fn)
        (y.float().square().sum() + stats.loss).backward()
    learns = {n for n, p in both.named_parameters() if p.grad is not None}
    assert learns == {n for n, p in both.named_parameters() if p.requires_grad}


def test_a_parameter_read_from_outside_is_found() -> None:
    class Curious(MoELayer):
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(args[0].to(self.experts.w1.dtype), **options)

    moe = Curious(D, H, E)
    with pytest.raises(AssertionError, match=r"Experts\.w1 is read outside"), only_in_own_forward(moe):
        moe(torch.randn(3, D))


@dataclass
class Elsewhere(LocalDispatcher):
    """Takes tokens to experts that stand in another order, as those of other processes may."""

    order: list[int]

    def dispatch(
        self, x_ND: Tensor, routing: Routing, kept_NK: Tensor | None, slots: Slots | None
    ) -> tuple[Tensor, Groups, Plan]:
        place_E = torch.tensor(self.order).argsort()
        moved = replace(routing, expert_index_NK=place_E[routing.expert_index_NK])
        return super().dispatch(x_ND, moved, kept_NK, slots)


@pytest.mark.parametrize("options", [{}, {"k": 2, "capacity_factor": 0.7}, {"router": "expert_choice"}], ids=str)
@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_dispatcher_and_experts_may_be_replaced(options: dict[str, Any], backend: str) -> None:
    order = [2, 0, 3, 1]
    moe = make(**{"router": "softmax", "backend": backend} | options)
    other = make(**{"router": "softmax", "backend": backend} | options)
    other.dispatcher = Elsewhere(order)
    with torch.no_grad():
        for p in other.experts.parameters():
            p.copy_(p[order])
    x, found = torch.randn(30, D, dtype=torch.float64), []
    for layer in (moe, other):
        torch.manual_seed(7)
        z = x.clone().requires_grad_()
        y, stats = layer(z)
        (y.sin().sum() + stats.loss).backward()
        found.append([y, z.grad, stats.load_E, stats.kept_NK, layer.router.weight.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(moe.experts.parameters(), other.experts.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad[order], theirs.grad)
