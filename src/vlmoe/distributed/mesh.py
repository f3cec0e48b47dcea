"""The processes of a run as a grid."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vlmoe.config import UserError


@dataclass(frozen=True)
class Mesh:
    """Who holds what. World = dp copies of the model, each cut over `shard` processes, neighbours by rank. Of these,
    each run of `ep` neighbours has every expert once.

    dense: over which all but experts are cut, and copied where dp > 1. ep: the processes that have different experts.
    experts: those that have the same ones, over which these are cut, and copied where dp > 1.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    ep: DeviceMesh


def make_mesh(device: str, dp: int = 1, ep: int = 1, experts: Collection[int] = ()) -> Mesh:
    """The grid of all processes; `torch.distributed` must be set up. device: its type, "cuda" or "cpu".

    experts: how many each sparse layer has; where two modalities have some in common, these count as a layer's.

    Raises:
        UserError: the numbers do not divide each other; it says which would.
    """
    world = dist.get_world_size()
    cut = check_mesh(world, dp, ep, experts)
    dense = init_device_mesh(device, (dp, world // dp), mesh_dim_names=("dp", "shard"))
    grid = init_device_mesh(device, (dp, cut, ep), mesh_dim_names=("dp", "cut", "ep"))
    copies = ("dp",) if dp > 1 else ()  # FSDP takes one dimension for cut, two for copied and cut
    return Mesh(dense[(*copies, "shard")], grid[(*copies, "cut")], grid["ep"])


def check_mesh(world: int, dp: int, ep: int, experts: Collection[int]) -> int:
    """How many processes hold parts of the same experts, world / (dp * ep). Raises UserError, see `make_mesh`."""
    if dp < 1 or world % dp:
        raise UserError(
            f"dp: got {dp} copies of the model over {world} processes, expected a number that divides them: "
            f"{_words(_divisors(world))}"
        )
    shard = world // dp
    if ep < 1 or any(n % ep for n in (shard, *experts)):
        layers = f" and the experts of each layer ({', '.join(map(str, sorted(set(experts))))})" if experts else ""
        fits = [n for n in _divisors(shard) if not any(e % n for e in experts)]
        raise UserError(
            f"ep: got experts dealt out over {ep} processes, expected a number that divides the {shard} processes of "
            f"a copy of the model{layers}: {_words(fits)}"
        )
    return shard // ep


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _words(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
