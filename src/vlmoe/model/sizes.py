"""What a model weighs and costs, from its recipe alone: parameters, FLOPs and memory before anything runs.

A multiply-add counts as two FLOPs. Norms, biases, softmax and activations are left out of FLOPs, as usual: they are
below 1% at width 768. Everything here is arithmetic; tests hold it against the built module and torch's FLOP counter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vlmoe.config import ModalityConfig, ModelConfig, sparse_blocks

FP32 = 4  # bytes; weights, gradients and both moments of AdamW are kept in float32


@dataclass
class Sizes:
    """parameters: counts by part, of the backbone with its embeddings (as papers count); the two pre-training heads
    apart in `params_heads`. params_per_token: all of them but the experts a token does not choose, for an image-text
    pair (the published "parameters per token"). params_per_vision_token, params_per_text_token: what one token of that
    modality passes through in a single-modality sequence, embeddings tables left out.
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
    flops_per_token: int
    flops_per_pair: int
    flops_per_pair_by_part: dict[str, int]
    tokens_per_pair: int
    memory_bytes: int
    memory_bytes_by_part: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def hidden_size(config: ModelConfig) -> int:
    """Hidden units of a feed-forward layer or expert."""
    return int(config.width * config.mlp_ratio)


def _ffn_params(config: ModelConfig, hidden: int | None = None) -> int:
    D, H = config.width, hidden_size(config) if hidden is None else hidden
    up = 2 * H if config.activation == "swiglu" else H
    return D * up + up + H * D + D


def _ffn_flops(config: ModelConfig) -> int:
    """Of one token."""
    D, H = config.width, hidden_size(config)
    return 2 * D * H * (3 if config.activation == "swiglu" else 2)


def _attention_params(config: ModelConfig) -> int:
    D = config.width
    one = 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (2 * D if config.sub_ln else 0)
    return one * (1 if config.attention == "shared" else 2)


