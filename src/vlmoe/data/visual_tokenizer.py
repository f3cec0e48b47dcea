"""Visual tokens: every patch of an image becomes one of `codes` discrete codes, the target of masked image modelling.

One interface, `VisualTokenizer`, two kinds: `VQTokenizer`, a small vector-quantised autoencoder trained by the project
on the run's own images, and `StoredCodes`, which takes codes that another tokenizer (BEiT v2's, say) wrote beside each
image.

A code is a discrete thing: the smallest rounding that flips a near tie gives another target. So a `VQTokenizer` works
in float32 whatever the caller's autocast, and its codebook is kept free of near ties.

Shape suffixes: B batch · H, W pixels · P, N patches · G patches along a side · D width · Z codebook dimension ·
V codes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmoe.config import UserError, check_files, read_sealed, write_sealed
from vlmoe.data.batch import Batch
from vlmoe.data.tensors import save_tensors

IDLE_AFTER = 20  # steps without use after which a code is moved; so often codes are looked at
APART = 0.05  # codes whose cosine is above 1 - APART are one too many
DECAY = 0.98  # of the moving averages
RIDGE = 1e-4  # of the mean variance, added to each direction's before whitening

P = ParamSpec("P")
R = TypeVar("R")


class VisualTokenizer(Protocol):
    """What masked image modelling needs of a tokenizer."""

    codes: int

    def encode(self, batch: Batch) -> Tensor:
        """int64 (B, P): the code of each patch, on the batch's device."""
        ...

    def targets(self, batch: Batch) -> Tensor:
        """int64 (M,): the codes of the hidden patches alone, in the order of `Batch.hidden_patches`."""
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

    def targets(self, batch: Batch) -> Tensor:
        return self.encode(batch).flatten().index_select(0, batch.hidden_patches())

    def decode(self, codes_BP: Tensor) -> Tensor | None:
        return None


class _Mixer(nn.Module):
    """A residual 3x3 convolution over the patch grid: neighbours inform the pixels of a patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.reduce = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(F.gelu(self.expand(self.depthwise(self.norm(x)))))


class _Perceptron(nn.Module):
    """A residual layer on each patch alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(F.gelu(self.expand(self.norm(x))))


def _without_autocast(
    method: Callable[Concatenate[VQTokenizer, P], R],
) -> Callable[Concatenate[VQTokenizer, P], R]:
    @functools.wraps(method)
    def run(self: VQTokenizer, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(self.codebook_VZ.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return run


class VQTokenizer(nn.Module):
    """A vector-quantised autoencoder whose code grid is the model's patch grid. Always float32.

    Encoder: patches -> linear -> one perceptron -> whitened -> unit vectors of `dim`. It sees a patch alone, so equal
    patches have equal codes, whatever is around them. Quantiser: the nearest of `codes` vectors, learned by moving
    averages (van den Oord et al. 2017, appendix A.1; cosine distance as in BEiT v2). Decoder: two mixers -> linear ->
    pixels.

    Two things keep codes distinct. Whitening (Ermolov et al. 2021): without it the features keep to two or three of
    their `dim` directions, as the decoder can stretch what little differs, and codes crowd there. And codes that are
    idle (Dhariwal et al. 2020) or next to a busier one are moved to patches that are far from all codes.
    """

    codebook_VZ: Tensor
    count_V: Tensor
    sum_VZ: Tensor
    idle_V: Tensor
    mean_Z: Tensor
    covariance_ZZ: Tensor
    whitener_ZZ: Tensor
    steps: Tensor

    def __init__(self, image_size: int, patch: int, codes: int, dim: int, width: int) -> None:
        super().__init__()
        self.image_size, self.patch, self.codes, self.dim, self.width = image_size, patch, codes, dim, width
        pixels = 3 * patch * patch
        self.encoder = nn.Sequential(nn.Linear(pixels, width), _Perceptron(width), nn.Linear(width, dim))
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 1), _Mixer(width), _Mixer(width), nn.GroupNorm(1, width))
        self.decoder_out = nn.Conv2d(width, pixels, 1)
        self.register_buffer("codebook_VZ", F.normalize(torch.randn(codes, dim), dim=-1))
        self.register_buffer("count_V", torch.ones(codes))
        self.register_buffer("sum_VZ", self.codebook_VZ.clone())
        self.register_buffer("idle_V", torch.zeros(codes))
        self.register_buffer("mean_Z", torch.zeros(dim))
        self.register_buffer("covariance_ZZ", torch.eye(dim))
        self.register_buffer("whitener_ZZ", torch.eye(dim))
        self.register_buffer("steps", torch.zeros(()))
        self.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQTokenizer:
        """What `to`, `half`, `bfloat16` and the like go through: it is moved, but stays float32."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == torch.float32 else t.to(moved.device, torch.float32)

        return super()._apply(move, recurse)

    @_without_autocast
    def features(self, image_BCHW: Tensor, learn: bool = False) -> Tensor:
        """uint8 images -> unit vectors (B, P, Z). learn: whitened by this batch's moments, and the averages move."""
        return self._features(self._patches(image_BCHW), learn)

    def _patches(self, image_BCHW: Tensor) -> Tensor:
        """uint8 (B, P, C * patch * patch): pixels are few bytes to move while they are uint8."""
        return F.pixel_unshuffle(image_BCHW, self.patch).flatten(2).transpose(1, 2)

    def _features(self, patches: Tensor, learn: bool = False) -> Tensor:
        """uint8 patches (..., C * patch * patch) -> unit vectors (..., Z)."""
        x = self.encoder(patches.float() / 127.5 - 1.0)
        mean_Z, whitener_ZZ = self._batch_moments(x.flatten(0, 1)) if learn else (self.mean_Z, self.whitener_ZZ)
        return F.normalize((x - mean_Z) @ whitener_ZZ.T, dim=-1, eps=1e-3)

    def _batch_moments(self, x_NZ: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and whitening matrix of these features, with gradient. The averages, used later, move towards them."""
        mean_Z = x_NZ.mean(dim=0)
        covariance_ZZ = (x_NZ - mean_Z).T @ (x_NZ - mean_Z) / len(x_NZ)
        with torch.no_grad():
            self.steps += 1
            share = (1 / self.steps).clamp_min(1 - DECAY)  # the plain mean until DECAY's window is full
            self.mean_Z.lerp_(mean_Z, share)
            self.covariance_ZZ.lerp_(covariance_ZZ, share)
            self.whitener_ZZ.copy_(_whitener(self.covariance_ZZ))
        return mean_Z, _whitener(covariance_ZZ)

    @_without_autocast
    def nearest(self, z_BPZ: Tensor) -> Tensor:
        return (z_BPZ.float() @ self.codebook_VZ.T).argmax(dim=-1)

    @_without_autocast
    def pixels(self, z_BPZ: Tensor) -> Tensor:
        """Code vectors (B, P, Z) -> images in [-1, 1]."""
        G = self.image_size // self.patch
        x = self.decoder_out(self.decoder(z_BPZ.float().transpose(1, 2).unflatten(2, (G, G))))
        return F.pixel_shuffle(x, self.patch)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensor:
        assert batch.image_BCHW is not None
        return self.nearest(self.features(batch.image_BCHW))

    @torch.no_grad()
    @_without_autocast
    def targets(self, batch: Batch) -> Tensor:
        assert batch.image_BCHW is not None
        patches_NC = self._patches(batch.image_BCHW).flatten(0, 1)
        return self.nearest(self._features(patches_NC.index_select(0, batch.hidden_patches())))

    @torch.no_grad()
    def decode(self, codes_BP: Tensor) -> Tensor:
        image = self.pixels(F.embedding(codes_BP, self.codebook_VZ))
        return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @_without_autocast
    def loss(self, image_BCHW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reconstruction plus commitment, and the codes used (B, P); in training mode the codebook moves along."""
        target = image_BCHW.float() / 127.5 - 1.0
        z_BPZ = self.features(image_BCHW, learn=self.training)
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
        self.codebook_VZ.copy_(F.normalize(self.sum_VZ, dim=-1))
        self.idle_V.add_(1).masked_fill_(used_V > 0, 0)
        if int(self.steps) % IDLE_AFTER == 0:
            self._scatter(z_NZ.cpu(), generator)

    def _scatter(self, z_NZ: Tensor, generator: torch.Generator) -> None:
        """Move codes that are idle or next to a busier one onto patches far from every code, drawn in proportion to the
        squared distance (k-means++, Arthur and Vassilvitskii 2007). Where no patch is far, there is nothing for a code
        to stand for: it points anywhere, out of the way."""
        idle_V = self.idle_V >= IDLE_AFTER
        busiest_first_V = self.count_V.masked_fill(idle_V, 0).argsort(descending=True, stable=True)
        codes_VZ = self.codebook_VZ[busiest_first_V].cpu()
        moving_V = ((codes_VZ @ codes_VZ.T).tril(-1) > 1 - APART).any(dim=1) | idle_V[busiest_first_V].cpu()
        nearest_N = (z_NZ @ codes_VZ[~moving_V].T).amax(dim=1)  # the busiest never moves, so there is one
        for v in moving_V.nonzero().flatten().tolist():
            far_N = (1 - nearest_N).where(nearest_N < 1 - APART, 0)
            if far_N.any():
                codes_VZ[v] = z_NZ[torch.multinomial(far_N, 1, generator=generator)]
            else:
                codes_VZ[v] = F.normalize(torch.randn(self.dim, generator=generator), dim=0)
            nearest_N = torch.maximum(nearest_N, z_NZ @ codes_VZ[v])
        moved_V, new_VZ = busiest_first_V[moving_V.to(busiest_first_V.device)], codes_VZ[moving_V].to(self.sum_VZ)
        self.codebook_VZ[moved_V] = new_VZ
        self.sum_VZ[moved_V] = new_VZ
        self.count_V[moved_V] = 1.0
        self.idle_V[moved_V] = 0

    def save(self, folder: Path) -> None:
        """Write visual.safetensors and visual.json into `folder`; each appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        shape = {k: getattr(self, k) for k in ("image_size", "patch", "codes", "dim", "width")}
        temporary = folder / "visual.safetensors.tmp"
        save_tensors({k: v.contiguous() for k, v in self.state_dict().items()}, temporary)
        os.replace(temporary, folder / "visual.safetensors")
        # written last: its presence says that the tokenizer is complete
        write_sealed(folder / "visual.json", shape, ["visual.safetensors"])

    @classmethod
    def load(cls, folder: Path) -> VQTokenizer:
        """Raises UserError naming the file when it is missing, altered or does not fit."""
        if not folder.exists():
            raise UserError(f"visual tokenizer in {folder}: no such folder")
        try:
            for name in ("visual.json", "visual.safetensors"):
                if not (folder / name).is_file():
                    raise UserError(f"visual tokenizer in {folder}: missing file {name}")
            shape = read_sealed(folder / "visual.json")
            if "files" in shape:  # visual.json of earlier versions listed none
                check_files(folder / "visual.json", shape, ["visual.safetensors"])
                del shape["files"]
            tokenizer = cls(**shape)
            state = load_file(folder / "visual.safetensors")
            if state.keys() != tokenizer.state_dict().keys():
                raise UserError(
                    f"visual tokenizer in {folder}: visual.safetensors is of another kind, perhaps written by an "
                    "earlier version, whose codes are not this version's: train it anew"
                )
            tokenizer.load_state_dict(state)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"visual tokenizer in {folder}: cannot be read: {error}") from None
        return tokenizer.eval().requires_grad_(False)


def _whitener(covariance_ZZ: Tensor) -> Tensor:
    """W with W C W' = I, by Cholesky's decomposition; the ridge keeps features without variance from becoming inf."""
    eye_ZZ = torch.eye(len(covariance_ZZ), device=covariance_ZZ.device)
    ridge = RIDGE * covariance_ZZ.diagonal().mean() + 1e-8
    lower_ZZ, _ = torch.linalg.cholesky_ex(covariance_ZZ + ridge * eye_ZZ)  # without waiting for the device
    return torch.linalg.solve_triangular(lower_ZZ, eye_ZZ, upper=False)
