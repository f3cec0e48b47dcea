"""Checkpoints: a fresh folder for each, whole or absent, in plain formats.

`checkpoints/step-N/` holds model.safetensors, optimizer.safetensors (keyed by parameter name) and state.json. It is
written as `.step-N.tmp-…`, forced to disk and then renamed: the rename is what makes it a checkpoint, so a process
killed at any moment leaves either the whole folder or a temporary one that the next start sweeps away. Nothing is
pickled, so reading a checkpoint runs no code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vlmoe.config import (
    AlteredError,
    FinetuneRecipe,
    Recipe,
    UserError,
    check_files,
    describe,
    parse_json,
    read_sealed,
    to_mapping,
    with_later_keys,
    write_sealed,
)
from vlmoe.data.tensors import load_sealed_tensors, save_sealed_tensors, save_tensors
from vlmoe.tasks.base import Task

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FORMAT, UNSEALED = 4, 3
# Keys that may differ between a checkpoint and the recipe that goes on from it: none of them enters the numbers.
FREE_KEYS = re.compile(
    r"(name|about|init_allow_inexact|branch_from|run\..*|eval\.(samples|batch|pictures|every)|data\.workers"
    r"|data\.max_bad_share|data\.stream\.(cache|cache_gb|attempts)"
    r"|train\.(log_every|watch_every|checkpoint_every|keep|keep_at(\[\d+\])?|device))"
)

LENGTH = ("train.steps", "train.decay_steps")  # free while the schedule has been the same constant up to here


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or continued; the message names the file or key."""


@dataclass
class State:
    """What a checkpoint knows besides tensors.

    step: updates done. micro_step: the next micro-batch's number in the data. seconds: time trained so far, over all
    launches. loss: of the last step. recipe: as plain mapping. bad: the count of skipped samples. logs: file name ->
    bytes that it had, to cut it back to on resume. machine: what bit-identity depends on (threads, torch, device).
    validation: see `loop.Validation`; empty without one. guard: see `guard.Memory`; empty without one. watch: see
    `watch.Watch.state`; empty in checkpoints of before it was kept.
    """

    step: int
    micro_step: int
    seconds: float
    loss: float | None
    recipe: dict[str, Any]
    bad: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------- folder
def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", p.name)) and p.is_dir())


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a `checkpoints` folder, or None."""
    steps = steps_in(folder)
    return folder / f"step-{steps[-1]}" if steps else None


def sweep(folder: Path) -> None:
    """Remove what a killed process left, half written or half deleted. Only for the holder of the run's lock."""
    if folder.is_dir():
        for path in folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, keep_at: Collection[int] = ()) -> None:
    """Delete all but the `keep` newest checkpoints and those of the steps `keep_at`; call it when the newest is known
    to be good."""
    for step in steps_in(folder)[: -max(1, keep)]:
        if step not in keep_at:
            remove(folder / f"step-{step}")


def remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted folder never passes for one."""
    doomed = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


# ------------------------------------------------------------------------------------------------------------- writing
def save(
    folder: Path, state: State, task: Task, optimizer: torch.optim.Optimizer, keep: int, keep_at: Collection[int] = ()
) -> Path:
    """Write `folder/step-N`, then `prune`.

    Raises:
        CheckpointError: the files cannot be written (disk full, no permission). Older checkpoints are untouched and
            nothing half-written is left.
    """
    final = folder / f"step-{state.step}"
    temporary = folder / f".step-{state.step}.tmp-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, state, task, optimizer)
        os.rename(temporary, final)  # the commit
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = newest(folder)
        raise CheckpointError(
            f"{final}: the checkpoint could not be written: {error}. "
            + (f"The newest one is {kept}. " if kept else "There is no older one. ")
            + "Make room or choose another run.dir, then start again"
        ) from None
    prune(folder, keep, keep_at)
    return final


def copy(source: Path, folder: Path) -> Path:
    """Put a copy of the checkpoint `source` into another run's `checkpoints` folder, whole or not at all.

    Raises:
        CheckpointError: it is missing or damaged, or cannot be copied.
    """
    _checked(source, [MODEL, OPTIMIZER])
    final = folder / source.name
    temporary = folder / f".{source.name}.tmp-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        for path in [*temporary.iterdir(), temporary]:
            _fsync(path)
        os.rename(temporary, final)  # the commit
        _fsync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{source}: cannot be copied to {folder}: {error}") from None
    return final


def save_weights(folder: Path, task: Task) -> None:
    """A task's weights alone, in `folder/model.safetensors`, replacing what was there; whole or not at all.

    Raises:
        CheckpointError: the file cannot be written; the older one is untouched.
    """
    temporary = folder / f".{MODEL}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights, tied = _untie(task.state_dict())
        save_sealed_tensors(weights, temporary, {"tied": json.dumps(tied)})
        _fsync(temporary)
        os.replace(temporary, folder / MODEL)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{folder / MODEL}: the best weights could not be written: {error}") from None


def load_weights(folder: Path, task: Task) -> None:
    """Load what `save_weights` wrote. Raises CheckpointError: missing, altered, unreadable, or of another model."""
    file = folder / MODEL
    try:
        weights, metadata = load_sealed_tensors(file)
        tied = parse_json(metadata["tied"].encode(), str(file))
    except AlteredError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not readable ({error})") from None
    weights |= {name: weights[holder] for name, holder in tied.items()}
    _check_tensors(file, weights, dict(task.state_dict()))
    task.load_state_dict(weights)


def _write(folder: Path, state: State, task: Task, optimizer: torch.optim.Optimizer) -> None:
    model, tied = _untie(task.state_dict())
    tensors = {MODEL: model, OPTIMIZER: _optimizer_tensors(task, optimizer)}
    files = {}
    for name, content in tensors.items():
        path = folder / name
        save_tensors(content, path)
        _fsync(path)
        files[name] = describe(path) | {"tensors": len(content)}
    write_sealed(folder / STATE, {"format": FORMAT, **asdict(state), "files": files, "tied": tied})
    _fsync(folder)


def _untie(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, each storage once, and the names left out: name -> the name that holds the same tensor."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride())
        identity = (*place, tensor.shape, tensor.dtype)
        if tensor.numel() and identity in first:
            tied[name] = first[identity]
            continue
        first[identity] = name
        # clone: a view of a larger storage, or of another tensor's, is saved as its own values
        own = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        tensor = tensor.detach()
        kept[name] = tensor.cpu().contiguous() if own else tensor.clone().cpu().contiguous()
    return kept, tied


def _optimizer_tensors(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """'parameter/entry' -> tensor. By name, so that the state outlives a change of order or of sharding."""
    return {
        f"{name}/{entry}": value.detach().cpu().contiguous()
        for name, parameter in task.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------- reading
def read_state(path: Path) -> State:
    """A checkpoint's state.json. Raises CheckpointError naming the file and what is wrong with it."""
    document = _document(path)
    return State(**{name: document[name] for name in State.__dataclass_fields__ if name in document})


def restore(path: Path, task: Task, optimizer: torch.optim.Optimizer) -> State:
    """Load a checkpoint into a task and its optimizer, in place, after checking every file against state.json.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or a tensor is missing, unknown or of another shape.
    """
    document = _checked(path, [MODEL, OPTIMIZER])
    _load_model(path, document, task)
    _restore_optimizer(path / OPTIMIZER, _tensors(path, OPTIMIZER, document), task, optimizer)
    return read_state(path)


def load_model(path: Path, task: Task) -> None:
    """Load a checkpoint's weights alone. Raises CheckpointError as `restore` does."""
    _load_model(path, _checked(path, [MODEL]), task)


def _checked(path: Path, files: list[str]) -> dict[str, Any]:
    document = _document(path)
    try:
        check_files(path / STATE, document, files, _way_out(path))
    except AlteredError as error:
        raise CheckpointError(str(error)) from None
    return document


def _load_model(path: Path, document: dict[str, Any], task: Task) -> None:
    model = _tensors(path, MODEL, document)
    for name, holder in document["tied"].items():
        if holder in model:
            model[name] = model[holder]
    _check_tensors(path / MODEL, model, dict(task.state_dict()))
    task.load_state_dict(model)


