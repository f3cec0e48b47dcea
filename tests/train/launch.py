"""Training launches as real processes that can be killed.

A fork server imports torch once and forks every launch from there, so a launch costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.train.toy import ToyData, toy_recipe, toy_task
from vlmoe.config import UserError
from vlmoe.data.workers import STOP_SIGNALS
from vlmoe.train import checkpoint, plots, runlog
from vlmoe.train.loop import train

USER_ERROR = 2
BAD = frozenset({1, 4, 9})  # micro-steps with a broken sample, so that the count of them must survive too


def context() -> ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.train.warm"])
    return server


def start(run_dir: Path, moment: str = "", workers: int = 0, **train: Any) -> BaseProcess:
    process = context().Process(target=_launch, args=(str(run_dir), moment, workers, train))
    process.start()
    return process


def run(run_dir: Path, moment: str = "", workers: int = 0, **train: Any) -> int:
    """Exit code of a launch; -9 when it was killed. `moment`: see `_arm`."""
    process = start(run_dir, moment, workers, **train)
    process.join(60)
    assert process.exitcode is not None, "the launch hangs"
    return process.exitcode


def draw_nothing() -> None:
    plots.plot_curves = plots.plot_routing = lambda run_dir: None


def _launch(run_dir: str, moment: str, workers: int, settings: dict[str, Any]) -> None:
    os.setpgrp()  # a process group of its own, so that a Ctrl-C meant for it reaches nobody else
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a server that a study began holds them
    for number in STOP_SIGNALS:  # and nohup, or a shell's background, lets all of the tests ignore some
        signal.signal(number, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, not another fork server
    torch.set_num_threads(1)
    recipe = toy_recipe(run_dir, **settings)
    recipe.data.workers = workers
    task = toy_task(width=64) if "limit" in moment else toy_task()
    draw_nothing()
    if moment:
        _arm(moment, task)
    try:
        result = train(recipe, task, ToyData(bad=BAD), run_dir)
    except UserError as error:
        # not to standard error as well: pytest captures that in a file, which a limit on files limits, too
        (Path(run_dir) / "error.txt").write_text(str(error))
        sys.exit(USER_ERROR)
    sys.exit(128 + result.stopped_by if result.stopped_by else 0)


def _arm(moment: str, task: Any) -> None:
    """Prepare what happens: 'PLACE COUNT' does it at the COUNT-th time that PLACE is passed in this process.

    SIGKILL before the call: forward, fsync, rename (commit of a checkpoint, or the start of a removal), rmtree, append
    (a line of a log), plot. half-line: SIGKILL with half of a line of metrics written. sigterm, sigint-twice,
    group-sigint, group-sigterm: signals within forward; the group's also reach the data workers. limit BYTES: files
    cannot grow beyond that from the third forward on. hang: wait there for ever.
    """
    place, _, count = moment.partition(" ")
    number = int(count)
    if place == "limit":
        _before(task, "forward", 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (number, number)))
    elif place == "half-line":
        original = runlog.RunLog._append

        def half(self: runlog.RunLog, name: str, record: dict[str, Any]) -> None:
            if name == runlog.METRICS and record["step"] == number:
                self._files[name].write('{"step": 3, "lo')
                self._files[name].flush()
                _kill()
            original(self, name, record)

        runlog.RunLog._append = half  # type: ignore[method-assign]
    else:
        owner, name, action = {
            "forward": (task, "forward", _kill),
            "fsync": (os, "fsync", _kill),
            "rename": (checkpoint.os, "rename", _kill),
            "rmtree": (checkpoint.shutil, "rmtree", _kill),
            "append": (runlog.RunLog, "_append", _kill),
            "plot": (plots, "plot_curves", _kill),
            "sigterm": (task, "forward", lambda: os.kill(os.getpid(), signal.SIGTERM)),
            "sigint-twice": (task, "forward", _signal_twice),
            "group-sigint": (task, "forward", lambda: os.killpg(os.getpgrp(), signal.SIGINT)),
            "group-sigterm": (task, "forward", lambda: os.killpg(os.getpgrp(), signal.SIGTERM)),
            "group-sighup": (task, "forward", lambda: os.killpg(os.getpgrp(), signal.SIGHUP)),
            "group-sigusr1": (task, "forward", lambda: os.killpg(os.getpgrp(), signal.SIGUSR1)),
            "ignored-sighup": (task, "forward", lambda: os.killpg(os.getpgrp(), signal.SIGHUP)),
            "worker": (task, "forward", _kill_worker),
            "updated": (torch.optim.AdamW, "step", lambda: os.killpg(os.getpgrp(), signal.SIGTERM)),
            "raise": (torch.optim.AdamW, "step", _raise),
            "hang": (task, "forward", lambda: signal.pause()),
        }[place]
        if place == "ignored-sighup":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if owner is torch.optim.AdamW:
            _after_update(number, action)
        else:
            _before(owner, name, number, action)


def _after_update(number: int, action: Callable[[], object]) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            action()

    register_optimizer_step_post_hook(hook)


def _kill_worker() -> None:
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]


def _raise() -> None:
    raise RuntimeError("between the update and its count")


def _before(owner: Any, name: str, number: int, action: Callable[[], object]) -> None:
    original, calls = getattr(owner, name), 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signal_twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
