"""The run's folder: who may write it, and what a run writes down beside its checkpoints.

metrics.jsonl: one object for each logged step. routing.jsonl: the load of every expert at some steps. events.jsonl: one
object for each launch, checkpoint, stop and end. tensorboard/: the metrics again. recipe.yaml: every key as used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from vlmoe.config import FinetuneRecipe, Recipe, UserError, parse_json, to_yaml
from vlmoe.metrics import Score

METRICS, ROUTING, EVENTS, SKIPPED = "metrics.jsonl", "routing.jsonl", "events.jsonl", "skipped.jsonl"
CHECKPOINTS, BEST = "checkpoints", "best"  # folders
LOCK = ".lock"
_held: set[Path] = set()


class RunError(UserError):
    """A run's folder that cannot be used; the message names it."""


@contextlib.contextmanager
def lock_run(run_dir: Path, holder: bool = True) -> Iterator[None]:
    """Hold a run's folder against other processes; again by the same process is allowed and does nothing.
    holder: False where another process of the same run holds it.

    The lock belongs to the process and not to the file left behind, so a process that dies, however, releases it. It
    is a POSIX record lock: unlike flock's it is not inherited, so a data worker that outlives a killed parent by some
    seconds does not block the next launch.

    Raises:
        RunError: another process holds it, or the folder cannot be written.
    """
    path = (run_dir / LOCK).absolute()
    if not holder or path in _held:
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - closing it anywhere in the process would release the lock
    except OSError as error:
        raise RunError(f"run.dir {run_dir}: cannot be written: {error}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunError(f"run.dir {run_dir}: in use by {owner}; wait for it or choose another run.dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def machine(device: torch.device) -> dict[str, Any]:
    """What bit-identity of a run depends on besides recipe and code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"torch": torch.__version__, "device": device.type, "device_name": name, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    """The CPU's model name; Linux keeps it out of `platform`."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class RunLog:
    """Writes a run's logs. Opened at the checkpoint's step (0: afresh); later lines of an earlier launch are cut off.

    run_dir: the folder, locked by the caller. sizes: bytes that each log had at that step, from `State.logs`.
    """

    def __init__(self, run_dir: Path, recipe: Recipe | FinetuneRecipe, step: int, sizes: dict[str, int]) -> None:
        self.run_dir = run_dir
        try:
            for name in (METRICS, ROUTING, SKIPPED):
                cut(run_dir / name, sizes.get(name, 0))
            replace_text(run_dir / "recipe.yaml", to_yaml(recipe))
            self._files: dict[str, IO[str]] = {
                name: open(run_dir / name, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
                for name in (METRICS, ROUTING, EVENTS)
            }
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # purge_step: points that an earlier launch logged after the checkpoint disappear from the curves
            self._tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1 if step else None)
        except OSError as error:
            raise RunError(f"run.dir {run_dir}: cannot be written: {error}") from None

    def metrics(self, step: int, values: dict[str, float | int]) -> None:
        """One logged step. Floats are written with all their digits; what is not finite becomes null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._append(METRICS, {"step": step, **finite})
        with self._tensorboard_errors():
            for name, value in finite.items():
                if value is not None:
                    self._tensorboard.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def validation(self, step: int, parts: Mapping[str, Score], **details: Any) -> None:
        """What a validation found: an event, and what the score is made of as TensorBoard's "val KIND/MEASURE"."""
        listed = {name: score.as_dict() for name, score in parts.items()}
        self.event("validation", step=step, **details, **({"parts": listed} if listed else {}))
        with self._tensorboard_errors():
            for name, score in parts.items():
                self._tensorboard.add_scalar(f"val {name}", score.value, step)

    def routing(
        self, step: int, load: dict[str, torch.Tensor], layers: dict[str, dict[str, float]] | None = None
    ) -> None:
        """load: "block/modality" -> (E,) tokens sent to each expert in this step. layers: what `Watch` saw."""
        counts = {name: [round(x, 3) if x % 1 else int(x) for x in load_E.tolist()] for name, load_E in load.items()}
        record: dict[str, Any] = {"step": step, "load": counts}
        if layers:
            record["layers"] = {
                name: {key: value if math.isfinite(value) else None for key, value in found.items()}
                for name, found in layers.items()
            }
            with self._tensorboard_errors():
                for name, found in record["layers"].items():
                    for key, value in found.items():
                        if value is not None:
                            self._tensorboard.add_scalar(f"routing {name}/{key}", value, step)
        self._append(ROUTING, record)

    def rewind(self, sizes: dict[str, int]) -> None:
        """Cut the logs of a run that goes back to a checkpoint to what they were there; events stay."""
        for name in (METRICS, ROUTING):
            self._files[name].flush()
            cut(self.run_dir / name, sizes.get(name, 0))

    def event(self, kind: str, **details: Any) -> None:
        self._append(EVENTS, _event(kind, details))

    def launch(self, step: int, device: torch.device) -> None:
        """Record what started where: command, versions, machine."""
        packages = ("vlmoe", "torch", "numpy", "safetensors")
        self.event(
            "launch",
            step=step,
            command=shlex.join(sys.argv),
            python=platform.python_version(),
            versions={name: version(name) for name in packages},
            host=socket.gethostname(),
            system=platform.platform(),
            cpus=os.cpu_count(),
            process=os.getpid(),
            **machine(device),
        )

    def sizes(self) -> dict[str, int]:
        """Force the logs to disk and say how long they are, for the checkpoint to remember."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        with self._tensorboard_errors():
            self._tensorboard.flush()
        present = [self.run_dir / name for name in (METRICS, ROUTING, SKIPPED)]
        return {path.name: path.stat().st_size for path in present if path.exists()}

    def close(self) -> None:
        """Every line is flushed as it is written; what cannot be written now was reported when it was."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        with contextlib.suppress(RunError), self._tensorboard_errors():
            self._tensorboard.close()

    @contextlib.contextmanager
    def _tensorboard_errors(self) -> Iterator[None]:
        """Its writing thread hands what went wrong to the next call, as an OSError or as an error of its own."""
        try:
            yield
        except Exception as error:
            raise RunError(f"{self.run_dir / 'tensorboard'}: cannot be written: {error}") from None

    def _append(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._files[name].write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise RunError(f"{self.run_dir / name}: cannot be written: {error}") from None


def note_event(run_dir: Path, kind: str, **details: Any) -> None:
    """One line in a run's events before its log is opened."""
    path = run_dir / EVENTS
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_event(kind, details), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error}") from None


def _event(kind: str, details: dict[str, Any]) -> dict[str, Any]:
    return {"event": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details}


def cut(path: Path, size: int) -> None:
    """Shorten a log of lines to its first `size` bytes, or to the last line that ends before that. Missing is fine."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        head = file.read(size)
        file.truncate(head.rfind(b"\n") + 1)


def replace_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a torn last line, as a killed process leaves it, is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [parse_json(line, str(path), nan=True) for line in lines[:-1]]
