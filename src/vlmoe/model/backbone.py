"""The Multiway transformer of VL-MoE: embeddings, blocks and a last norm.

Shape suffixes: B batch · T sequence · D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmoe.config import ModelConfig, UserError
from vlmoe.model.block import Block
from vlmoe.model.embed import ImageEmbedding, TextEmbedding
from vlmoe.model.segments import Part, Segment, causal_mask, join
from vlmoe.moe import Experts, FeedForward, MoELayer, Router, RoutingStats, SoftRouter, replay_context_fn


@dataclass
class BackboneOutput:
    """x_BTD: normed features of the whole sequence. stats: "block/modality" -> how that layer routed."""

    x_BTD: Tensor
    segments: tuple[Segment, ...]
    valid_BT: Tensor | None
    stats: dict[str, RoutingStats]

    def features(self, modality: str) -> Tensor:
        """(B, T of that modality, D). Raises KeyError when the sequence has no such part."""
        for segment in self.segments:
            if segment.modality == modality:
                return self.x_BTD[:, segment.slice]
        raise KeyError(f"no '{modality}' in this sequence of {[s.modality for s in self.segments]}")


class Backbone(nn.Module):
    """`backbone([backbone.image(pixels), backbone.text(ids, valid)])`: one part or several, in that order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEmbedding(config)
        self.text = TextEmbedding(config.width, config.vocabulary, config.max_text)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.reset_parameters()

    def forward(self, parts: list[Part], causal: str | None = None) -> BackboneOutput:
        """causal: a modality whose tokens look at no later ones, and which other modalities do not see at all, so that
        it can be generated from left to right (BEiT-3's captioning)."""
        x_BTD, valid_BT, segments = join(parts)
        mask = None if valid_BT is None else valid_BT[:, None, None, :]  # unexpanded: the fast form on CPU
        if causal is not None:
            self._check_causal(causal)
            order = causal_mask(segments, causal, x_BTD.device)
            mask = order if mask is None else mask & order
        stats: dict[str, RoutingStats] = {}
        for index, block in enumerate(self.blocks):
            if self.config.recompute and self.training and torch.is_grad_enabled():
                with _uncached_autocast(x_BTD.device.type):
                    x_BTD, routed = checkpoint(
                        block, x_BTD, valid_BT, mask, segments, use_reentrant=False, context_fn=replay_context_fn
                    )
            else:
                x_BTD, routed = block(x_BTD, valid_BT, mask, segments)
            stats |= {f"{index}/{modality}": s for modality, s in routed.items()}
        return BackboneOutput(self.norm(x_BTD), segments, valid_BT, stats)

    def routed_layers(self) -> dict[str, MoELayer]:
        """The sparse layers by the names that `BackboneOutput.stats` gives them: "block/modality"."""
        found = {}
        for index, block in enumerate(self.blocks):
            for modality, branch in block.branches.items():  # type: ignore[operator, union-attr]
                if isinstance(branch.layer, MoELayer):
                    found[f"{index}/{modality}"] = branch.layer
        return found

    def _check_causal(self, modality: str) -> None:
        side = getattr(self.config, modality)
        if side.sparse != "none" and side.router.type in ("soft", "expert_choice"):
            raise UserError(
                f"key 'model.{modality}.router.type' is {side.router.type}: its routing looks at later tokens, "
                f"so this model cannot write {modality} from left to right"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal of std 1/sqrt(width) for matrices, zero for biases.

        At width 768 that is 0.036, near BEiT's fixed 0.02, which at width 128 makes attention nearly uniform and
        training slow to start. The last matrix of each residual branch is divided by sqrt(2 * its block's number),
        which keeps the residual stream's size from growing with depth (BEiT).
        """
        std = 1 / math.sqrt(self.config.width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, Router, SoftRouter, Experts, FeedForward)):
                module.reset_parameters()
            if isinstance(module, (Experts, FeedForward)):
                nn.init.trunc_normal_(module.w1, std=std)
                nn.init.trunc_normal_(module.w2, std=std)
        self.image.reset_parameters(std)
        nn.init.trunc_normal_(self.text.position, std=std)
        for number, block in enumerate(self.blocks, start=1):
            for name, parameter in block.named_parameters():
                if name.endswith(".w2") or (".out." in name and name.endswith("weight")):
                    parameter.div_((2.0 * number) ** 0.5)


def _uncached_autocast(device: str) -> torch.autocast:
    """The autocast that is on, without its cache of converted weights: a block's second run must convert what its first
    did, and in a step's later passes the first would find the cache full, the second empty."""
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled=on, cache_enabled=False)
