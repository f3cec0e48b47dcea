"""Data workers that neither end a run nor outlive it.

Signals meant for a run reach its whole process group. Workers ignore them, so that the main process finishes its step
with data at hand, and die with it. A worker that is killed all the same (by the kernel short of memory, by a decoder's
fault) is noticed where the main process waits for data, never within a step.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of prctl(2)
ENDING = 1.0  # seconds that a dying worker may take


class WorkerLostError(Exception):
    """A data worker died; the message says of what."""


class _Children:
    """Takes the place of torch's SIGCHLD handler, which raises a dead worker's error wherever the main thread is, for
    example between an update and its count. This one does so only while the main thread waits for data."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler, self.waiting, self.missed = handler, False, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.waiting:
            self.missed = True
            return
        try:
            self.handler(number, frame)
        except RuntimeError as error:  # of any loader that is open: to start this one anew costs nothing but time
            raise WorkerLostError(str(error)) from None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        self.waiting = True
        try:
            if self.missed:
                self.missed = False
                self(signal.SIGCHLD, None)
            yield
        finally:
            self.waiting = False


def ready_worker(worker: int, server: bool = False) -> None:
    """Called first in each worker: signals to the group pass it by, and it ends when its parent does. server: that is a
    fork server, which ends when the run does."""
    parent = multiprocessing.parent_process()
    expected = os.getppid() if server or parent is None else parent.pid
    for s in STOP_SIGNALS:
        signal.signal(s, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":  # elsewhere the DataLoader's own watch ends it within seconds
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != expected:  # it died before that
            os._exit(1)
    torch.set_num_threads(1)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals wait until the end of this block, and a process started within it begins with them waiting."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def items_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's items; however it ends, its workers are gone.

    Raises:
        WorkerLostError: a worker has died. Items it had not handed over are not lost to a loader that starts there.
    """
    if not loader.num_workers:
        yield from loader
        return
    others = set(multiprocessing.active_children())
    with signals_held():  # until a worker ignores them
        items = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    children = _take_over()
    # They hold nothing, and ignore the SIGTERM by which the loader and Python would end them. A finalizer, because an
    # exception may keep this generator to the end of the process, which waits for its children.
    end = Finalize(None, _end, args=(workers,), exitpriority=0)
    try:
        while True:
            try:
                with children.heard() if children is not None else contextlib.nullcontext():
                    item = next(items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError, WorkerLostError) as error:
                # An item is handed over through a socket of the worker's: one that dies meanwhile is seen as its
                # connection's end, perhaps a moment before the process is gone.
                ending = wait([w.sentinel for w in workers], timeout=ENDING)
                dead = [w for w in workers if w.sentinel in ending]
                for worker in dead:
                    worker.join()
                if not dead:
                    raise  # the data set's own, or another loader's
                raise WorkerLostError(_cause(dead[0])) from error
            yield item
    finally:
        end()
        del items


def _end(workers: set[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _take_over() -> _Children | None:
    """Ours in place of torch's handler; None outside the main thread, where neither can be called."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _Children):
        return handler
    if not callable(handler):  # torch sets none on this platform
        return None
    ours = _Children(handler)
    signal.signal(signal.SIGCHLD, ours)
    return ours


def _cause(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", probably for want of memory" if code == -signal.SIGKILL else "")
