"""Memory of a training step on one device, from the recipe alone: weights, gradients, optimizer, activations, peak.

A model's backward pass is written down as a chain of operations, each with what it keeps from the forward pass, the
gradient it hands on and the weights it is for; playing the chain backwards gives the peak. Counted is what tensors
hold; what the allocator rounds up, libraries' workspaces and the Python process itself are not. Measured against
torch's own allocation counter in the tests.

Shape suffixes: B samples · N positions with padding · n those of one modality · R rows of the experts · M predictions ·
D width · H hidden · U = H, or 2H for swiglu · E experts · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vlmoe.config import ModalityConfig, ModelConfig, UserError
from vlmoe.model.attention import SHORT
from vlmoe.model.flops import Shape, choices
from vlmoe.model.parameters import (
    attention_params,
    branch_size,
    common_params,
    embedding_params,
    expert_hidden,
    ffn_params,
    has_common,
    head_params,
    hidden_size,
    is_sparse,
)
from vlmoe.model.stem import stem_convolutions

FP32, BF16, INT = 4, 2, 8  # bytes
ROUTING_FLOATS = 3  # per token and expert: the logits, their probabilities, and what the z-loss keeps


@dataclass(frozen=True)
class Sharding:
    """How a model lies on devices. devices: that share the data. full: weights, gradients and moments are cut over all
    of them (FSDP); otherwise each has a copy. experts: of the devices, so many have different experts (expert
    parallelism)."""

    devices: int = 1
    full: bool = False
    experts: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or self.experts < 1 or self.devices % self.experts:
            raise UserError(
                f"sharding: expected at least one device and a number of expert-parallel devices that divides theirs, "
                f"got {self.devices} and {self.experts}"
            )


@dataclass
class Memory:
    """Bytes on one device. weights: float32. gradients, optimizer: likewise, of the weights that these batches use
    (pairs alone leave the branches beside a VL-FFN idle), and AdamW's two moments. inputs: the batch. activations: kept
    by the forward pass, with the copies of weights that lower precision makes. gathered: with full sharding, the
    weights and gradients of the largest block, which are whole while it is at work. peak: the most at any time of a
    step; less than the sum, because activations go as gradients come."""

    weights: int
    gradients: int
    optimizer: int
    inputs: int
    activations: int
    gathered: int
    peak: int


@dataclass
class _Op:
    """saved: bytes kept from the forward pass until this operation's backward. gradient: bytes of the gradient it hands
    on. extra: bytes that live only meanwhile. weights: name -> bytes of the gradients that appear."""

    saved: float
    gradient: float
    extra: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)


def memory(
    config: ModelConfig, shapes: Iterable[Shape], precision: str = "fp32", sharding: Sharding | None = None
) -> Memory:
    """Of a step with these batches in one micro-batch on each device. precision: fp32, or bf16 for autocast."""
    shapes, sharding = list(shapes), sharding or Sharding()
    act = BF16 if precision == "bf16" else FP32
    share = _Share(config, sharding)
    inputs = sum(_inputs(config, shape) for shape in shapes)
    chain, kept = [], 0.0  # of all passes, in the order of the forward pass
    for shape in shapes:
        for stage, again in _stages(config, shape, act, share):
            chain.append((stage, again))
            kept += again if again is not None else sum(op.saved for op in stage)
    gathered = share.largest_block() * (act + FP32) / FP32 if sharding.full and sharding.devices > 1 else 0.0
    peak, gradients = _play(chain, kept)
    weights, optimizer = share.of_all(), 2 * gradients
    peak += weights + optimizer + inputs + gathered
    return Memory(*(round(x) for x in (weights, gradients, optimizer, inputs, kept, gathered, peak)))


def _play(chain: list[tuple[list[_Op], float | None]], kept: float) -> tuple[float, float]:
    """Peak of activations and gradients over the backward pass, and the gradients there are in the end."""
    live, flowing, peak = kept, 0.0, kept
    have: dict[str, float] = {}
    for stage, again in reversed(chain):
        if again is not None:  # the block's input is kept, the rest is computed again
            live += sum(op.saved for op in stage) - again
        residual = flowing
        flowing = 0.0
        for op in reversed(stage):
            new = {name: size for name, size in op.weights.items() if name not in have}
            twice = max((size for name, size in op.weights.items() if name in have), default=0.0)
            now = live + residual + flowing + op.gradient + op.extra + twice + sum(have.values()) + sum(new.values())
            peak = max(peak, now)
            have |= new
            live, flowing = live - op.saved, op.gradient
    return peak, sum(have.values())


class _Share:
    """Bytes of gradients (and of weights) of each part on one device."""

    def __init__(self, config: ModelConfig, sharding: Sharding) -> None:
        self.config = config
        self.dense = FP32 / (sharding.devices if sharding.full else 1)
        self.expert = FP32 / (sharding.devices if sharding.full else sharding.experts)
        self.local = 1 / sharding.experts  # share of the experts that a device computes

    def branch(self, side: ModalityConfig, index: int) -> dict[str, float]:
        b = branch_size(self.config, side, index)
        return {"rest": self.dense * (b.norm + b.dense + b.router), "experts": self.expert * b.experts * b.expert}

    def fused(self) -> float:
        return self.dense * (ffn_params(self.config, hidden_size(self.config)) + 2 * self.config.width)

    def block(self, index: int) -> float:
        c = self.config
        total = self.dense * attention_params(c) + self.expert * common_params(c, index)
        total += sum(sum(self.branch(side, index).values()) for side in (c.vision, c.text))
        return total + (self.fused() if index >= c.depth - c.vl_ffn else 0.0)

    def of_all(self) -> float:
        c = self.config
        outside = sum(embedding_params(c)) + sum(head_params(c)) + 2 * c.width
        return self.dense * outside + sum(self.block(index) for index in range(c.depth))

    def largest_block(self) -> float:
        """In float32 as it is when gathered: whole, but for the experts of other devices."""
        whole = _Share(self.config, Sharding(devices=round(1 / self.local), experts=round(1 / self.local)))
        return max(whole.block(index) for index in range(self.config.depth))


def _inputs(config: ModelConfig, shape: Shape) -> int:
    """uint8 pixels and patch masks; token ids and targets as int64, the mask of real ones."""
    patches = shape.vision_tokens(config) - 1 if shape.has_image else 0
    image = 3 * config.image_size**2 + patches if shape.has_image else 0
    return shape.samples * (image + shape.text * (2 * INT + 1))


def _stages(config: ModelConfig, shape: Shape, act: int, share: _Share) -> Iterable[tuple[list[_Op], float | None]]:
    """The operations of one pass, residual branch by residual branch, in the order of the forward pass. With them,
    under recomputation, the bytes that are kept of a stage instead of what its operations save."""
    D, N = config.width, shape.positions(config)
    vision, pair = shape.samples * shape.vision_tokens(config), shape.kind == "pair"
    yield _embeddings(config, shape, act, share), None
    for index in range(config.depth):
        stages = [_attention(config, shape, index, act, share)]
        again = float(FP32 * N * D)
        if pair and index >= config.depth - config.vl_ffn:
            weights = {f"{index}/vl": share.fused()}
            stages.append(_dense(config, N, act, weights, ffn_params(config, hidden_size(config))))
        else:
            ops = []
            for name, side, n, real in (
                ("vision", config.vision, vision, vision),
                ("text", config.text, N - vision, shape.real),
            ):
                if n:
                    weights = {f"{index}/{name}/{k}": v for k, v in share.branch(side, index).items() if v}
                    ops += _branch(config, side, index, n, real, shape, act, weights, share)
                    again += _choices_kept(config, side, index, n)
            if pair:  # each branch's gradient is put into a tensor of the whole sequence, and the two are added
                ops[0].extra += 2 * FP32 * N * D
            stages.append(ops)
        if config.recompute:
            stages = [[op for stage in stages for op in stage]]
        for stage in stages:
            yield stage, again if config.recompute else None
    yield _heads(config, shape, act, share), None


def _embeddings(config: ModelConfig, shape: Shape, act: int, share: _Share) -> list[_Op]:
    D, ops = config.width, []
    image, text = embedding_params(config)
    if shape.has_image:
        patches = shape.samples * (shape.vision_tokens(config) - 1)
        saved = patches * (3 * config.patch**2 * act + 1)
        largest = FP32 * patches * D
        for _, channels, positions in stem_convolutions(config):  # each keeps what it gives, before and after its GELU
            saved += 2 * act * patches * channels * positions
            largest = max(largest, 2 * act * patches * channels * positions)
        ops.append(_Op(saved, 0, largest, {"image": share.dense * image}))
    if shape.text:
        words = shape.samples * shape.text
        # The head's gradient of the same matrix is there already: a second one, and their sum, come beside it.
        ops.append(_Op(INT * words, 0, share.dense * text, {"text": share.dense * text}))
    return ops


def _attention(config: ModelConfig, shape: Shape, index: int, act: int, share: _Share) -> list[_Op]:
    D, N = config.width, shape.positions(config)
    row, weights = N * D, share.dense * attention_params(config)
    tokens = shape.vision_tokens(config) + shape.text
    kept, meanwhile = config.heads * N, 0  # a sum for each row of the scores, by the fused kernel
    if act == FP32 and tokens <= SHORT:  # plain products, which keep the probabilities; then come two gradients
        kept, meanwhile = config.heads * N * tokens, 2 * config.heads * N * tokens
    elif shape.text:
        kept += shape.samples * tokens  # the mask
    cast = act * 4 * D * D if act < FP32 else 0
    ops = [
        _Op(FP32 * row + 2 * FP32 * N, FP32 * row),  # norm: its input is the residual stream
        _Op(act * row + cast, FP32 * row, 0, {f"{index}/attention": weights}),  # query, key, value
        _Op(0, 3 * act * row),  # their gradients, joined
        _Op(4 * act * row + FP32 * kept, 3 * act * row, FP32 * meanwhile),  # attention, and its output
    ]
    if config.sub_ln:
        ops.append(_Op(act * row + 2 * FP32 * N, act * row))
    return [*ops, _Op(0, act * row)]  # output projection


def _feed_forward(config: ModelConfig, rows: float, hidden: int, act: int, x: bool, cast: float) -> list[_Op]:
    """Two products with the activation between. x: whether the input is kept for them alone. cast: bytes of weights in
    lower precision."""
    D, U = config.width, hidden * (2 if config.activation == "swiglu" else 1)
    before = 0 if config.activation == "relu" else act * rows * U
    ops = [
        _Op(act * rows * D * x + cast, act * rows * D),
        _Op(before, act * rows * U, act * rows * hidden if config.activation == "swiglu" else 0),
    ]
    if config.sub_ln:
        ops.append(_Op(act * rows * hidden, act * rows * hidden))
    return [*ops, _Op(act * rows * hidden, act * rows * hidden)]


def _dense(config: ModelConfig, n: float, act: int, weights: dict[str, float], params: int) -> list[_Op]:
    cast = act * params if act < FP32 else 0
    norm = _Op(FP32 * n * config.width + 2 * FP32 * n, FP32 * n * config.width)
    ops = _feed_forward(config, n, hidden_size(config), act, True, cast)
    ops[-1].weights = {name: size / 2 for name, size in weights.items()}
    ops[0].weights = {f"{name}/1": size / 2 for name, size in weights.items()}
    return [norm, *ops]


def _branch(
    config: ModelConfig, side: ModalityConfig, index: int, n: int, real: int, shape: Shape, act: int,
    weights: dict[str, float], share: _Share,
) -> list[_Op]:  # fmt: skip
    """One modality's side of a block: dense, or a mixture."""
    if not is_sparse(config, side, index):
        return _dense(config, n, act, weights, ffn_params(config, hidden_size(config)))
    D, hidden = config.width, expert_hidden(config, side) // side.granularity
    size = branch_size(config, side, index)
    R, E, K = choices(config, side, real, shape.samples), size.experts + size.common, size.chosen
    low = act < FP32
    padded = shape.text > 0  # then the layer gets a mask, and keeps its own copy of what it may see
    routing = FP32 * n * (ROUTING_FLOATS * E * (side.router.slots if side.router.type == "soft" else 1) + 2 * K)
    indices = INT * (2 * n * K + 2 * R)
    rest = {k: v for k, v in weights.items() if not k.endswith("experts")}
    cast = act * size.experts * size.expert * share.local if low else 0
    ops = [
        _Op(FP32 * n * D + 2 * FP32 * n, FP32 * n * D),  # norm
        _Op(FP32 * n * D + routing + n * padded, FP32 * n * D, FP32 * n * D, rest),  # router, with its own input
    ]
    if side.shared_experts:
        cast_shared = act * size.dense if low else 0
        ops += _feed_forward(config, n, side.shared_experts * hidden, act, low, cast_shared)
    experts = _feed_forward(config, R, hidden, act, True, cast)
    common = share.expert * common_params(config, index) if has_common(config, index) else 0.0
    halves = {f"{index}/common": common / 2} if common else {}
    halves |= {k: v / 2 for k, v in weights.items() if k.endswith("experts")}
    experts[-1].weights = halves
    experts[0].weights = {f"{k}/1": v for k, v in halves.items()}
    combine = _Op(act * R * D + indices, act * R * D, act * R * D)
    return [*ops, *experts, combine]


