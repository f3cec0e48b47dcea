"""Self-attention over the whole sequence, with projections shared by the modalities or split between them.

Shape suffixes: B batch · T sequence · D width · H heads · A width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.model.segments import Segment

SHORT = 48  # tokens, up to which plain products are faster on a CPU than the fused kernel, by up to two times


class PerModality(nn.Module):
    """One copy of a layer for each modality; each segment goes through its own."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x_BTD: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        parts = [self.layers[s.modality](x_BTD[:, s.slice]) for s in segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Shared(nn.Module):
    """The same layer for every modality."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        return self.layer(x_BTD)


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention.

    shared: one set of norms and projections for all modalities (VLMo, VL-MoE); otherwise one set for each, while every
    token still attends to every other (BEiT-3). sub_ln: a LayerNorm before the output projection (Magneto, BEiT-3).
    """

    def __init__(
        self, width: int, heads: int, *, modalities: tuple[str, ...], shared: bool = True, sub_ln: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads

        def serve(make: type[nn.Module], *sizes: int) -> nn.Module:
            return Shared(make(*sizes)) if shared else PerModality({m: make(*sizes) for m in modalities})

        self.norm = serve(nn.LayerNorm, width)
        self.qkv = serve(nn.Linear, width, 3 * width)
        self.inner_norm = serve(nn.LayerNorm, width) if sub_ln else None
        self.out = serve(nn.Linear, width, width)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, segments: tuple[Segment, ...]) -> Tensor:
        """mask: bool, broadcastable to (B, heads, T, T), True where a row's token may look at a column's; None: all."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm(x_BTD, segments), segments)
        qkv_3BHTA = qkv.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if T <= SHORT and qkv.device.type == "cpu" and qkv.dtype == torch.float32:
            y_BHTA = _by_products(qkv_3BHTA, mask)
        else:
            q_BHTA, k_BHTA, v_BHTA = qkv_3BHTA
            y_BHTA = F.scaled_dot_product_attention(q_BHTA, k_BHTA, v_BHTA, attn_mask=mask)
        y_BTD = y_BHTA.transpose(1, 2).reshape(B, T, D)
        if self.inner_norm is not None:
            y_BTD = self.inner_norm(y_BTD, segments)
        return self.out(y_BTD, segments)


def _by_products(qkv_3BHTA: Tensor, mask: Tensor | None) -> Tensor:
    """`F.scaled_dot_product_attention`, spelled out; G is B * H."""
    _, B, H, T, A = qkv_3BHTA.shape
    q_GTA, k_GTA, v_GTA = qkv_3BHTA.reshape(3, B * H, T, A)
    hidden = qkv_3BHTA.new_zeros(1, 1, 1)
    if mask is not None:  # the smallest number, not -inf, which would make nan of a row that may look at nothing
        hidden = hidden.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(hidden.dtype).min)
        hidden = hidden.expand(B, H, *mask.shape[2:]).reshape(B * H, *mask.shape[2:])
    scores_GTT = torch.baddbmm(hidden, q_GTA, k_GTA.mT, alpha=A**-0.5)
    return torch.bmm(scores_GTT.softmax(dim=-1), v_GTA).view(B, H, T, A)
