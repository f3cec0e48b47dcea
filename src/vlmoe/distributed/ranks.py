"""The processes that train one run together: who does what, and what they must agree on.

All of them hold the whole model and take different micro-batches of each step. Every method but the properties is to be
called by all, in the same order: one that does not leaves the others waiting. With one process they do nothing.
"""

# Annotations are not postponed here: DistributedDataParallel looks at those of `_add_up`.
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlmoe.config import UserError

LONGEST_WAIT = timedelta(hours=2)  # for another process: the first one trains tokenizers and validates alone

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # in the environment, beside WORLD_SIZE; torchrun's

T = TypeVar("T")


class Ranks:
    """rank: of this process. world: how many there are. Reads both from `torch.distributed`, if that is set up."""

    def __init__(self) -> None:
        on = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if on else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process writes the run's folder and speaks to people."""
        return self.rank == 0

    def mine(self, micro_batches: int) -> range:
        """Which of a step's micro-batches this process takes."""
        return range(self.rank, micro_batches, self.world)

    # ---------------------------------------------------------------------------------------------------- agreement
    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            self.most(0)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before all others do: it makes files that these find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def most(self, value: int) -> int:
        """The largest one."""
        if self.world == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def count(self, values: Mapping[str, int]) -> dict[str, int]:
        """Of each name the sum. All must come with the same names."""
        if self.world == 1:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.int64)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def told(self, value: T) -> T:
        """What the first process has; the others' is not looked at."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def gather(self, values: list[T]) -> list[T]:
        """What all have of `mine`, in the order of the micro-batches. Tensors must be on the CPU."""
        if self.world == 1:
            return values
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, values)
        return [value for round_ in zip(*found, strict=True) for value in round_]

    def sum(self, values: Iterable[Tensor]) -> list[Tensor]:
        """Sums of tensors on the device, in float64 on the way: exact for counts, and for all processes the same."""
        values = list(values)
        if self.world == 1 or not values:
            return values
        flat = torch.cat([value.detach().double().reshape(-1) for value in values])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values])
        return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]

    def total(self, value: Tensor) -> Tensor:
        """The sum of one tensor, see `sum`."""
        return self.sum([value])[0]

    # ---------------------------------------------------------------------------------------------------- gradients
    def join(self, module: nn.Module) -> nn.Module:
        """What to call in the place of `module`, so that the backward pass adds the gradients of all processes up.
        They begin with the weights of the first one."""
        if self.world == 1:
            return module
        # Which parameters have a gradient depends on the kinds of batches, and experts may all be frozen.
        joined = DistributedDataParallel(module, find_unused_parameters=True)
        joined.broadcast_buffers = False  # they change by what all agree on
        joined.register_comm_hook(None, _add_up)
        return joined

    def apart(self, joined: nn.Module) -> AbstractContextManager[None]:
        """Within it, forward and backward passes keep their gradients to themselves, for a later one to add up."""
        return joined.no_sync() if isinstance(joined, DistributedDataParallel) else nullcontext()


def _add_up(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Without dividing by the number of processes: a loss is a sum over the predictions of all."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started for this command, or this one alone. device: the run's.

    Raises UserError when there are more processes on this machine than CUDA devices, or the environment speaks of
    several processes and does not say where they meet.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} and lacks {', '.join(missing)}: start several "
            "processes by torchrun, or unset WORLD_SIZE for one"
        )
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"process {local} of this machine has no CUDA device: there are {count}; start {count}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    yield Ranks()
    dist.destroy_process_group()  # not after an error: the others may wait for what will not come


def is_first() -> bool:
    """Whether this process speaks to people, also when the run's processes have parted."""
    return os.environ.get("RANK", "0") == "0"
