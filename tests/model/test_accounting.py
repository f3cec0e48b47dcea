"""The accounting of a training step against torch's FLOP counter and its allocator."""

import json

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from vlmoe.cli import app
from vlmoe.config import Recipe, UserError, load_recipe
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.visual_tokenizer import StoredCodes, VQTokenizer
from vlmoe.model import Sharding, account, memory
from vlmoe.model.flops import PARTS, Shape, counter, flops
from vlmoe.model.parameters import branch_size
from vlmoe.moe import MoELayer
from vlmoe.study.measure import peak_memory, shape_of
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.optim import make_optimizer

DENSE = ["model.vision.sparse=none", "model.text.sparse=none"]


def both(*changes: str) -> list[str]:
    return [f"model.{side}.{change}" for change in changes for side in ("vision", "text")]


TOP2 = both("sparse=all", "experts=4", "granularity=1", "shared_experts=0", "router.k=2")
FINE = both("sparse=odd", "experts=8", "expert_size=0.5", "granularity=2", "shared_experts=2", "router.k=1")
EXACT = both("router.backend=loop")  # no fillers among the experts' rows
CASES = {
    "dense": DENSE,
    "top-2": TOP2 + EXACT,
    "grouped": TOP2,
    "fine-grained and shared": FINE + EXACT,
    "recomputed": [*TOP2, *EXACT, "model.recompute=true"],
    "swiglu": [*TOP2, *EXACT, "model.activation=swiglu", "model.vl_ffn=0"],
    "split, sub-LN": [*FINE, *EXACT, "model.attention=split", "model.sub_ln=true"],
    "stem": [*TOP2, *EXACT, "model.patch_stem=conv"],
    "cosine": TOP2 + EXACT + both("router.type=cosine"),
    "hash": TOP2 + EXACT + both("router.type=hash"),
    "expert choice": TOP2 + EXACT + both("router.type=expert_choice"),
    "soft": TOP2 + EXACT + both("router.type=soft", "router.slots=8", "router.k=1"),
}


def recipe_of(changes: list[str], width: int = 64) -> Recipe:
    common = [f"model.width={width}", "model.heads=4", "model.depth=3", "model.max_text=24", "model.vocabulary=256"]
    return load_recipe("characters", [*common, "data.batch={pair: 8, image: 4, text: 4}", *changes])


