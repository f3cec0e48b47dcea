"""One Multiway block: self-attention for all, then for each segment the feed-forward or mixture that serves it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmoe.config import ModalityConfig, ModelConfig, sparse_blocks
from vlmoe.model.attention import SelfAttention
from vlmoe.model.parameters import expert_hidden, has_common, hidden_size
from vlmoe.model.segments import Segment
from vlmoe.moe import Experts, FeedForward, MoELayer, RoutingStats, SoftMoELayer

MODALITIES = ("vision", "text")


class Branch(nn.Module):
    """The pre-norm feed-forward side of one modality: dense, or a sparse mixture that also tells how it routed."""

    def __init__(self, width: int, layer: FeedForward | MoELayer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layer = layer

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None, common: Experts | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        x_BTD = self.norm(x_BTD)
        if isinstance(self.layer, MoELayer):
            return self.layer(x_BTD, valid_BT, common)
        return self.layer(x_BTD), None


class Block(nn.Module):
    """Self-attention and feed-forward with residuals.

    `branches` holds one `Branch` per modality; `fused`, in the top blocks, is the dense VL-FFN that serves all tokens
    of a sequence made of several modalities (VLMo: image-only and text-only sequences keep their own branch there).
    `common` holds experts that both modalities' routers may choose besides their own.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention = SelfAttention(
            config.width,
            config.heads,
            modalities=MODALITIES,
            shared=config.attention == "shared",
            sub_ln=config.sub_ln,
        )
        self.branches = nn.ModuleDict(
            {name: Branch(config.width, _layer(config, getattr(config, name), index)) for name in MODALITIES}
        )
        self.common = _common_experts(config) if has_common(config, index) else None
        fused = index >= config.depth - config.vl_ffn
        self.fused = Branch(config.width, _dense(config)) if fused else None
        self.drop_path = DropPath(config.drop_path * index / max(config.depth - 1, 1))

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None, mask: Tensor | None, segments: tuple[Segment, ...]
    ) -> tuple[Tensor, dict[str, RoutingStats]]:
        """Returns the new x_BTD and, for each modality routed here, how it was. mask: see `SelfAttention`."""
        x_BTD = x_BTD + self.drop_path(self.attention(x_BTD, mask, segments))
        if self.fused is not None and len(segments) > 1:
            return x_BTD + self.drop_path(self.fused(x_BTD, valid_BT)[0]), {}
        parts, stats = [], {}
        for segment in segments:
            valid = valid_BT[:, segment.slice] if valid_BT is not None and segment.padded else None
            y, routed = self.branches[segment.modality](x_BTD[:, segment.slice], valid, self.common)
            parts.append(y)
            if routed is not None:
                stats[segment.modality] = routed
        y_BTD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return x_BTD + self.drop_path(y_BTD), stats


class DropPath(nn.Module):
    """Stochastic depth: in training the residual of a whole sample is dropped with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x_BTD
        keep = x_BTD.new_empty(x_BTD.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return x_BTD * keep / (1 - self.rate)


def _dense(config: ModelConfig) -> FeedForward:
    return FeedForward(config.width, hidden_size(config), activation=config.activation, inner_norm=config.sub_ln)


def _layer(config: ModelConfig, side: ModalityConfig, index: int) -> FeedForward | MoELayer:
    if index not in sparse_blocks(side.sparse, config.depth):
        return _dense(config)
    common = config.common_experts if has_common(config, index) else 0
    return make_layer(config.width, expert_hidden(config, side), config.activation, config.sub_ln, side, common)


def make_layer(
    width: int, hidden: int, activation: str, inner_norm: bool, side: ModalityConfig, common: int = 0
) -> MoELayer:
    """The sparse layer a recipe describes. hidden: of an expert before it is split by the granularity."""
    m, options = side.granularity, vars(side.router) | {"dropout": side.expert_dropout, "shared": side.shared_experts}
    options["router"], options["k"], slots = options.pop("type"), m * side.router.k, options.pop("slots")
    sizes = (width, hidden // m, m * side.experts)
    if options["router"] == "soft":
        del options["router"]
        return SoftMoELayer(*sizes, activation=activation, inner_norm=inner_norm, slots=slots, **options)
    return MoELayer(*sizes, activation=activation, inner_norm=inner_norm, common=m * common, **options)


def _common_experts(config: ModelConfig) -> Experts:
    side = config.vision
    return Experts(
        config.width, expert_hidden(config, side) // side.granularity, side.granularity * config.common_experts,
        config.activation, inner_norm=config.sub_ln, dropout=side.expert_dropout, backend=side.router.backend,
    )  # fmt: skip
