"""Visual tokens: every patch of an image becomes one of `codes` discrete codes, the target of masked image modelling.

One interface, `VisualTokenizer`, two kinds: `VQTokenizer`, a small vector-quantised autoencoder trained by the project
on the run's own images, and `StoredCodes`, which takes codes that another tokenizer (BEiT v2's, say) wrote beside each
image.

Shape suffixes: B batch · H, W pixels · P patches · G patches along a side · D width · Z codebook dimension · V codes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmoe.config import ModelConfig, UserError, VisualTokenizerConfig, read_json
from vlmoe.data.batch import Batch

IDLE_AFTER = 20  # steps without use after which a code is moved onto a current patch
DECAY = 0.98  # of the moving averages of the codebook


class VisualTokenizer(Protocol):
    """What masked image modelling needs of a tokenizer."""

    codes: int

    def encode(self, batch: Batch) -> Tensor:
        """int64 (B, P): the code of each patch, on the batch's device."""
        ...

    def decode(self, codes_BP: Tensor) -> Tensor | None:
        """uint8 (B, 3, H, W) for looking at, or None where codes cannot be turned into pixels."""
        ...


class StoredCodes:
    """Codes computed beforehand and stored with the images (`codes.npy` in a shard, a `codes` column in parquet).

    The images must then enter the model as they were when the codes were made: same size, no random crop.
    """

    def __init__(self, codes: int) -> None:
        self.codes = codes

    def encode(self, batch: Batch) -> Tensor:
        if batch.codes_BP is None:
            raise UserError(
                "data.visual_tokenizer.type is 'codes', but the samples carry none: expected a codes.npy member in "
                f"each shard entry or a 'codes' column (first sample: {batch.keys[0] if batch.keys else '?'})"
            )
        largest = int(batch.codes_BP.max())
        if largest >= self.codes:
            raise UserError(f"stored visual code {largest} is not below model.codes = {self.codes}")
        return batch.codes_BP.long()

    def decode(self, codes_BP: Tensor) -> Tensor | None:
        return None


class _Mixer(nn.Module):
    """A residual 3x3 convolution over the patch grid: neighbours inform a code without moving it off its patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.reduce = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(F.gelu(self.expand(self.depthwise(self.norm(x)))))


class VQTokenizer(nn.Module):
    """A vector-quantised autoencoder whose code grid is the model's patch grid.

    Encoder: patches -> linear -> one mixer -> unit vectors of `dim`. Quantiser: the nearest of `codes` vectors, learned
    by moving averages (van den Oord et al. 2017, appendix A.1; cosine distance as in BEiT v2), idle codes moved onto
    current patches (Dhariwal et al. 2020). Decoder: two mixers -> linear -> pixels.
    """

    codebook_VZ: Tensor
    count_V: Tensor
    sum_VZ: Tensor
    idle_V: Tensor

    def __init__(self, image_size: int, patch: int, codes: int, dim: int, width: int) -> None:
        super().__init__()
        self.image_size, self.patch, self.codes, self.dim, self.width = image_size, patch, codes, dim, width
        pixels = 3 * patch * patch
        self.encoder_in = nn.Conv2d(3, width, patch, stride=patch)
        self.encoder = nn.Sequential(_Mixer(width), nn.Conv2d(width, dim, 1))
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 1), _Mixer(width), _Mixer(width), nn.GroupNorm(1, width))
        self.decoder_out = nn.Conv2d(width, pixels, 1)
        self.register_buffer("codebook_VZ", F.normalize(torch.randn(codes, dim), dim=-1))
        self.register_buffer("count_V", torch.ones(codes))
        self.register_buffer("sum_VZ", self.codebook_VZ.clone())
        self.register_buffer("idle_V", torch.zeros(codes))

    def features(self, image_BCHW: Tensor) -> Tensor:
        """uint8 images -> unit vectors (B, P, Z)."""
        x = self.encoder(self.encoder_in(image_BCHW.float() / 127.5 - 1.0))
        return F.normalize(x.flatten(2).transpose(1, 2), dim=-1)

    def nearest(self, z_BPZ: Tensor) -> Tensor:
        return (z_BPZ @ self.codebook_VZ.T).argmax(dim=-1)

    def pixels(self, z_BPZ: Tensor) -> Tensor:
        """Code vectors (B, P, Z) -> images in [-1, 1]."""
        G = self.image_size // self.patch
        x = self.decoder_out(self.decoder(z_BPZ.transpose(1, 2).unflatten(2, (G, G))))
        return F.pixel_shuffle(x, self.patch)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensor:
        assert batch.image_BCHW is not None
        return self.nearest(self.features(batch.image_BCHW))

    @torch.no_grad()
    def decode(self, codes_BP: Tensor) -> Tensor:
        image = self.pixels(F.embedding(codes_BP, self.codebook_VZ))
        return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def loss(self, image_BCHW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reconstruction plus commitment, and the codes used (B, P); in training mode the codebook moves along."""
        target = image_BCHW.float() / 127.5 - 1.0
        z_BPZ = self.features(image_BCHW)
        codes_BP = self.nearest(z_BPZ)
        q_BPZ = F.embedding(codes_BP, self.codebook_VZ)
        straight = z_BPZ + (q_BPZ - z_BPZ).detach()
        loss = F.mse_loss(self.pixels(straight), target) + 0.25 * F.mse_loss(z_BPZ, q_BPZ)
        if self.training:
            self._move_codebook(z_BPZ.detach().flatten(0, 1), codes_BP.flatten(), generator)
        return loss, codes_BP

    @torch.no_grad()
    def _move_codebook(self, z_NZ: Tensor, codes_N: Tensor, generator: torch.Generator) -> None:
        used_V = torch.bincount(codes_N, minlength=self.codes).to(z_NZ.dtype)
        total_VZ = torch.zeros_like(self.sum_VZ).index_add_(0, codes_N, z_NZ)
        self.count_V.mul_(DECAY).add_(used_V, alpha=1 - DECAY)
        self.sum_VZ.mul_(DECAY).add_(total_VZ, alpha=1 - DECAY)
        self.codebook_VZ.copy_(F.normalize(self.sum_VZ / self.count_V.clamp_min(1e-5)[:, None], dim=-1))
        self.idle_V.add_(1).masked_fill_(used_V > 0, 0)
        idle = (self.idle_V >= IDLE_AFTER).nonzero().flatten()
        if idle.numel():
            pick = torch.randint(z_NZ.shape[0], (idle.numel(),), generator=generator).to(z_NZ.device)
            self.codebook_VZ[idle] = z_NZ[pick]
            self.sum_VZ[idle] = z_NZ[pick]
            self.count_V[idle] = 1.0
            self.idle_V[idle] = 0

    def save(self, folder: Path) -> None:
        """Write visual.safetensors and visual.json into `folder`; each appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        shape = {k: getattr(self, k) for k in ("image_size", "patch", "codes", "dim", "width")}
        temporary = folder / "visual.safetensors.tmp"
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, temporary)
        os.replace(temporary, folder / "visual.safetensors")
        temporary = folder / "visual.json.tmp"  # written last: its presence says that the tokenizer is complete
        temporary.write_text(json.dumps(shape, indent=1))
        os.replace(temporary, folder / "visual.json")

    @classmethod
    def load(cls, folder: Path) -> VQTokenizer:
        """Raises UserError naming the file when it is missing or does not fit."""
        try:
            for name in ("visual.json", "visual.safetensors"):
                if not (folder / name).is_file():
                    raise UserError(f"visual tokenizer in {folder}: missing file {name}")
            tokenizer = cls(**read_json(folder / "visual.json"))
            tokenizer.load_state_dict(load_file(folder / "visual.safetensors"))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"visual tokenizer in {folder}: cannot be read: {error}") from None
        return tokenizer.eval().requires_grad_(False)


def code_use(codes: Tensor, size: int) -> dict[str, float]:
    """How well a codebook is used: `used`, the share of codes that occur, and `perplexity`, the effective number."""
    share = torch.bincount(codes.flatten().cpu(), minlength=size).double()
    share = share / share.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"used": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}


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

    Returns it frozen, with its report on `held_out`: mean squared error against the variance of the pixels
    (`unexplained`), share of codes in use and perplexity.
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
        loss, _ = tokenizer.loss(next(images).to(device), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19 or step + 1 == config.steps:
            progress(step + 1, loss.item())
    tokenizer.eval().requires_grad_(False)
    return tokenizer, tokenizer_report(tokenizer, held_out.to(device))


@torch.no_grad()
def tokenizer_report(tokenizer: VQTokenizer, image_BCHW: Tensor) -> dict[str, float]:
    """Held-out quality of a tokenizer; see `train_vq`."""
    target = image_BCHW.float() / 127.5 - 1.0
    codes_BP = tokenizer.nearest(tokenizer.features(image_BCHW))
    error = F.mse_loss(tokenizer.pixels(F.embedding(codes_BP, tokenizer.codebook_VZ)), target)
    return {"unexplained": float(error / target.var()), **code_use(codes_BP, tokenizer.codes)}