def _side(config: ModelConfig, side: ModalityConfig, blocks: range) -> tuple[int, int, int, int, int]:
    """Feed-forward side of a modality over `blocks`: parameters with norms (total, of one token), router parameters,
    FLOPs of one token in the feed-forward layers, FLOPs of one token in the routers."""
    ffn, sparse, m = _ffn_params(config), sparse_blocks(side.sparse, config.depth), side.granularity
    one = _ffn_params(config, hidden_size(config) // m)
    shared = _ffn_params(config, side.shared_experts * hidden_size(config) // m) if side.shared_experts else 0
    total = active = router = flops = router_flops = 0
    for index in blocks:
        norm = 2 * config.width
        if index not in sparse:
            total, active, flops = total + ffn + norm, active + ffn + norm, flops + _ffn_flops(config)
            continue
        common = config.common_experts if has_common(config, index) else 0
        total += m * side.experts * one + shared + norm
        active += m * side.router.k * one + shared + norm
        flops += side.router.k * _ffn_flops(config) + side.shared_experts * _ffn_flops(config) // m
        weights, cost = _router(config, side, m * (side.experts + common))
        router, router_flops = router + weights, router_flops + cost
    return total, active, router, flops, router_flops


def _router(config: ModelConfig, side: ModalityConfig, experts: int) -> tuple[int, int]:
    """Parameters of a router, and its FLOPs for one token. Of soft routing, the slots' and the mixing's."""
    D = config.width
    if side.router.type == "cosine":
        dim = min(D, 256)
        return experts * dim + dim * D + 1, 2 * (dim * D + experts * dim)
    if side.router.type == "soft":
        return experts * side.router.slots * D + 1, 3 * 2 * experts * side.router.slots * D
    return experts * D, 2 * experts * D


def has_common(config: ModelConfig, index: int) -> bool:
    """Whether a block has experts that both modalities may choose."""
    both = all(index in sparse_blocks(side.sparse, config.depth) for side in (config.vision, config.text))
    return both and config.common_experts > 0


def sizes(config: ModelConfig) -> Sizes:
    """Predict a model's sizes. Pure arithmetic, nothing is allocated."""
    D, depth = config.width, config.depth
    patches, pixels = (config.image_size // config.patch) ** 2, 3 * config.patch**2
    vision_T, text_T = 1 + patches, config.max_text
    pair_T = vision_T + text_T
    everywhere = range(depth)
    v_total, v_active, v_router, _, _ = _side(config, config.vision, everywhere)
    t_total, t_active, t_router, _, _ = _side(config, config.text, everywhere)
    vl = config.vl_ffn * (_ffn_params(config) + 2 * D)
    m = config.vision.granularity
    one = _ffn_params(config, hidden_size(config) // m)
    common = sum(has_common(config, index) for index in everywhere) * m * config.common_experts * one
    attention = depth * _attention_params(config)
    image_embedding = pixels * D + D + 2 * D + vision_T * D
    text_embedding = config.vocabulary * D + config.max_text * D
    parts = {
        "embeddings": image_embedding + text_embedding,
        "attention": attention,
        "vision_ffn": v_total,
        "text_ffn": t_total,
        "vl_ffn": vl,
        "common_experts": common,
        "routers": v_router + t_router,
        "norm": 2 * D,
    }
    total = sum(parts.values())
    own_attention = depth * _attention_params(config) // (1 if config.attention == "shared" else 2)
    heads = config.vocabulary + D * config.codes + config.codes

    # A pair: below the top `vl_ffn` blocks each token takes its modality's branch, in them the VL-FFN.
    below = range(depth - config.vl_ffn)
    _, _, _, v_flops, v_router_flops = _side(config, config.vision, below)
    _, _, _, t_flops, t_router_flops = _side(config, config.text, below)
    flops = {
        "embeddings": 2 * pixels * D * patches,
        "attention": depth * (8 * D * D * pair_T + 4 * D * pair_T * pair_T),
        "vision_ffn": v_flops * vision_T,
        "text_ffn": t_flops * text_T,
        "vl_ffn": config.vl_ffn * _ffn_flops(config) * pair_T,
        "routers": v_router_flops * vision_T + t_router_flops * text_T,
    }
    memory = {
        "weights": FP32 * (total + heads),
        "gradients": FP32 * (total + heads),
        "optimizer": 2 * FP32 * (total + heads),
    }
    return Sizes(
        params_total=total,
        params_per_token=total - common - (v_total - v_active) - (t_total - t_active),
        params_per_vision_token=own_attention + v_active + v_router + 2 * D,
        params_per_text_token=own_attention + t_active + t_router + 2 * D,
        params_heads=heads,
        params_by_part=parts,
        flops_per_token=sum(flops.values()) // pair_T,
        flops_per_pair=sum(flops.values()),
        flops_per_pair_by_part=flops,
        tokens_per_pair=pair_T,
        memory_bytes=sum(memory.values()),
        memory_bytes_by_part=memory,
    )


def describe(name: str, config: ModelConfig) -> str:
    """The sizes as text for people."""
    s = sizes(config)
    lines = [
        f"{name}: {config.depth} blocks, width {config.width}, {config.image_size} px in patches of {config.patch}, "
        f"texts of {config.max_text} tokens",
        f"  parameters           {_short(s.params_total)} in all, {_short(s.params_per_token)} per token "
        f"(+ {_short(s.params_heads)} in the pre-training heads)",
        *(f"    {part:<18} {_short(count)}" for part, count in s.params_by_part.items()),
        f"  FLOPs, forward       {_short(s.flops_per_token)} per token, {_short(s.flops_per_pair)} per pair of "
        f"{s.tokens_per_pair} tokens; training costs three times that",
        *(f"    {part:<18} {_short(count)}" for part, count in s.flops_per_pair_by_part.items()),
        f"  memory, training     {s.memory_bytes / 2**30:.2f} GiB for "
        + ", ".join(f"{part} {size / 2**30:.2f}" for part, size in s.memory_bytes_by_part.items())
        + "; activations come on top",
    ]
    return "\n".join(lines)


def _short(count: int) -> str:
    """1_937_000_000 -> '1.94G', in powers of a thousand."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