def batch_of(recipe: Recipe, kind: str, samples: int, real: int = 17) -> Batch:
    """Half of the texts are shorter than the batch."""
    m, generator = recipe.model, torch.Generator().manual_seed(0)
    patches, batch = (m.image_size // m.patch) ** 2, Batch(keys=["x"] * samples)
    if kind != "text":
        size = (samples, 3, m.image_size, m.image_size)
        batch.image_BCHW = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        batch.patch_mask_BP = torch.arange(patches).expand(samples, patches) < 6
        batch.codes_BP = torch.randint(0, m.codes, (samples, patches), generator=generator)
    if kind != "image":
        batch.text_BT = torch.randint(0, m.vocabulary, (samples, m.max_text), generator=generator)
        batch.valid_BT = torch.ones(samples, m.max_text, dtype=torch.bool)
        batch.valid_BT[::2, real:] = False
        batch.target_BT = torch.full_like(batch.text_BT, IGNORE)
        batch.target_BT[:, 1:8] = batch.text_BT[:, 1:8]
    return batch


def batches_of(recipe: Recipe) -> dict[str, Batch]:
    return {kind: batch_of(recipe, kind, getattr(recipe.data.batch, kind)) for kind in ("image", "text", "pair")}


# ---------------------------------------------------------------------------------------------------------------- FLOPs
def test_grouped_products_are_counted() -> None:
    x = torch.randn(32, 16, requires_grad=True)
    w = torch.randn(4, 16, 24, requires_grad=True)
    ends = torch.tensor([4, 4, 20, 32], dtype=torch.int32)
    with counter() as count:
        y = F.grouped_mm(x, w, offs=ends)
        assert count.get_total_flops() == 2 * 32 * 16 * 24
        y.backward(torch.ones(32, 24))
    assert count.get_total_flops() == 3 * 2 * 32 * 16 * 24


@pytest.mark.parametrize("name", CASES)
def test_flops_of_a_step_are_the_counted_ones(name: str) -> None:
    recipe = recipe_of(CASES[name])
    batches = batches_of(recipe)
    m, vq = recipe.model, recipe.data.visual_tokenizer
    tokenizer = VQTokenizer(m.image_size, m.patch, m.codes, vq.dim, vq.width).eval()
    task = MaskedDataModelling(m, tokenizer)
    with counter() as count:
        loss = task(batches).loss
        forward = count.get_total_flops()
        loss.backward()
    found = account(recipe, [shape_of(kind, batch) for kind, batch in batches.items()]).step
    # The weighted sum of the experts' outputs is no matrix product, so the counter does not see it.
    # The kernel adds up biases' gradients by a product; the last product of a block need not be computed again.
    close = {"grouped": 0.01, "recomputed": 0.02}.get(name, 1e-3)
    assert sum(found.forward.values()) - found.forward["dispatch"] == pytest.approx(forward, rel=close)
    seen = found.total - sum(p["dispatch"] for p in (found.forward, found.backward, found.recompute))
    assert seen == pytest.approx(count.get_total_flops(), rel=close)
    assert found.total == pytest.approx(count.get_total_flops(), rel=0.05)


def test_flops_by_part_are_those_of_the_part() -> None:
    """One sparse layer on its own, forward and backward, against what the accounting says of its block."""
    recipe = recipe_of([*TOP2, *EXACT, "model.depth=1", "model.vl_ffn=0"])
    D, H = recipe.model.width, 2 * recipe.model.width
    layer, x = MoELayer(D, H, experts=4, k=2, backend="loop"), torch.randn(4, 17, D, requires_grad=True)
    with counter() as count:
        y, stats = layer(x)
        (y.sum() + stats.loss).backward()
    found = flops(recipe.model, Shape("image", 4, patches=24))
    parts = ("vision", "router")
    assert sum(found.forward[p] + found.backward[p] for p in parts) == count.get_total_flops()
    assert found.forward["text"] == found.forward["vl"] == 0
    assert found.forward["dispatch"] == 2 * D * 2 * 4 * 17  # a multiply-add for each of a token's two outputs


def test_padding_costs_where_it_is_computed_and_only_there() -> None:
    recipe = recipe_of(both("sparse=all", "experts=4", "granularity=1", "shared_experts=0", "router.k=1",
                            "router.renormalize=false"))  # fmt: skip
    full, padded = (flops(recipe.model, Shape("text", 2, 24, real, 4)).forward for real in (48, 24))
    assert padded["text"] == full["text"] / 2  # experts take real tokens
    for part in ("attention", "router", "heads"):
        assert padded[part] == full[part]


def test_padding_is_charged_to_sparse_and_dense_alike() -> None:
    """Two texts of 24 positions, 24 of the 48 tokens real. One expert a token of the dense layer's size: what is
    computed differs by the padding, what is charged does not. By hand: 3 blocks, 4 D H a position, H = 2 D."""
    shape = Shape("text", 2, 24, 24, 4)
    layer = both("sparse=all", "experts=4", "granularity=1", "shared_experts=0", "router.k=1", "expert_size=1.0")
    dense, sparse = recipe_of(DENSE), recipe_of([*layer, *both("router.renormalize=false")])
    D = dense.model.width
    costs = {side: account(recipe, [shape]) for side, recipe in (("dense", dense), ("sparse", sparse))}
    by_hand = 3 * 4 * D * (2 * D)
    assert costs["dense"].step.forward["text"] == costs["dense"].charge.forward["text"] == by_hand * 48
    assert costs["sparse"].step.forward["text"] == by_hand * 24
    assert costs["sparse"].charge.forward["text"] == by_hand * 48
    assert costs["sparse"].charge.forward["dispatch"] == 3 * 2 * D * 48
    assert costs["sparse"].charge.forward["router"] == costs["sparse"].step.forward["router"] == 3 * 2 * 4 * D * 48
    assert costs["dense"].charge == costs["dense"].step
    extra = 3 * (3 * 2 * D * 48 + 3 * 2 * 4 * D * 48)  # forward and backward: dispatch and router are all that differs
    assert costs["sparse"].charge.total - costs["dense"].charge.total == extra
    assert {cost.tokens for cost in costs.values()} == {24}  # padding is never counted among the tokens
    assert costs["sparse"].charge_per_token == costs["sparse"].charge.total / 24


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "fp32") for name in CASES if name not in ("cosine", "hash")]
    + [(name, "bf16") for name in ("dense", "top-2", "fine-grained and shared", "recomputed")],  # slow on a CPU
)
def test_memory_of_a_step_is_the_allocated_one(name: str, precision: str) -> None:
    recipe = recipe_of(CASES[name])
    batches = batches_of(recipe)
    task = MaskedDataModelling(recipe.model, StoredCodes(recipe.model.codes))
    optimizer = make_optimizer(task, recipe.train)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = task(batches).loss
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    peak = peak_memory(step)
    weights = sum(p.nbytes for p in task.parameters())
    gradients = sum(p.grad.nbytes for p in task.parameters() if p.grad is not None)
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    found = memory(recipe.model, [shape_of(kind, batch) for kind, batch in batches.items()], precision)
    assert found.weights == weights
    assert found.gradients == pytest.approx(gradients, rel=1e-3)
    assert found.optimizer == pytest.approx(moments, rel=1e-3)
    assert found.peak - found.inputs == pytest.approx(weights + moments + peak, rel=0.05)
    grown = found.peak - found.inputs - found.weights - found.optimizer  # activations and gradients alone
    assert grown == pytest.approx(peak, rel=0.05)


