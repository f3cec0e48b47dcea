"""From pixels and token ids to the parts of a sequence.

Shape suffixes: B batch · C channels · H, W pixels · P patches · T text tokens · D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmoe.config import ModelConfig
from vlmoe.model.segments import Part
from vlmoe.model.stem import ConvStem, stem_features

POSITION_SCALE = 2.0  # of the sines and cosines; patches project to a standard deviation of about 1


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """Cut images into square patches, row by row: (B, C, H, W) -> (B, P, C * patch * patch)."""
    B, C, H, W = image_BCHW.shape
    x = image_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), C * patch * patch)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1] in float32, as BEiT and BEiT-3 feed them."""
    return pixels.float() / 127.5 - 1.0


class ImageEmbedding(nn.Module):
    """Patches -> stem, where there is one -> linear projection, with a leading class token and learned positions.
    Hidden patches show the mask token in their place."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_size, self.patch = config.image_size, config.patch
        patches, width = (config.image_size // config.patch) ** 2, config.width
        self.stem = ConvStem(config) if config.patch_stem == "conv" else None
        self.project = nn.Linear(stem_features(config), width)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 1 + patches, width))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Positions start as 2D sines and cosines (MAE) and not smaller than what patches show: drawn small at random,
        where something stands is learned long after what it is. Everything is trained."""
        for parameter in (self.project.weight, self.class_token, self.mask_token):
            nn.init.trunc_normal_(parameter, std=std)
        nn.init.zeros_(self.project.bias)
        if self.stem is not None:
            self.stem.reset_parameters()
        side = self.image_size // self.patch
        self.position.zero_()
        self.position[0, 1:] = POSITION_SCALE * sincos_2d(side, self.position.shape[-1])

    def rate_by_fan_in(self) -> float:
        """Factor on the learning rate of the projection's matrix, width over inputs, at most 1.

        A step of Adam changes each weight by about its rate, so an output of n inputs that vary together by n times the
        rate. Where a patch has far more values than the model is wide, that is far more than in any other layer, and
        what patches show drowns in it; so the rate falls with n, as Yang et al. 2022 (muP) have it for hidden matrices.
        """
        return min(1.0, self.project.out_features / self.project.in_features)

    def forward(self, image_BCHW: Tensor, mask_BP: Tensor | None = None) -> Part:
        """image_BCHW: uint8 (B, 3, image_size, image_size). mask_BP: True where the patch is hidden.

        Returns the part "vision" of 1 + P tokens, the class token first.
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(image_BCHW.shape[1:]) != expected or image_BCHW.dtype != torch.uint8:
            wanted = f"uint8 (B, {', '.join(map(str, expected))})"
            raise ValueError(f"images: got {image_BCHW.dtype} {tuple(image_BCHW.shape)}, expected {wanted}")
        x_BPC = to_unit(patchify(image_BCHW, self.patch)).to(self.position.dtype)
        x_BPD = self.project(x_BPC if self.stem is None else self.stem(x_BPC))
        if mask_BP is not None:
            x_BPD = torch.where(mask_BP[..., None], self.mask_token.to(x_BPD.dtype), x_BPD)
        first = self.class_token.to(x_BPD.dtype).expand(x_BPD.shape[0], -1, -1)
        return Part("vision", torch.cat([first, x_BPD], dim=1) + self.position)


def sincos_2d(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (side * side, width): a quarter of the width each for sin and cos of each,
    in wavelengths from 2 pi to 10,000 * 2 pi patches (Vaswani et al. 2017, in two dimensions as in MAE)."""
    quarter = width // 4
    frequency = 10_000 ** -(torch.arange(quarter) / max(quarter, 1))
    angle = torch.arange(side)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
    row, column = one.repeat_interleave(side, dim=0), one.repeat(side, 1)
    table = torch.zeros(side * side, width)
    table[:, : 4 * quarter] = torch.cat([row, column], dim=1)
    return table


class TextEmbedding(nn.Module):
    """Token ids -> learned embedding plus learned position."""

    def __init__(self, width: int, vocabulary: int, max_text: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(1, max_text, width))

    def forward(self, text_BT: Tensor, valid_BT: Tensor | None = None) -> Part:
        """text_BT: int64 ids. valid_BT: True at real tokens. Returns the part "text" of T tokens."""
        T, longest = text_BT.shape[1], self.position.shape[1]
        if T > longest:
            raise ValueError(f"texts: got {T} tokens, expected at most model.max_text = {longest}")
        return Part("text", self.tokens(text_BT) + self.position[:, :T], valid_BT)
