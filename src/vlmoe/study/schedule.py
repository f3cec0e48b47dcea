"""Jobs in processes of their own, several at a time, each with one thread, within a budget.

A job that fails is recorded and the others go on. At the budget's end, or on Ctrl-C, running jobs are told to stop;
they write a checkpoint, and the next launch goes on with them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vlmoe.config import flat, read_json, with_later_keys
from vlmoe.data.workers import STOP_SIGNALS, signals_held
from vlmoe.study import worker
from vlmoe.study.declare import Budget, StudyError
from vlmoe.study.worker import FAILED, JOB, LOG, RESULT
from vlmoe.train.runlog import METRICS, read_lines, replace_text
from vlmoe.train.signals import StopRequest

USED = "used.json"
GRACE = 60.0  # seconds that a job told to stop has for its checkpoint
POLL = 0.05
# What a job needs, imported once: the first optimizer imports the second, the logs the third, a run's end the last.
IMPORTED = ("vlmoe.study.worker", "torch._dynamo", "torch.utils.tensorboard", "vlmoe.train.plots")
# change when a study's folder is moved
MOVED = ("run.dir", "data.visual_tokenizer.path", "tokenizers", "init", "branch_from")
FREE = (*MOVED, "recipe.about")  # what a recipe says of itself may be put into other words


@dataclass
class Job:
    """spec: what job.json says, None while that is not known. seconds: expected. steps: at its end. began_at: the step
    at which it branches off another run, 0 for none. flops: of what it trains itself. start: the checkpoint it waits
    for."""

    id: str
    folder: Path
    spec: dict[str, Any] | None = None
    seconds: float = 0.0
    flops: float = 0.0
    steps: int = 0
    began_at: int = 0
    start: Path | None = None

    @property
    def done(self) -> bool:
        return (self.folder / RESULT).is_file()

    @property
    def failed(self) -> bool:
        return not self.done and (self.folder / FAILED).is_file()

    @property
    def status(self) -> str:
        if self.done or self.failed:
            return "done" if self.done else "failed"
        return "stopped" if self.share_done else "to do"

    @property
    def share_done(self) -> float:
        """Of the steps it makes itself, by its log."""
        if self.done:
            return 1.0
        records = read_lines(self.folder / METRICS) if self.steps else []
        made = records[-1]["step"] - self.began_at if records else 0
        return max(0.0, made / (self.steps - self.began_at)) if self.steps else 0.0

    @property
    def ready(self) -> bool:
        return self.start is None or self.start.is_dir()

    @property
    def trunk(self) -> Path | None:
        """The folder of the run that it branches off."""
        return None if self.start is None else self.start.parent.parent

    @property
    def orphaned(self) -> bool:
        """Whether what it waits for will never be there: it is looked for last, when the other run has ended."""
        return self.trunk is not None and (self.trunk / FAILED).is_file() and not self.ready

    def read(self) -> dict[str, Any]:
        return read_json(self.folder / (RESULT if self.done else FAILED), nan=True)

    def check(self) -> None:
        """Raises StudyError where the folder holds a run of another declaration."""
        if self.spec is None:
            return
        file = self.folder / JOB
        if not file.is_file() or not (self.done or (self.folder / METRICS).exists()):
            return
        now = flat(self.spec)
        then = with_later_keys(flat(read_json(file, nan=True)), now, "recipe.")
        other = [k for k in sorted(then | now) if then.get(k) != now.get(k) and not k.endswith(FREE)]
        if other:
            key = other[0]
            raise StudyError(
                f"{self.folder} holds a run of another declaration ({key}: {then.get(key)!r} there, "
                f"{now.get(key)!r} now): choose another --out, or delete that folder"
            )

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / JOB, json.dumps(self.spec, indent=1))


class Meter:
    """What a study has used of its budget, over all launches: seconds on the clock here, FLOPs by the jobs' logs."""

    def __init__(self, out: Path, budget: Budget) -> None:
        self.file, self.budget = out / USED, budget
        self.before = read_json(self.file)["seconds"] if self.file.is_file() else 0.0
        self.began = self.saved = time.monotonic()
        self.flops = 0.0

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    @property
    def left(self) -> float:
        return float("inf") if self.budget.hours is None else self.budget.hours * 3600 - self.seconds

    def fits(self, job: Job, flops_running: float) -> bool:
        todo = 1 - job.share_done
        within = self.budget.flops is None or self.flops + flops_running + todo * job.flops <= self.budget.flops
        return within and todo * job.seconds <= self.left

    def save(self, every: float = 0.0) -> None:
        if time.monotonic() - self.saved >= every:
            self.saved = time.monotonic()
            replace_text(self.file, json.dumps({"seconds": self.seconds}))


@dataclass
class _Running:
    job: Job
    process: BaseProcess


