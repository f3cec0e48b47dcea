"""FLOPs of one batch by part, forward and backward, from the recipe alone.

A multiply-add counts as two FLOPs. Counted are all matrix products, and of the sparse layer the weighted sum of the
experts' outputs ("dispatch"). Norms, biases, softmax and activations are left out, as usual: they are below 1% at width
768. Attention's backward pass counts twice its forward one; a fused kernel also computes the scores again, which is
left out.

Padding costs what it really costs: attention, dense layers, shared experts and router compute padded positions too,
routed experts take real tokens only. That is no basis for a comparison: a dense layer could leave padding out as well.
So a comparison charges `Shape.charged`, where routed experts pay for padding like every other layer. Fillers that the
backend `padded` adds to the experts' rows are not counted.

Shape suffixes: D width · H hidden · E experts · M, K, N sizes of a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlmoe.config import MaskingConfig, ModalityConfig, ModelConfig, VisualTokenizerConfig
from vlmoe.model.parameters import expert_hidden, has_common, hidden_size, is_sparse
from vlmoe.model.stem import stem_convolutions, stem_features

PARTS = ("embeddings", "attention", "vision", "text", "vl", "router", "dispatch", "heads", "targets")
BLOCK_PARTS = ("attention", "vision", "text", "vl", "router", "dispatch")  # what recomputation computes again


@dataclass(frozen=True)
class Shape:
    """What matters of one batch. kind: image, text or pair. samples: how many. text: tokens of each text with its
    padding. real: text tokens that are no padding, of all samples. words, patches: hidden ones of all samples, which
    the heads predict."""

    kind: str
    samples: int
    text: int = 0
    real: int = 0
    words: int = 0
    patches: int = 0

    @property
    def has_image(self) -> bool:
        return self.kind != "text"

    def vision_tokens(self, config: ModelConfig) -> int:
        """Of one sample, the class token included."""
        return 1 + (config.image_size // config.patch) ** 2 if self.has_image else 0

    def positions(self, config: ModelConfig) -> int:
        """Of all samples, padding included."""
        return self.samples * (self.vision_tokens(config) + self.text)

    def tokens(self, config: ModelConfig) -> int:
        """Of all samples, without padding."""
        return self.samples * self.vision_tokens(config) + self.real

    def charged(self) -> Shape:
        """The batch as a comparison charges for it: padding counts as tokens, for routed experts and dispatch, too."""
        return replace(self, real=self.samples * self.text)

    @classmethod
    def full(cls, config: ModelConfig, masking: MaskingConfig, kind: str, samples: int) -> Shape:
        """A batch whose texts all have `max_text` tokens, with the masking's shares hidden."""
        patches, text = (config.image_size // config.patch) ** 2, config.max_text
        words = round((masking.text if kind == "text" else masking.pair_text) * (text - 2))  # not start and end
        hidden = round((masking.patches if kind == "image" else masking.pair_patches) * patches)
        if kind == "image":
            return cls(kind, samples, patches=samples * hidden)
        if kind == "text":
            return cls(kind, samples, text, samples * text, samples * words)
        return cls(kind, samples, text, samples * text, samples * words, samples * hidden)


@dataclass
class Flops:
    """By part. recompute: what activation checkpointing computes again in the backward pass."""

    forward: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    backward: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    recompute: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def total(self) -> float:
        """Of a training step: everything."""
        return sum(sum(part.values()) for part in (self.forward, self.backward, self.recompute))

    def scaled(self, factor: float) -> Flops:
        return Flops(
            *({k: factor * v for k, v in part.items()} for part in (self.forward, self.backward, self.recompute))
        )

    @classmethod
    def sum(cls, many: Iterable[Flops]) -> Flops:
        total = cls()
        for one in many:
            for mine, theirs in (
                (total.forward, one.forward), (total.backward, one.backward), (total.recompute, one.recompute),
            ):  # fmt: skip
                for part, value in theirs.items():
                    mine[part] += value
        return total


def flops(config: ModelConfig, shape: Shape, tokenizer: VisualTokenizerConfig | None = None) -> Flops:
    """Of one batch through backbone and heads. tokenizer: the one that makes the patches' targets; None: stored codes,
    which cost nothing."""
    D, N = config.width, shape.positions(config)
    vision, T = shape.samples * shape.vision_tokens(config), shape.vision_tokens(config) + shape.text
    found = Flops()
    forward = found.forward
    patches = vision - shape.samples if shape.has_image else 0
    products = [2 * math.prod(sizes) * patches for sizes in stem_convolutions(config)]
    products.append(2 * stem_features(config) * D * patches)
    forward["embeddings"] = sum(products)
    forward["attention"] = config.depth * (8 * D * D * N + 4 * D * T * N)
    own = config.depth - (config.vl_ffn if shape.kind == "pair" else 0)
    forward["vl"] = (config.depth - own) * _ffn(config, hidden_size(config)) * N
    frozen = 0.0  # a hash router learns nothing
    for name, side, positions, real in (
        ("vision", config.vision, vision, vision),
        ("text", config.text, N - vision, shape.real),
    ):
        for index in range(own if positions else 0):
            served, router, dispatch = _branch(config, side, index, positions, real, shape.samples)
            forward[name] += served
            forward["router"] += router
            forward["dispatch"] += dispatch
            frozen += router if side.router.type == "hash" else 0.0
    forward["heads"] = 2 * D * (config.vocabulary * shape.words + config.codes * shape.patches)
    if tokenizer is not None and tokenizer.type == "vq":
        forward["targets"] = _encode(config, tokenizer) * shape.patches
    found.backward = {part: 2 * value for part, value in forward.items()}
    found.backward["embeddings"] -= products[0]  # pixels have no gradient
    found.backward["targets"] = 0.0
    found.backward["router"] -= 2 * frozen
    if config.recompute:
        found.recompute = {part: forward[part] if part in BLOCK_PARTS else 0.0 for part in PARTS}
    return found


def choices(config: ModelConfig, side: ModalityConfig, real: float, samples: int = 1) -> float:
    """Rows that a layer's experts compute for so many real tokens."""
    r = side.router
    if r.type == "soft":
        return side.granularity * side.experts * r.slots * samples
    factor = 1.0 if r.capacity_factor is None else r.capacity_factor
    if r.type != "expert_choice":  # with even load a larger capacity stays unused
        factor = min(factor, 1.0)
    return factor * side.granularity * r.k * real


def _branch(
    config: ModelConfig, side: ModalityConfig, index: int, positions: float, real: float, samples: int
) -> tuple[float, float, float]:
    """FLOPs forward of the feed-forward layers, the router and the dispatch of one block's branch."""
    if not is_sparse(config, side, index):
        return _ffn(config, hidden_size(config)) * positions, 0.0, 0.0
    D, m, hidden, r = config.width, side.granularity, expert_hidden(config, side), side.router
    rows = choices(config, side, real, samples)
    served = _ffn(config, hidden // m) * rows + _ffn(config, side.shared_experts * hidden // m) * positions
    E = m * (side.experts + (config.common_experts if has_common(config, index) else 0))
    if r.type == "soft":  # logits, and the mixing of tokens into slots and of slots into tokens
        return served, 3 * 2 * E * r.slots * D * positions, 0.0
    dim = min(D, 256)
    router = 2 * (dim * D + E * dim) if r.type == "cosine" else 2 * E * D
    return served, router * positions, 2 * D * rows


def _ffn(config: ModelConfig, hidden: int) -> int:
    """Of one token."""
    return 2 * config.width * hidden * (3 if config.activation == "swiglu" else 2)


def _encode(config: ModelConfig, tokenizer: VisualTokenizerConfig) -> int:
    """Of one patch through the encoder of a `VQTokenizer`: patch in, one perceptron, whitened, nearest code."""
    W, Z = tokenizer.width, tokenizer.dim
    return 2 * (3 * config.patch**2 * W + 2 * W * W + 2 * W * W + W * Z + Z * Z + Z * config.codes)


# ------------------------------------------------------------------------------------------------------------- counted
def grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *args: object, **kwargs: object) -> int:
    """Of torch's grouped product of these shapes: (M, K) x (E, K, N), or (M, K) x (K, N) cut along K into E products.
    The groups are disjoint, so each row (or column) is multiplied once, whatever the offsets."""
    return 2 * (a[0] if len(a) == len(b) == 3 else 1) * a[-2] * a[-1] * b[-1]


@contextmanager
def counter() -> Iterator[FlopCounterMode]:
    """torch's FLOP counter with what it lacks: a formula for grouped products, and attention in a form that it knows.
    `get_total_flops()` of what it yields is the count."""
    mode = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops})
    with sdpa_kernel(SDPBackend.MATH), mode:
        yield mode
