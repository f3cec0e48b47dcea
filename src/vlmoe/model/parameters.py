"""How many parameters each part of a model has, from its recipe alone. Pure arithmetic, nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlmoe.config import ModalityConfig, ModelConfig, sparse_blocks
from vlmoe.model.stem import stem_convolutions, stem_features


@dataclass(frozen=True)
class BranchSize:
    """The feed-forward side of one modality in one block, in parameters.

    norm: before it. dense: the dense layer, or the shared experts of a mixture: every token goes through them. expert:
    one of `experts`, of which (and of `common` ones, which are the block's) a token takes `chosen`. router: its
    weights.
    """

    norm: int
    dense: int
    expert: int = 0
    experts: int = 0
    common: int = 0
    chosen: int = 0
    router: int = 0

    @property
    def total(self) -> int:
        """All but the router and the common experts."""
        return self.norm + self.dense + self.experts * self.expert

    @property
    def per_token(self) -> int:
        """Of `total`, what one token goes through; a common expert it may choose instead is as large."""
        return self.norm + self.dense + self.chosen * self.expert


def hidden_size(config: ModelConfig) -> int:
    """Hidden units of a dense feed-forward layer."""
    return int(config.width * config.mlp_ratio)


def expert_hidden(config: ModelConfig, side: ModalityConfig) -> int:
    """Hidden units of an expert before it is split by the granularity."""
    return round(hidden_size(config) * side.expert_size)


def is_sparse(config: ModelConfig, side: ModalityConfig, index: int) -> bool:
    return index in sparse_blocks(side.sparse, config.depth)


def sparse_layers(config: ModelConfig, kinds: Iterable[str]) -> int:
    """How many sparse layers the tokens of these kinds of samples (image, text, pair) pass. A pair's pass none in the
    top `vl_ffn` blocks."""
    found = set()
    for kind in kinds:
        sides = {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}[kind]
        blocks = config.depth - (config.vl_ffn if kind == "pair" else 0)
        found |= {(s, i) for s in sides for i in range(blocks) if is_sparse(config, getattr(config, s), i)}
    return len(found)


def has_common(config: ModelConfig, index: int) -> bool:
    """Whether a block has experts that both modalities may choose."""
    if config.common_experts == 0:
        return False
    return all(is_sparse(config, side, index) for side in (config.vision, config.text))


def ffn_params(config: ModelConfig, hidden: int) -> int:
    up = 2 * hidden if config.activation == "swiglu" else hidden
    return config.width * up + up + hidden * config.width + config.width


def attention_params(config: ModelConfig) -> int:
    """Of one block, with its norms: one set for all modalities or one for each."""
    D = config.width
    one = 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (2 * D if config.sub_ln else 0)
    return one * (1 if config.attention == "shared" else 2)


def branch_size(config: ModelConfig, side: ModalityConfig, index: int) -> BranchSize:
    norm = 2 * config.width
    if not is_sparse(config, side, index):
        return BranchSize(norm, ffn_params(config, hidden_size(config)))
    m, hidden = side.granularity, expert_hidden(config, side)
    common = m * config.common_experts if has_common(config, index) else 0
    return BranchSize(
        norm=norm,
        dense=ffn_params(config, side.shared_experts * hidden // m) if side.shared_experts else 0,
        expert=ffn_params(config, hidden // m),
        experts=m * side.experts,
        common=common,
        chosen=m * side.router.k,
        router=router_params(config, side, m * side.experts + common),
    )


def router_params(config: ModelConfig, side: ModalityConfig, experts: int) -> int:
    D = config.width
    if side.router.type == "cosine":
        dim = min(D, 256)
        return experts * dim + dim * D + 1
    if side.router.type == "soft":
        return experts * side.router.slots * D + 1
    return experts * D


def common_params(config: ModelConfig, index: int) -> int:
    """Of the experts in a block that both modalities may choose."""
    if not has_common(config, index):
        return 0
    m = config.vision.granularity
    return m * config.common_experts * ffn_params(config, expert_hidden(config, config.vision) // m)


def embedding_params(config: ModelConfig) -> tuple[int, int]:
    """Of images (stem, projection, class and mask tokens, positions) and of texts (vocabulary, positions)."""
    D, patches = config.width, (config.image_size // config.patch) ** 2
    stem = sum(values * channels + channels for values, channels, _ in stem_convolutions(config))
    image = stem + stem_features(config) * D + D + 2 * D + (1 + patches) * D
    return image, config.vocabulary * D + config.max_text * D


def head_params(config: ModelConfig) -> tuple[int, int]:
    """Of the text head, which shares the embedding's matrix, and of the image head."""
    return config.vocabulary, config.width * config.codes + config.codes
