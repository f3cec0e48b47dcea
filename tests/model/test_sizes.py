"""Predicted sizes against the published figures, the built module and torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmoe.config import ModelConfig, load_recipe
from vlmoe.model import Backbone, sizes
from vlmoe.moe import MoELayer
from vlmoe.tasks.pretrain import MaskedDataModelling

SMALL = {
    "width": 32,
    "depth": 4,
    "heads": 4,
    "image_size": 16,
    "patch": 8,
    "max_text": 8,
    "vocabulary": 50,
    "codes": 12,
}


def small(**changes: object) -> ModelConfig:
    """A dense model."""
    config = ModelConfig(**(SMALL | changes))  # type: ignore[arg-type]
    config.vision.sparse = config.text.sparse = "none"
    return config


def sparse(config: ModelConfig, vision: str = "odd", text: str = "odd", k: int = 1, experts: int = 4) -> ModelConfig:
    for side, pattern in ((config.vision, vision), (config.text, text)):
        side.sparse, side.experts, side.router.k, side.router.backend = pattern, experts, k, "loop"
    return config


@pytest.mark.parametrize(
    ("recipe", "total", "per_token"),
    [("base_dense", 180e6, 180e6), ("large_dense", 560e6, 560e6), ("base_32e", 1.9e9, 180e6)],
)
def test_published_parameter_counts(recipe: str, total: float, per_token: float) -> None:
    """DeepSpeed's table of 2023-03-31: parameters per token (total)."""
    s = sizes(load_recipe(recipe).model)
    assert s.params_total == pytest.approx(total, rel=0.03)
    assert s.params_per_token == pytest.approx(per_token, rel=0.03)


CONFIGS = {
    "dense": small(),
    "sparse": sparse(small()),
    "vision only, k=2": sparse(small(), text="none", k=2),
    "split, sub-LN": sparse(small(attention="split", sub_ln=True), vision="all", text="last"),
    "swiglu": sparse(small(activation="swiglu", vl_ffn=0)),
    "all fused": sparse(small(vl_ffn=4)),
    "fine-grained and shared": sparse(small(vl_ffn=0), k=2),
    "in common": sparse(small(common_experts=2, vl_ffn=1), vision="all", k=2),
    "stem": small(patch_stem="conv"),
    "cosine and soft": sparse(small(vl_ffn=1)),
}


for side in (CONFIGS["fine-grained and shared"].vision, CONFIGS["fine-grained and shared"].text):
    side.granularity, side.shared_experts = 4, 2
CONFIGS["cosine and soft"].vision.router.type = "cosine"
CONFIGS["cosine and soft"].text.router.type = "soft"
CONFIGS["cosine and soft"].text.router.slots = 2  # 4 experts of 2 slots: 8 tokens, k = 1


@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_parameters_are_the_built_ones(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        task = MaskedDataModelling(config)
    built = {n: p.numel() for n, p in task.named_parameters()}
    s = sizes(config)
    assert s.params_total == sum(v for n, v in built.items() if n.startswith("backbone."))
    assert s.params_heads == sum(v for n, v in built.items() if not n.startswith("backbone."))
    assert s.params_by_part["routers"] == sum(v for n, v in built.items() if ".router." in n)
    idle = (
        sum(
            sum(p.numel() for p in m.experts.parameters()) // len(m.experts.w1) * (len(m.experts.w1) - m.k)
            for m in task.modules()
            if isinstance(m, MoELayer)
        )
        + s.params_by_part["common_experts"]
    )  # k counts the chosen ones, own or in common
    assert s.params_per_token == s.params_total - idle
    assert s.memory_bytes == 16 * sum(built.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_flops_are_the_counted_ones(name: str) -> None:
    config = CONFIGS[name]
    backbone = Backbone(config).eval()
    s = sizes(config)
    image = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    text = torch.zeros(2, 8, dtype=torch.long)
    # The counter knows the math form of attention, not the fused CPU kernel.
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        backbone([backbone.image(image), backbone.text(text)])
    assert counter.get_total_flops() == pytest.approx(2 * s.flops_per_pair, rel=0.01)


def test_nothing_is_allocated_for_a_large_model() -> None:
    with torch.device("meta"):
        backbone = Backbone(load_recipe("base_32e").model)
    assert {p.device.type for p in backbone.parameters()} == {"meta"}
    assert sum(p.numel() for p in backbone.parameters()) == sizes(load_recipe("base_32e").model).params_total
