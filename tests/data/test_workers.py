"""Data workers: signals pass them by, they die with their parent, and one that is killed is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tests.train.toy import ToyData
from vlmoe.config import UserError
from vlmoe.data.loader import LOST_AT_MOST, Step, make_loader
from vlmoe.data.workers import STOP_SIGNALS, ready_worker


class Deadly(ToyData):
    """The worker that makes item 3 is killed, as the kernel does it when memory is short."""

    def __getitem__(self, n: int) -> Step:
        if n == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return ToyData.__getitem__(self, n)


def test_signals_pass_workers_by() -> None:
    steps = iter(make_loader(ToyData(), 0, 200, workers=2))
    next(steps)
    workers = multiprocessing.active_children()
    for worker in workers:
        for s in STOP_SIGNALS:
            os.kill(worker.pid, s)  # type: ignore[arg-type]
    assert len(list(steps)) == 199
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_replaced_and_no_item_is_lost() -> None:
    lost: list[tuple[int, str]] = []
    keys = []
    for n, step in enumerate(
        make_loader(ToyData(), 0, 60, workers=2, lost=lambda m, cause: lost.append((m, cause))), 1
    ):
        keys.append(step.batches["text"].keys[0])
        if n in (5, 25):
            worker = multiprocessing.active_children()[0]
            worker.kill()
    assert keys == [f"{m}/0" for m in range(60)]
    assert len(lost) == 2
    assert lost[0][0] >= 5
    assert lost[1][0] >= 25
    assert all("SIGKILL" in cause for _, cause in lost)


def test_a_worker_that_dies_while_it_hands_over_an_item_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is closed before the main process could take the item: an error of the connection, not of torch."""
    lost: list[tuple[int, str]] = []
    handed = _MultiProcessingDataLoaderIter._try_get_data
    times = 0

    def broken(loader: Any, *given: Any, **named: Any) -> Any:
        nonlocal times
        times += 1
        if times in (3, 30):
            multiprocessing.active_children()[0].kill()
            raise ConnectionResetError("Connection reset by peer") if times == 3 else EOFError
        return handed(loader, *given, **named)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", broken)
    steps = make_loader(ToyData(), 0, 60, workers=2, lost=lambda m, cause: lost.append((m, cause)))
    assert [step.batches["text"].keys[0] for step in steps] == [f"{m}/0" for m in range(60)]
    assert len(lost) == 2
    assert all("SIGKILL" in cause for _, cause in lost)


def test_workers_that_die_again_and_again_are_an_error() -> None:
    lost: list[int] = []
    with pytest.raises(UserError, match=r"data workers died 6 times .* SIGKILL.* micro-batch [0-3]: set data.workers"):
        for _ in make_loader(Deadly(), 0, 60, workers=1, lost=lambda m, cause: lost.append(m)):
            pass
    assert len(lost) == LOST_AT_MOST
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes the DataLoader's watch some seconds")
def test_workers_die_with_their_parent() -> None:
    code = (
        "import multiprocessing, time\n"
        "from tests.train.toy import ToyData\n"
        "from vlmoe.data.loader import make_loader\n"
        "steps = iter(make_loader(ToyData(), 0, 100, workers=2, context='fork'))\n"
        "next(steps)\n"
        "print(*(w.pid for w in multiprocessing.active_children()), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    for pid in workers:
        for _ in range(200):
            stat = Path(f"/proc/{pid}/stat")
            if not stat.exists() or stat.read_text().split()[2] == "Z":
                break
            time.sleep(0.01)
        else:
            raise AssertionError(f"worker {pid} outlives its parent")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes the DataLoader's watch some seconds")
def test_a_worker_whose_parent_is_dead_before_it_begins_ends() -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def worker(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.01)
        ready_worker(0)
        there.send("it lives")

    def parent() -> None:
        fork.Process(target=worker, args=(os.getpid(),)).start()
        os._exit(0)

    process = fork.Process(target=parent)
    process.start()
    there.close()
    process.join()
    with pytest.raises(EOFError):
        here.recv()
