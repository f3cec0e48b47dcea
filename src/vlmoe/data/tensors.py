"""Tensors as safetensors files that have the mode of any other file and, where asked, know their own content."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmoe.config import AlteredError

SEAL = "sha256"


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, which leaves files that only their owner may read, with the mode that the umask
    gives other new files."""
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(tensors, path, metadata)
    os.chmod(path, mode)


def save_sealed_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_tensors` with the digest of the content among the metadata."""
    metadata = metadata or {}
    save_tensors(tensors, path, metadata | {SEAL: _digest(tensors, metadata)})


def load_sealed_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as `save_sealed_tensors` wrote them.

    Raises AlteredError: the digest is not there or does not fit. Else what safetensors raises.
    """
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    tensors = load_file(path)
    if metadata.pop(SEAL, None) != _digest(tensors, metadata):
        raise AlteredError(f"{path}: its content does not fit the {SEAL} in it: altered")
    return tensors, metadata


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
