"""AdamW, its learning rate as a pure function of the step, and the norm of the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmoe.config import TrainConfig
from vlmoe.model.embed import ImageEmbedding
from vlmoe.moe.experts import Experts
from vlmoe.moe.routers import Router
from vlmoe.moe.soft import SoftRouter
from vlmoe.tasks.base import Task


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of update number `step`, the first being 1: linear warm-up to `lr`, then down to `min_lr`.

    cosine: half a cosine from step `warmup` on. constant_decay: `lr` until `decay_steps` before the end, then a
    straight line (warm-up, stable, decay: Hu et al. 2024, MiniCPM). The rate is `lr` at step `warmup` and `min_lr` at
    the last step. A `min_lr` above `lr` counts as `lr`.
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    low = min(config.min_lr, config.lr)
    if config.schedule == "constant_decay":
        left = (config.steps - step) / max(1, config.decay_steps)
        return low + (config.lr - low) * max(0.0, min(1.0, left))
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return low + (config.lr - low) * 0.5 * (1.0 + math.cos(math.pi * done))


def make_optimizer(task: Task, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over the task's own parameter groups.

    A group may carry `lr_scale`, a factor on the schedule's rate (layer-wise decay, faster heads). `config.expert_lr`,
    `config.router_lr` and `config.patch_lr` are factors on it for routed experts, routers and the matrix that projects
    patches (None: `ImageEmbedding.rate_by_fan_in`).

    Raises:
        ValueError: a trainable parameter is in no group, so it would silently stay as it is.
    """
    groups = task.parameter_groups(config.weight_decay)
    grouped = {id(p) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    left_out = [name for name, p in task.named_parameters() if p.requires_grad and id(p) not in grouped]
    if left_out:
        raise ValueError(f"{type(task).__name__}.parameter_groups leaves out {', '.join(left_out[:5])}")
    scaled: dict[float, set[int]] = {}  # factor -> parameters
    for module in task.modules():
        if isinstance(module, Experts):
            scaled.setdefault(config.expert_lr, set()).update(map(id, module.parameters()))
        elif isinstance(module, (Router, SoftRouter)):
            scaled.setdefault(config.router_lr, set()).update(map(id, module.parameters()))
        elif isinstance(module, ImageEmbedding):
            factor = module.rate_by_fan_in() if config.patch_lr is None else config.patch_lr
            scaled.setdefault(factor, set()).add(id(module.project.weight))
    for factor, parameters in scaled.items():
        if factor != 1.0:
            groups = _scaled(groups, parameters, factor)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _scaled(groups: list[dict[str, object]], chosen: set[int], factor: float) -> list[dict[str, object]]:
    """The groups with the chosen parameters in groups of their own, whose `lr_scale` is `factor` times as large."""
    found = []
    for group in groups:
        parameters: list[torch.nn.Parameter] = group["params"]  # type: ignore[assignment]
        for inside in (False, True):
            part = [p for p in parameters if (id(p) in chosen) == inside]
            if part:
                scale = float(group.get("lr_scale", 1.0)) * (factor if inside else 1.0)  # type: ignore[arg-type]
                found.append(group | {"params": part, "lr_scale": scale})
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def clip_gradients(task: Task, limit: float) -> Tensor:
    """Scale the gradients down to a global norm of `limit` (0: leave them) and return the norm they had, a scalar."""
    parameters = [p for p in task.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