def test_recomputation_and_a_larger_batch() -> None:
    plain, again = (account(recipe_of([*TOP2, f"model.recompute={x}"])) for x in ("false", "true"))
    assert again.memory.activations < 0.3 * plain.memory.activations
    assert again.memory.weights == plain.memory.weights
    assert 1.25 < again.step.total / plain.step.total < 4 / 3  # once more forward, but for embeddings and heads
    more = account(recipe_of([*TOP2, "data.batch={pair: 16, image: 8, text: 8}"]))
    assert more.memory.activations == pytest.approx(2 * plain.memory.activations, rel=0.01)
    assert more.flops_per_token == pytest.approx(plain.flops_per_token)


def test_sharding_divides_what_it_cuts() -> None:
    recipe = load_recipe("base_32e")
    alone = account(recipe).memory
    experts = account(recipe, sharding=Sharding(8, experts=8)).memory
    sides = (recipe.model.vision, recipe.model.text)
    branches = [branch_size(recipe.model, side, index) for side in sides for index in range(recipe.model.depth)]
    stacked = 4 * sum(b.experts * b.expert for b in branches)
    assert experts.weights == alone.weights - stacked * 7 // 8
    cut = account(recipe, sharding=Sharding(8, full=True)).memory
    assert cut.weights == pytest.approx(alone.weights / 8)
    assert cut.optimizer == pytest.approx(alone.optimizer / 8)
    assert cut.gathered > 0
    assert cut.activations == alone.activations
    with pytest.raises(UserError, match="3 and 2"):
        Sharding(3, experts=2)


# -------------------------------------------------------------------------------------------------------------- command
def test_info_lists_every_part_forward_and_backward() -> None:
    def invoke(*words: str) -> str:
        result = CliRunner().invoke(app, ["info", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    found = json.loads(invoke("base_32e", "--json"))
    cost = found["training_flops"]
    for kind in ("image", "text", "pair"):
        assert set(cost["per_sample"][kind]["forward"]) == set(PARTS)
    pair = cost["per_sample"]["pair"]
    assert sum(pair["forward"].values()) > found["flops_per_pair"]  # heads and dispatch come on top
    assert pair["backward"]["attention"] == 2 * pair["forward"]["attention"]
    assert cost["per_step"]["total"] == pytest.approx(cost["per_token"]["all"]["total"] * found["tokens_per_step"])
    m = found["memory_per_device"]
    assert m["weights"] + m["optimizer"] + m["activations"] < m["peak"] <= sum(m.values()) - m["peak"]
    text = invoke("base_32e", "train.precision=bf16", "--devices", "8", "--shard")
    for words in ("forward  backward", "router", "at its peak, bf16, on each device: cut over 8 devices", "gathered"):
        assert words in text
