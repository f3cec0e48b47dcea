"""Where a model runs, and in which precision."""

from __future__ import annotations

import torch

from vlmoe.config import UserError


def pick_device(name: str, key: str = "train.device") -> torch.device:
    """'auto' is CUDA where there is one. key: what errors call the setting.

    Raises UserError when the device asked for is not here, or is neither a CPU nor a CUDA device: others lack what the
    loop and the sparse layers need (float64, grouped products, generators of their own).
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    got = f"{key} got {name!r}" if key.startswith("--") else f"key '{key}' got {name!r}"
    wanted = f"{got}, wanted auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise UserError(wanted) from None
    if device.type not in {"cpu", "cuda"}:
        raise UserError(f"{wanted}; {device.type} devices are not supported")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"{got}, and this torch ({torch.__version__}) sees no CUDA device")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"{got}, wanted a number below {count}: so many CUDA devices are here")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 autocast on a CUDA device that has it; elsewhere fp32, as bf16 is slow on most CPUs."""
    if name == "bf16" or (name == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float32