def check_recipe(path: Path, recipe: Recipe | FinetuneRecipe) -> None:
    """Refuse to go on from checkpoint `path` with a recipe that would have led to other numbers.

    Raises:
        CheckpointError: lists every key that differs, with both values.
    """
    now = _flat(to_mapping(recipe))
    state = read_state(path)
    then = with_later_keys(_flat(state.recipe), now)
    free = LENGTH if _constant_so_far(state.step, then) and _constant_so_far(state.step, now) else ()
    differing = [
        f"  {key}: the checkpoint has {then.get(key, 'no such key')!r}, the recipe {now.get(key, 'no such key')!r}"
        for key in sorted(then | now)
        if then.get(key) != now.get(key) and key not in free and not FREE_KEYS.fullmatch(key)
    ]
    if differing:
        longer = any(f"  {key}:" in line for line in differing for key in LENGTH)
        raise CheckpointError(
            f"{path} was made with another recipe, going on would mix the two:\n"
            + "\n".join(differing)
            + "\nRestore these keys, or choose another run.dir to start afresh"
            + (f"\n{_how_to_go_on(path)}" if longer else "")
        )


def _constant_so_far(step: int, keys: dict[str, Any]) -> bool:
    """Whether a recipe of these keys has not begun to lower the learning rate after `step` updates."""
    if keys.get("train.schedule") != "constant_decay":
        return False
    return step <= keys["train.steps"] - keys["train.decay_steps"]


def _how_to_go_on(path: Path) -> str:
    run = path.parent.parent
    return (
        "The learning rate up to this checkpoint depends on train.steps. To train its weights further, start a run "
        f"from them: init={run} seed=ANOTHER run.dir=ANOTHER train.steps=MORE (the run must be finished). A run with "
        "train.schedule=constant_decay can be made longer as long as its checkpoint lies in the constant phase, and "
        "others branch off one that it kept there (train.keep_at, branch_from)"
    )


def _document(path: Path) -> dict[str, Any]:
    file = path / STATE
    try:
        document = read_sealed(file, _way_out(path), older=UNSEALED)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing. {_way_out(path)}") from None
    except AlteredError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). {_way_out(path)}") from None
    found = document.get("format")
    if found not in (FORMAT, UNSEALED):
        raise CheckpointError(f"{file}: format {found!r}, this version reads {FORMAT}. {_way_out(path)}")
    missing = ({*State.__dataclass_fields__, "files", "tied"}) - document.keys() - {"watch"}
    missing |= {MODEL, OPTIMIZER} - dict(document.get("files") or {}).keys()
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(sorted(missing))}. {_way_out(path)}")
    return document


def _tensors(path: Path, name: str, document: dict[str, Any]) -> dict[str, Tensor]:
    file, expected = path / name, document["files"][name]
    try:
        with safe_open(file, framework="pt") as content:
            found = len(list(content.keys()))
        if found != expected["tensors"]:
            raise CheckpointError(f"{file}: {found} tensors, {STATE} says {expected['tensors']}. {_way_out(path)}")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable ({error}). {_way_out(path)}") from None


def _way_out(path: Path) -> str:
    older = [step for step in steps_in(path.parent) if step < int(path.name.removeprefix("step-"))]
    if older:
        return f"Delete {path} to go on from step {older[-1]}"
    return f"There is no older checkpoint: delete {path} to start from the beginning"


def _check_tensors(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    def described(tensors: dict[str, Tensor], name: str) -> str:
        return f"{tuple(tensors[name].shape)} {tensors[name].dtype}" if name in tensors else "no such tensor"

    wrong = [
        f"  {name}: the file has {described(found, name)}, the model {described(wanted, name)}"
        for name in sorted(found.keys() | wanted.keys())
        if described(found, name) != described(wanted, name)
    ]
    if wrong:
        more = [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise CheckpointError("\n".join([f"{file} does not fit the model:", *wrong[:10], *more]))


def _restore_optimizer(file: Path, found: dict[str, Tensor], task: Task, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(task.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{file}: tensor {key} belongs to no parameter of the model")
        parameter = parameters[name]
        if tensor.ndim and tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}"
            raise CheckpointError(f"{file}: tensor {key} has shape {shapes}")
        state.setdefault(name, {})[entry] = tensor.to(parameter.device)
    entries = {"step", "exp_avg", "exp_avg_sq"}
    for name, values in state.items():
        if values.keys() != entries:
            raise CheckpointError(f"{file}: {name} has {sorted(values)}, AdamW needs {sorted(entries)}")
        optimizer.state[parameters[name]] = values


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys: {"a": [{"b": 1}]} -> {"a[0].b": 1}."""
    if isinstance(value, dict) and value:
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    if isinstance(value, list) and value:
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}[{i}]").items()}
    return {prefix: value}
