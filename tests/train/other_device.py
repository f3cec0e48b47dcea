"""A stand-in for a GPU, so that a machine without one can tell what a step would do there.

Model and batches are on torch's meta device, whose tensors have shapes and no values. What a GPU would do by itself
goes on as usual; the mode below raises at what would need the host: an op that makes or takes a CPU tensor, and one
whose result's shape or value the host must wait for. Reads of values (`tolist`, `item`, `int`, `bool`) are counted and
give zeros. A CPU tensor of no dimensions in arithmetic, which a GPU kernel may take, is refused as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = torch.device("meta")
WAITS = {"nonzero", "masked_select", "_local_scalar_dense", "bincount", "unique_consecutive", "_unique2", "equal",
         "is_nonzero", "unique_dim", "histc"}  # fmt: skip


class DeviceError(AssertionError):
    """What a step did that it must not do on a GPU."""


class OtherDevice(TorchDispatchMode):
    """Raises DeviceError. reads: how often a value was read so far."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.host = True  # until a step begins

    def __enter__(self) -> Any:
        self.host = False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.host = True
        super().__exit__(*error)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """What is the host's own work, such as making a batch."""
        before, self.host = self.host, True
        try:
            yield
        finally:
            self.host = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func._schema.name.removeprefix("aten::"), _tensors((args, kwargs or {}))
        if not self.host and any(t.device != OTHER for t in given):
            raise DeviceError(f"{name} takes a tensor from the CPU: {[tuple(t.shape) for t in given]}")
        if not self.host and (name in WAITS or (name.startswith("index") and _by_mask(args))):
            raise DeviceError(f"{name} waits for the device: the size of what it makes is known there alone")
        if not self.host and name.startswith("repeat_interleave") and (kwargs or {}).get("output_size") is None:
            raise DeviceError(f"{name} without output_size waits for the device")
        if not self.host and (kwargs or {}).get("device", OTHER) not in (None, OTHER):
            raise DeviceError(f"{name} makes a tensor on the CPU")
        made = func(*args, **(kwargs or {}))
        if not self.host and any(t.device != OTHER for t in _tensors(made)):
            raise DeviceError(f"{name} makes a tensor on the CPU")
        return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _by_mask(args: Any) -> bool:
    return any(t.dtype == torch.bool for t in _tensors(args[1]))


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> OtherDevice:
    """The mode, with what the meta device lacks of a GPU: autocast, the grouped kernel in float32, values to read."""
    mode = OtherDevice()
    empty = torch.zeros

    def read(name: str) -> Any:
        plain = getattr(Tensor, name)

        def value(self: Tensor) -> Any:
            if self.device != OTHER:
                return plain(self)
            mode.reads += 1
            with mode.on_host():
                return plain(empty(self.shape, dtype=self.dtype))

        return value

    def sent(name: str) -> Any:
        plain = getattr(torch, name)

        def make(data: Any, *args: Any, **kwargs: Any) -> Tensor:
            if not mode.host and not isinstance(data, Tensor):
                raise DeviceError(f"torch.{name} of numbers sends them over, and waits until they are")
            return plain(data, *args, **kwargs)

        return make

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, sent(name))
    for name in ("tolist", "item", "__int__", "__float__", "__bool__"):
        monkeypatch.setattr(Tensor, name, read(name))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr("vlmoe.moe.backends.has_kernel", lambda weights, dtype: weights[0].device == OTHER)
    monkeypatch.setattr(F, "grouped_mm", _grouped_mm)
    return mode


def _grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """Shapes alone: rows through their expert's matrix, or a product over each expert's rows."""
    return a @ b.sum(dim=0) if b.ndim == 3 else (a @ b).expand(len(offs), -1, -1)
