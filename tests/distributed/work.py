"""What the processes of the tests compute, and one process alone. Everything in float64, seeded, dropout off.

`spawn(world, folder)` starts the processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tests.distributed.processes import start
from tests.model.test_sizes import small, sparse
from vlmoe.distributed import deal_experts, make_mesh, shard
from vlmoe.distributed.collectives import exchange_rows
from vlmoe.model import Backbone
from vlmoe.moe import Experts, MoELayer, SoftMoELayer, replay_context_fn

D, H, E = 8, 12, 4
Found = dict[str, Tensor]


@dataclass
class Case:
    """A layer whose experts are dealt out, and what each process gives it: shape and share of padding."""

    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((3, 7), (2, 5))
    padding: tuple[float, ...] = (0.0, 0.0)
    sharp: float = 50.0  # of the router; 0: all tokens to expert 0
    recompute: bool = False
    frozen: bool = False

    def tokens(self, rank: int) -> tuple[Tensor, Tensor | None]:
        draw = torch.Generator().manual_seed(rank)
        x = torch.randn(*self.shapes[rank], D, generator=draw, dtype=torch.float64)
        mask = torch.rand(self.shapes[rank], generator=draw) >= self.padding[rank]
        return x, mask if self.padding[rank] else None

    def build(self) -> nn.ModuleList:
        """The layer and, where it has some, experts in common."""
        torch.manual_seed(0)
        options: dict[str, Any] = {"router": "softmax", "importance": 0.1, "load": 0.1} | self.options
        if options["router"] == "soft":
            layer: MoELayer = SoftMoELayer(D, H, E, slots=2, shared=options["shared"])
        else:
            layer = MoELayer(D, H, E, **options)
        both = nn.ModuleList([layer])
        if layer.common:
            both.append(Experts(D, H, layer.common, backend=layer.experts.backend))
        with torch.no_grad():
            for experts in (layer.experts, *both[1:]):
                for p in experts.parameters():
                    p.normal_(std=0.3)
            layer.router.weight.mul_(self.sharp)
        if self.frozen:
            layer.experts.requires_grad_(False)
        return both.double()

    def run(self, both: nn.ModuleList, rank: int) -> Found:
        """One forward and backward pass with a process's tokens."""
        x, mask = self.tokens(rank)
        x.requires_grad_()
        torch.manual_seed(100 + rank)
        args = (x, mask, *both[1:])
        if self.recompute:
            y, stats = checkpoint(both[0], *args, use_reentrant=False, context_fn=replay_context_fn)
        else:
            y, stats = both[0](*args)
        (y.sin().sum() + stats.loss).backward()
        assert x.grad is not None
        return {"y": y.detach(), "x": x.grad, "loss": stats.loss.detach(), "load": stats.load_E, "kept": stats.kept_NK}


CASES = {
    "top-1": Case(),
    "top-2": Case({"k": 2, "renormalize": True}),
    "top-3, swiglu": Case({"k": 3, "activation": "swiglu", "inner_norm": True, "bias": False}),
    "capacity": Case({"k": 2, "capacity_factor": 0.7}, padding=(0.0, 0.4)),
    "capacity, first choices first": Case({"k": 2, "capacity_factor": 0.7, "priority": "first_batch"}),
    "shared experts": Case({"k": 2, "shared": 2}, padding=(0.3, 0.3)),
    "common experts": Case({"k": 2, "common": 2, "capacity_factor": 0.9}),
    "padded": Case({"k": 2, "common": 2, "backend": "padded"}, padding=(0.3, 0.0)),
    "sigmoid": Case({"k": 2, "router": "sigmoid", "bias_rate": 0.1}),
    "expert choice": Case({"router": "expert_choice", "load": 0.0}),
    "hash": Case({"router": "hash", "k": 2, "load": 0.0}),
    "soft": Case({"router": "soft", "shared": 1}, padding=(0.3, 0.0)),
    "no tokens on one process": Case({"k": 2, "shared": 1}, shapes=((3, 7), (0, 5))),
    "no tokens at all": Case({"k": 2}, shapes=((0,), (0,))),
    "padding alone on one process": Case({"k": 2, "capacity_factor": 0.7}, padding=(1.0, 0.3)),
    "all tokens to one expert": Case({"noise": 0.0, "load": 0.0}, sharp=0.0),
    "recomputation": Case({"k": 2, "capacity_factor": 0.8, "shared": 1}, recompute=True),
    "frozen experts": Case({"k": 2}, frozen=True),
}


