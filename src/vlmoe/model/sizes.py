"""What a model weighs and costs, from its recipe alone, before anything runs.

Everything here is arithmetic; tests hold it against the built module and torch's FLOP counter. What a whole training
step costs, by part, with its memory: `vlmoe.model.accounting`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vlmoe.config import ModelConfig
from vlmoe.model.flops import Shape, flops
from vlmoe.model.parameters import (
    BranchSize,
    attention_params,
    branch_size,
    common_params,
    embedding_params,
    ffn_params,
    head_params,
    hidden_size,
)

FP32 = 4  # bytes; weights, gradients and both moments of AdamW are kept in float32


@dataclass
class Sizes:
    """parameters: counts by part, of the backbone with its embeddings (as papers count); the two pre-training heads
    apart in `params_heads`. params_per_token: all of them but the experts a token does not choose, for an image-text
    pair (the published "parameters per token"). params_per_vision_token, params_per_text_token: what one token of that
    modality passes through in a single-modality sequence, embeddings tables left out. expansion: parameters of the
    feed-forward layers over those of them that are used per token, 1 for a dense model; the "number of experts" of a
    scaling law, for any k, placement and shared experts.
    flops_per_token: forward pass of the backbone, mean over the tokens of a pair of one full image and `max_text`
    tokens; flops_per_pair by part; training costs three times the forward pass.
    memory_bytes: weights, gradients and AdamW's moments in float32, activations not included.
    """

    params_total: int
    params_per_token: int
    params_per_vision_token: int
    params_per_text_token: int
    params_heads: int
    params_by_part: dict[str, int]
    expansion: float
    flops_per_token: int
    flops_per_pair: int
    flops_per_pair_by_part: dict[str, int]
    tokens_per_pair: int
    memory_bytes: int
    memory_bytes_by_part: dict[str, int]

    @property
    def params_active(self) -> int:
        """Per token, embeddings left out."""
        return self.params_per_token - self.params_by_part["embeddings"]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def sizes(config: ModelConfig) -> Sizes:
    """Predict a model's sizes. Pure arithmetic, nothing is allocated."""
    D, everywhere = config.width, range(config.depth)
    vision = [branch_size(config, config.vision, index) for index in everywhere]
    text = [branch_size(config, config.text, index) for index in everywhere]
    attention = config.depth * attention_params(config)
    parts = {
        "embeddings": sum(embedding_params(config)),
        "attention": attention,
        "vision_ffn": sum(b.total for b in vision),
        "text_ffn": sum(b.total for b in text),
        "vl_ffn": config.vl_ffn * (ffn_params(config, hidden_size(config)) + 2 * D),
        "common_experts": sum(common_params(config, index) for index in everywhere),
        "routers": sum(b.router for b in vision + text),
        "norm": 2 * D,
    }
    total = sum(parts.values())
    idle = parts["common_experts"] + sum(b.total - b.per_token for b in vision + text)
    feed_forward = parts["vision_ffn"] + parts["text_ffn"] + parts["vl_ffn"] + parts["common_experts"]
    own_attention = attention // (1 if config.attention == "shared" else 2)

    def one_token(branches: list[BranchSize]) -> int:
        return own_attention + sum(b.per_token + b.router for b in branches) + 2 * D

    heads = sum(head_params(config))
    pair = Shape("pair", 1, config.max_text, config.max_text)
    forward = flops(config, pair).forward
    cost = {
        "embeddings": int(forward["embeddings"]),
        "attention": int(forward["attention"]),
        "vision_ffn": int(forward["vision"]),
        "text_ffn": int(forward["text"]),
        "vl_ffn": int(forward["vl"]),
        "routers": int(forward["router"]),
    }
    memory = {
        "weights": FP32 * (total + heads),
        "gradients": FP32 * (total + heads),
        "optimizer": 2 * FP32 * (total + heads),
    }
    tokens = pair.tokens(config)
    return Sizes(
        params_total=total,
        params_per_token=total - idle,
        params_per_vision_token=one_token(vision),
        params_per_text_token=one_token(text),
        params_heads=heads,
        params_by_part=parts,
        expansion=feed_forward / (feed_forward - idle),
        flops_per_token=sum(cost.values()) // tokens,
        flops_per_pair=sum(cost.values()),
        flops_per_pair_by_part=cost,
        tokens_per_pair=tokens,
        memory_bytes=sum(memory.values()),
        memory_bytes_by_part=memory,
    )


def describe(name: str, config: ModelConfig) -> str:
    """The sizes as text for people."""
    s = sizes(config)
    lines = [
        *describe_parameters(name, config),
        f"  FLOPs, forward       {short(s.flops_per_token)} per token, {short(s.flops_per_pair)} per pair of "
        f"{s.tokens_per_pair} tokens; training costs three times that",
        *(f"    {part:<18} {short(count)}" for part, count in s.flops_per_pair_by_part.items()),
        f"  memory, training     {s.memory_bytes / 2**30:.2f} GiB for "
        + ", ".join(f"{part} {size / 2**30:.2f}" for part, size in s.memory_bytes_by_part.items())
        + "; activations come on top",
    ]
    return "\n".join(lines)


def describe_parameters(name: str, config: ModelConfig) -> list[str]:
    s = sizes(config)
    return [
        f"{name}: {config.depth} blocks, width {config.width}, {config.image_size} px in patches of {config.patch}, "
        f"texts of {config.max_text} tokens",
        f"  parameters           {short(s.params_total)} in all, {short(s.params_per_token)} per token "
        f"(+ {short(s.params_heads)} in the pre-training heads)",
        *(f"    {part:<18} {short(count)}" for part, count in s.params_by_part.items()),
    ]


def short(count: float) -> str:
    """1_937_000_000 -> '1.94G', in powers of a thousand."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}" if isinstance(count, float) else str(count)