def _choices_kept(config: ModelConfig, side: ModalityConfig, index: int, n: int) -> float:
    """Integers that recomputation keeps, so that it does not choose again: chosen experts, and the order by expert."""
    if not is_sparse(config, side, index) or side.router.type == "soft":
        return 0.0
    return INT * n * side.granularity * side.router.k * 2.0


def _heads(config: ModelConfig, shape: Shape, act: int, share: _Share) -> list[_Op]:
    """The last norm, and the two heads one after the other: the text's comes last, and first on the way back."""
    D, row = config.width, FP32 * shape.positions(config) * config.width
    ops = [_Op(row + 2 * FP32 * shape.positions(config), row, 0, {"norm": share.dense * 2 * D})]
    both = shape.patches and shape.words
    for M, V, weights in (
        (shape.patches, config.codes, {"image_head": share.dense * head_params(config)[1]}),
        (
            shape.words,
            config.vocabulary,
            {"text": share.dense * embedding_params(config)[1], "text_bias": share.dense * head_params(config)[0]},
        ),
    ):
        if M:
            ops.append(_Op(2 * INT * M, row, row if both else 0))  # picking the hidden positions
            ops.append(_Op(act * M * D + (act * V * D if act < FP32 else 0), act * M * D, 0, weights))
            ops.append(_Op(FP32 * M * V, FP32 * M * V, 0))  # log-softmax
            ops.append(_Op(0, FP32 * M * V))
    return ops
