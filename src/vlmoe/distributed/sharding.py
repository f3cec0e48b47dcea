"""Weights to processes: experts dealt out, everything cut.

Gradients are sums over processes and divided by nothing. So a loss must be a sum over the predictions of all processes
divided by their number, and each process adds its part of it. Dividing by the number of processes instead, which is
PyTorch's default, would leave the gradients of dealt experts too large by a factor of `ep`, without an error.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from vlmoe.config import UserError
from vlmoe.distributed.dispatcher import PeerDispatcher
from vlmoe.distributed.mesh import Mesh
from vlmoe.moe import Experts, MoELayer
from vlmoe.moe.experts import Weights


class ExpertShard(Experts):
    """The part of a stack of experts that this process computes.

    Parameters have the names and, as DTensors cut along the experts, the shapes of the whole stack.
    """

    def __init__(self, whole: Experts, ep: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.activation, self.inner_norm, self.dropout = whole.activation, whole.inner_norm, whole.dropout
        self.backend, self.num_experts, self.held = whole.backend, whole.num_experts, whole.num_experts // ep.size()
        first = self.held * ep.get_local_rank()
        for name in ("w1", "b1", "w2", "b2"):
            weight = getattr(whole, name)
            if weight is not None:
                part = weight.detach()[first : first + self.held].clone()
                dealt = DTensor.from_local(part, ep, [Shard(0)], run_check=False)
                weight = nn.Parameter(dealt, requires_grad=weight.requires_grad)
            self.register_parameter(name, weight)
        self.train(whole.training)

    def weights(self) -> Weights:
        b1, b2 = (None if b is None else b.to_local() for b in (self.b1, self.b2))  # type: ignore[attr-defined]
        return self.w1.to_local(), b1, self.w2.to_local(), b2  # type: ignore[attr-defined]


def deal_experts(module: nn.Module, ep: DeviceMesh) -> None:
    """Leave each process of `ep` its part of all experts in `module`, and let sparse layers send tokens to the others'.

    All processes must come with the same weights.

    Raises:
        UserError: the processes do not divide the experts of a layer.
    """
    stacks = [(p, name, c) for p in module.modules() for name, c in p.named_children() if isinstance(c, Experts)]
    for _, _, stack in stacks:
        if stack.num_experts % ep.size():
            raise UserError(f"{stack.num_experts} experts cannot be dealt out over {ep.size()} processes")
    for layer in [m for m in module.modules() if isinstance(m, MoELayer)]:
        layer.dispatcher = PeerDispatcher(ep.get_group(), layer.num_experts - layer.common, layer.common)
    for parent, name, stack in stacks:
        setattr(parent, name, ExpertShard(stack, ep))


def shard(module: nn.Module, mesh: Mesh, units: Iterable[nn.Module] = ()) -> None:
    """Deal out experts over `mesh.ep`, then cut all weights by FSDP. units: modules in `module` that are gathered one
    at a time, such as blocks; what is in none of them is gathered with `module`.

    All processes must come with the same weights. Afterwards parameters are DTensors but for scalars, which are copied;
    gradients are those of the losses of all processes added up.

    Raises:
        UserError: experts cannot be dealt out or cut evenly.
    """
    if mesh.ep.size() > 1:
        deal_experts(module, mesh.ep)
        for experts in [m for m in module.modules() if isinstance(m, ExpertShard)]:
            _check_even(experts, mesh.experts.size(mesh.experts.ndim - 1))
            _summed(fully_shard(experts, mesh=mesh.experts, shard_placement_fn=lambda p: Shard(1)))
    scalars = {p for p in module.parameters() if p.ndim == 0}  # FSDP takes none
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_hook(_sum_over_all)
    for unit in (*units, module):
        _summed(fully_shard(unit, mesh=mesh.dense, ignored_params=scalars))


def _check_even(experts: Experts, parts: int) -> None:
    for name, weight in experts.named_parameters():
        if weight.shape[1] % parts:
            raise UserError(
                f"experts' {name} of shape {tuple(weight.shape)} cannot be cut along its second dimension over {parts} "
                "processes; expected sizes that they divide"
            )


def _summed(module: FSDPModule) -> None:
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _sum_over_all(grad: Tensor) -> Tensor:
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad
