"""What a patch passes before its projection: nothing (linear, as in BEiT-3), or convolutions that stay within it.

Shape suffixes: N patches · C channels of the picture · p pixels along a patch's edge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.config import ModelConfig

STRIDES = (2, 1, 2)  # of each convolution
KERNEL = 3
FAINT = 0.1  # of pixels from -1 to 1: deviations well below this are not blown up


def stem_channels(config: ModelConfig) -> tuple[int, int, int]:
    """Channels that each convolution gives."""
    first = config.stem_channels
    return first, 2 * first, 2 * first


def stem_sides(patch: int) -> list[int]:
    """Pixels along a patch's edge after each convolution: divided by the stride, rounded up."""
    return [-(-patch // math.prod(STRIDES[: n + 1])) for n in range(len(STRIDES))]


def stem_features(config: ModelConfig) -> int:
    """Values of one patch that the projection sees."""
    if config.patch_stem == "linear":
        return 3 * config.patch**2
    return stem_channels(config)[-1] * stem_sides(config.patch)[-1] ** 2 + 2 * 3


def stem_convolutions(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(values in, channels out, positions) of each convolution on one patch: a product of these sizes."""
    if config.patch_stem == "linear":
        return []
    channels, sides = stem_channels(config), stem_sides(config.patch)
    return [(KERNEL**2 * i, o, side**2) for i, o, side in zip((3, *channels[:-1]), channels, sides, strict=True)]


class ConvStem(nn.Module):
    """Three 3x3 convolutions, each with a GELU (after Xiao et al. 2021, "Early convolutions help transformers see
    better"), here on each patch alone with zeros around it: nothing of a hidden patch reaches its neighbours.

    They see what sets its pixels apart: the patch less its mean, over its deviation, colour by colour. Mean and
    deviation go beside what they find to the projection. A linear one must tell shapes by pixels in place, and most of
    what it sees is which colours there are; this one can look for strokes and corners in any colour.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch, channels = config.patch, stem_channels(config)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, KERNEL, stride, padding=1)
            for i, o, stride in zip((3, *channels[:-1]), channels, STRIDES, strict=True)
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He et al. 2015: features keep the size of the pixels."""
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def forward(self, patches_BPC: Tensor) -> Tensor:
        """(B, P, 3 * p * p), as `patchify` cuts them, to (B, P, `stem_features`)."""
        x = patches_BPC.flatten(0, 1).unflatten(1, (3, self.patch, self.patch))
        mean = x.mean(dim=(2, 3), keepdim=True)
        deviation = ((x - mean).square().mean(dim=(2, 3), keepdim=True) + FAINT**2).sqrt()
        flat = torch.cat([mean, deviation], dim=1).flatten(1)
        x = (x - mean) / deviation
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        return torch.cat([x.flatten(1), flat], dim=1).unflatten(0, patches_BPC.shape[:2])
