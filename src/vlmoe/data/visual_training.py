"""Training of the visual tokenizer on a run's images, and what its codes are worth.

Shape suffixes: B batch · P patches · Z codebook dimension · V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmoe.config import ModelConfig, VisualTokenizerConfig
from vlmoe.data.visual_tokenizer import VQTokenizer

# Of a cosine near 1: bfloat16's spacing below 1, and float32's after a sum over some terms.
ROUNDING = {"bf16": 2**-8, "fp32": 2**-20}


def train_vq(
    config: VisualTokenizerConfig,
    model: ModelConfig,
    images: Iterator[Tensor],
    held_out: Tensor,
    seed: int,
    device: torch.device,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[VQTokenizer, dict[str, float]]:
    """Train a tokenizer on batches of uint8 images (B, 3, H, W).

    Returns it frozen, with its report on `held_out`, see `tokenizer_report`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = VQTokenizer(model.image_size, model.patch, model.codes, config.dim, config.width)
    tokenizer.to(device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, config.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )
    for step in range(config.steps):
        image_BCHW = next(images).to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, enabled=False):  # of the caller: a backward pass heeds it as well
            loss, _ = tokenizer.loss(image_BCHW, generator)
            loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19 or step + 1 == config.steps:
            progress(step + 1, loss.item())
    tokenizer.eval().requires_grad_(False)
    return tokenizer, tokenizer_report(tokenizer, held_out.to(device))


@torch.no_grad()
def tokenizer_report(tokenizer: VQTokenizer, image_BCHW: Tensor) -> dict[str, float]:
    """Held-out quality of a tokenizer.

    `unexplained`: mean squared error against the variance of the pixels. `used`, `perplexity`: see `code_use`. `gap`:
    by how much the best code's cosine exceeds the second best's, median over patches; `gap_1_percent`: what 99% of the
    patches exceed. `tied_bf16`, `tied_fp32`: share of patches whose gap is within that format's rounding.
    """
    target = image_BCHW.float() / 127.5 - 1.0
    z_BPZ = tokenizer.features(image_BCHW)
    codes_BP = tokenizer.nearest(z_BPZ)
    error = F.mse_loss(tokenizer.pixels(F.embedding(codes_BP, tokenizer.codebook_VZ)), target)
    gap_BP = code_gap(tokenizer, z_BPZ)
    return {
        "unexplained": float(error / target.var()),
        **code_use(codes_BP, tokenizer.codes),
        "gap": float(gap_BP.median()),
        "gap_1_percent": float(gap_BP.flatten().kthvalue(max(1, gap_BP.numel() // 100)).values),
        **{f"tied_{name}": float((gap_BP <= size).float().mean()) for name, size in ROUNDING.items()},
    }


def code_gap(tokenizer: VQTokenizer, z_BPZ: Tensor) -> Tensor:
    """(B, P): the cosine with the best code less that with the second best."""
    best_BP2 = (z_BPZ @ tokenizer.codebook_VZ.T).topk(min(2, tokenizer.codes), dim=-1).values
    return best_BP2[..., 0] - best_BP2[..., -1]


def code_use(codes: Tensor, size: int) -> dict[str, float]:
    """How well a codebook is used: `used`, the share of codes that occur, and `perplexity`, the effective number."""
    share = torch.bincount(codes.flatten().cpu(), minlength=size).double()
    share = share / share.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"used": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}
