"""Processes for tests, forked from one that has imported what they need: imports take longer than what is tested."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from vlmoe.data.workers import STOP_SIGNALS

IMPORTED = ["tests.distributed.training", "tests.distributed.work", "torch._dynamo", "torch.utils.tensorboard",
            "matplotlib.pyplot"]  # fmt: skip


def start(found: Callable[[int, int, Path], Any], world: int, folder: Path) -> list[Any]:
    """What `found(rank, world, folder)` returns in each of the processes, joined by gloo."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(
        _process, (world, folder, found), nprocs=world, start_method="forkserver"
    )  # fmt: skip
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _process(rank: int, world: int, folder: Path, found: Callable[[int, int, Path], Any]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # another test may have begun the server with them held
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(found(rank, world, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()