class Net(nn.Module):
    """A backbone with both modalities sparse, experts in common, shared ones and a router that has a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = sparse(small(common_experts=4, sub_ln=True, recompute=True))
        for side in (config.vision, config.text):
            side.router.k, side.shared_experts, side.router.type = 2, 1, "cosine"
        self.backbone = Backbone(config)
        with torch.no_grad():
            for p in self.backbone.parameters():
                p.mul_(2)
        self.double()

    def forward(self, image_BCHW: Tensor, text_BT: Tensor, lone_BT: Tensor) -> Tensor:
        """The loss of pairs, and of texts alone."""
        pair = self.backbone([self.backbone.image(image_BCHW), self.backbone.text(text_BT)])
        lone = self.backbone([self.backbone.text(lone_BT)])
        routing = [s.loss for out in (pair, lone) for s in out.stats.values()]
        return pair.x_BTD.sin().sum() + lone.x_BTD.cos().sum() + torch.stack(routing).sum()

    def run(self, rank: int) -> Found:
        """Of a process's samples; process 1 has no text alone."""
        draw = torch.Generator().manual_seed(rank)
        image = torch.randint(0, 256, (2 + rank, 3, 16, 16), generator=draw, dtype=torch.uint8)
        text = torch.randint(0, 50, (2 + rank, 6), generator=draw)
        lone = torch.randint(0, 50, (0 if rank == 1 else 3, 4), generator=draw)
        torch.manual_seed(100 + rank)
        loss = self(image, text, lone)
        loss.backward()
        return {"loss": loss.detach()}


# processes -> (copies of the model, processes that experts are dealt out over)
MESHES = {2: [(1, 1), (1, 2), (2, 1)], 4: [(1, 2), (2, 2), (1, 4)]}


def gradients(module: nn.Module) -> Found:
    """By name; of what is cut by FSDP the whole, of dealt experts those here."""
    found = {}
    for name, p in module.named_parameters():
        if p.grad is not None:
            grad = p.grad
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def spawn(world: int, folder: Path) -> list[dict[str, Found]]:
    """What each process found: name of a case or mesh -> tensors."""
    return start(_found, world, folder)


def _found(rank: int, world: int, folder: Path) -> dict[str, Found]:
    found: dict[str, Found] = {}
    if world == 2:
        found["rows"] = _rows(rank)
        ep = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
        for name, case in CASES.items():
            both = case.build()
            deal_experts(both, ep)
            found[name] = case.run(both, rank) | gradients(both)
    for dp, ep_size in MESHES[world]:
        net = Net()
        shard(net, make_mesh("cpu", dp, ep_size, experts=[4]), net.backbone.blocks)
        found[f"{dp}, {ep_size}"] = net.run(rank) | gradients(net)
    return found


def _rows(rank: int) -> Found:
    """Process 0 keeps one row and sends none; process 1 sends three and keeps two."""
    sent = [[1, 0], [3, 2]]
    received = [[1, 3], [0, 2]]
    x = (10.0 * rank + torch.arange(float(sum(sent[rank])), dtype=torch.float64))[:, None].requires_grad_()
    assert dist.group.WORLD is not None
    y = exchange_rows(x, sent[rank], received[rank], dist.group.WORLD)
    (y * (rank + 1) * torch.arange(1.0, len(y) + 1)[:, None]).sum().backward()
    assert x.grad is not None
    return {"y": y.detach()[:, 0], "x": x.grad[:, 0]}