def run_jobs(
    jobs: Sequence[Job], at_a_time: int, meter: Meter, say: Callable[[str, list[Job]], None], retry: bool = False
) -> int | None:
    """Run what is not done, in order, but for jobs that wait for another's checkpoint. say(event, jobs left): called
    when a job ends ("ID: done"), and every second with "". A job that no longer fits into the budget is left out, and
    a shorter one after it may still run.

    Returns the signal that stopped it, or None.
    """
    meter.flops += sum(job.share_done * job.flops for job in jobs)
    waiting = [job for job in jobs if not job.done and (retry or not job.failed)]
    for job in waiting:
        job.write()
        (job.folder / FAILED).unlink(missing_ok=True)
    running: list[_Running] = []
    told = 0.0
    with StopRequest() as stop:
        while running or (waiting and stop.number is None):
            if stop.number is not None or meter.left <= 0:
                _end(running, say)
                break
            while orphan := next((j for j in waiting if j.orphaned), None):
                waiting.remove(orphan)
                _record_without_trunk(orphan)
                say(f"{orphan.id}: {orphan.status}", [p.job for p in running] + waiting)
            while len(running) < at_a_time and (ready := [j for j in waiting if j.ready]):
                busy = sum((1 - p.job.share_done) * p.job.flops for p in running)
                fits = next((j for j in ready if meter.fits(j, busy)), None)
                if fits is None:
                    break
                waiting.remove(fits)
                running.append(_start(fits))
            if not running:  # nothing fits, or what others wait for has been left out
                break
            time.sleep(POLL)
            for one in [p for p in running if not p.process.is_alive()]:
                running.remove(one)
                _record(one, stopping=False)
                meter.flops += one.job.flops * one.job.share_done
                say(f"{one.job.id}: {one.job.status}", [p.job for p in running] + waiting)
            if time.monotonic() - told > 1:
                told = time.monotonic()
                meter.save(every=5)
                say("", [p.job for p in running] + waiting)
        meter.save()
        return stop.number


def _start(job: Job) -> _Running:
    """A fork of a server process that has imported everything and holds no threads: it begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = context.Process(target=worker.main, args=(job.folder,), name=job.id)
    with signals_held():  # for good in the server: a signal to the group must not end what watches the jobs
        forkserver.ensure_running()
    process.start()
    return _Running(job, process)


def _record(one: _Running, stopping: bool) -> None:
    """A job that ended without a result and was not told to stop has failed."""
    job, code = one.job, one.process.exitcode or 0
    if job.done or (job.folder / FAILED).is_file():
        return
    if stopping or code in {end for s in STOP_SIGNALS for end in (128 + s, -s)}:
        return
    if code < 0:
        why = f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    else:
        why = f"ended with {code} and left no result; see {job.folder / LOG}"
    replace_text(job.folder / FAILED, json.dumps({"error": why}))


def _record_without_trunk(job: Job) -> None:
    """A job whose start will never be there has failed with the run that was to make it."""
    assert job.trunk is not None and job.start is not None
    why = read_json(job.trunk / FAILED, nan=True)["error"]
    text = f"not begun: {job.trunk.name}, from whose {job.start.name} it was to go on, failed: {why}"
    replace_text(job.folder / FAILED, json.dumps({"error": text}))


def _end(running: list[_Running], say: Callable[[str, list[Job]], None]) -> None:
    """Tell all jobs to stop, wait for their checkpoints, and kill what does not end."""
    for one in running:
        one.process.terminate()
    until = time.monotonic() + GRACE
    for one in running:
        one.process.join(max(0.0, until - time.monotonic()))
        if one.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)  # type: ignore[arg-type]  # with its data workers
            one.process.join()
        _record(one, stopping=True)
        say(f"{one.job.id}: {one.job.status}", [])


def expected_seconds(jobs: Iterable[Job], at_a_time: int) -> float:
    """On the clock, for what is not done: of the jobs that can begin, the first goes to the lane that is free first."""
    lanes, waiting = [0.0] * at_a_time, [job for job in jobs if not job.done and not job.failed]
    shares = {job.folder: job.share_done for job in waiting}
    begins: dict[Path, tuple[float, Job]] = {}  # folder -> when it begins

    def earliest(job: Job) -> float:
        if job.trunk is None or job.ready:
            return 0.0
        if job.trunk not in begins:
            return float("inf") if any(job.trunk == other.folder for other in waiting) else 0.0
        at, trunk = begins[job.trunk]
        share = (job.began_at - trunk.began_at) / (trunk.steps - trunk.began_at)
        return at + trunk.seconds * max(0.0, share - shares[trunk.folder])

    while waiting:
        lane = lanes.index(min(lanes))
        job = min(waiting, key=lambda j: max(lanes[lane], earliest(j)))
        begins[job.folder] = at, _ = max(lanes[lane], earliest(job)), job
        lanes[lane] = at + job.seconds * (1 - shares[job.folder])
        waiting.remove(job)
    return max(lanes)
