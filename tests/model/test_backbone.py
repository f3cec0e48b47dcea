"""The Multiway backbone: who serves which token, what padding and recomputation may not change."""

import copy
from typing import Any

import pytest
import torch

from tests.model.test_sizes import small, sparse
from tests.own_forward import only_in_own_forward
from vlmoe.config import ModelConfig, UserError
from vlmoe.model import Backbone
from vlmoe.model.block import DropPath
from vlmoe.moe import MoELayer, Routing, route


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def image(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8)


def text(batch: int = 3, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length))


def touched(backbone: Backbone) -> set[str]:
    return {n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_shapes_and_segments() -> None:
    backbone = Backbone(sparse(small()))
    out = backbone([backbone.image(image()), backbone.text(text())])
    assert out.x_BTD.shape == (3, 5 + 6, 32)
    assert out.features("vision").shape == (3, 5, 32)
    assert out.features("text").shape == (3, 6, 32)
    # odd blocks are 1 and 3; the top two (2, 3) are served by the VL-FFN for pairs
    assert set(out.stats) == {"1/vision", "1/text"}
    assert set(backbone([backbone.text(text())]).stats) == {"1/text", "3/text"}
    with pytest.raises(KeyError, match="vision"):
        backbone([backbone.text(text())]).features("vision")


@pytest.mark.parametrize("recompute", [False, True])
def test_no_parameter_is_read_outside_its_own_forward(recompute: bool) -> None:
    changes = {"common_experts": 2, "sub_ln": True, "attention": "split", "patch_stem": "conv", "recompute": recompute}
    backbone = Backbone(sparse(small(**changes)))
    with only_in_own_forward(backbone):
        out = backbone([backbone.image(image(), torch.rand(3, 4) > 0.5), backbone.text(text())])
        (out.x_BTD.sum() + sum(s.loss for s in out.stats.values())).backward()


def test_a_text_only_batch_leaves_every_vision_expert_without_gradient() -> None:
    backbone = Backbone(sparse(small()))
    out = backbone([backbone.text(text())])
    (out.x_BTD.sum() + sum(s.loss for s in out.stats.values())).backward()
    names = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert any(".text.layer.experts." in n for n in names)
    assert not [n for n in names if ".branches.vision." in n or ".fused." in n or n.startswith("image.")]


def test_an_image_only_batch_leaves_the_text_side_alone() -> None:
    backbone = Backbone(sparse(small(attention="split")))
    backbone([backbone.image(image())]).x_BTD.sum().backward()
    names = touched(backbone)
    assert any(".branches.vision." in n for n in names)
    assert not [n for n in names if ".text." in n or n.startswith("text.") or ".fused." in n]


def test_a_pair_uses_the_fused_ffn_on_top_and_its_own_branches_below() -> None:
    backbone = Backbone(small(vl_ffn=1))
    backbone([backbone.image(image()), backbone.text(text())]).x_BTD.square().sum().backward()
    names = touched(backbone)
    assert any(n.startswith("blocks.3.fused.") for n in names)
    assert not [n for n in names if n.startswith("blocks.3.branches.")]
    assert any(n.startswith("blocks.2.branches.vision.") for n in names)
    assert any(n.startswith("blocks.2.branches.text.") for n in names)


@pytest.mark.parametrize("attention", ["shared", "split"])
@pytest.mark.parametrize("sub_ln", [False, True])
def test_padding_changes_no_real_token(attention: str, sub_ln: bool) -> None:
    backbone = Backbone(sparse(small(attention=attention, sub_ln=sub_ln))).double().eval()
    pixels, ids = image(2), text(2, 5)
    padded = torch.cat([ids, torch.randint(0, 50, (2, 3))], dim=1)
    valid = torch.arange(8).expand(2, 8) < 5
    plain = backbone([backbone.image(pixels), backbone.text(ids)])
    other = backbone([backbone.image(pixels), backbone.text(padded, valid)])
    torch.testing.assert_close(other.features("vision"), plain.features("vision"))
    torch.testing.assert_close(other.features("text")[:, :5], plain.features("text"))
    for name, stats in plain.stats.items():
        assert other.stats[name].tokens == stats.tokens
        torch.testing.assert_close(other.stats[name].loss, stats.loss)


def test_samples_of_a_batch_do_not_meet() -> None:
    backbone = Backbone(sparse(small())).double().eval()
    pixels, ids = image(4), text(4)
    whole = backbone([backbone.image(pixels), backbone.text(ids)]).x_BTD
    for b in range(4):
        one = backbone([backbone.image(pixels[b : b + 1]), backbone.text(ids[b : b + 1])]).x_BTD
        torch.testing.assert_close(one[0], whole[b])


def test_the_image_informs_the_text_and_back() -> None:
    backbone = Backbone(small()).eval()
    pixels, ids = image(2), text(2)
    before = backbone([backbone.image(pixels), backbone.text(ids)])
    after = backbone([backbone.image(pixels.flip(0)), backbone.text(ids)])
    assert not torch.allclose(before.features("text"), after.features("text"), atol=1e-4)


def test_hidden_patches_show_nothing_of_their_pixels() -> None:
    backbone = Backbone(small()).eval()
    pixels = image(2)
    mask = torch.tensor([[True, False, False, False]] * 2)
    changed = pixels.clone()
    changed[:, :, :8, :8] = 255 - changed[:, :, :8, :8]
    torch.testing.assert_close(backbone.image(pixels, mask).x_BTD, backbone.image(changed, mask).x_BTD)
    assert not torch.allclose(backbone.image(pixels).x_BTD, backbone.image(changed).x_BTD)


@pytest.mark.parametrize("config", [sparse(small()), sparse(small(drop_path=0.3), k=2)], ids=["top-1", "drop-path k=2"])
def test_recomputation_gives_the_same_gradients(config: ModelConfig) -> None:
    plain = Backbone(config).train()
    recomputed = copy.deepcopy(plain)
    recomputed.config = copy.copy(config)
    recomputed.config.recompute = True
    pixels, ids = image(), text()
    for backbone in (plain, recomputed):
        torch.manual_seed(1)  # routing noise and drop-path draw from the global generator
        out = backbone([backbone.image(pixels), backbone.text(ids)])
        (out.x_BTD.square().mean() + sum(s.loss for s in out.stats.values())).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_recomputation_replays_the_routing_when_numerics_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Router weights change between forward and recomputation; the recorded decisions still stand."""
    config = sparse(small(recompute=True))
    backbone = Backbone(config).train()
    layers = [m for m in backbone.modules() if isinstance(m, MoELayer)]
    seen: list[torch.Tensor] = []

    def recording(logits_NE: torch.Tensor, *args: Any, **kwargs: Any) -> Routing:
        routing = route(logits_NE, *args, **kwargs)
        seen.append(routing.expert_index_NK.clone())
        return routing

    monkeypatch.setattr("vlmoe.moe.routers.route", recording)
    out = backbone([backbone.text(text(8))])
    loss = out.x_BTD.square().mean()
    with torch.no_grad():
        for layer in layers:
            layer.router.weight.copy_(torch.randn_like(layer.router.weight))
    loss.backward()
    first, second = seen[:2], seen[2:][::-1]  # blocks are recomputed from the top
    assert len(first) == len(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation() -> None:
    x = torch.ones(20000, 1, 1)
    drop = DropPath(0.25)
    y = drop.train()(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(x), x)


def test_wrong_inputs_are_named() -> None:
    backbone = Backbone(small())
    with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, 16, 16\)"):
        backbone.image(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        backbone.image(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"at most model\.max_text = 8"):
        backbone.text(text(1, 9))
    with pytest.raises(ValueError, match="at least one part"):
        backbone([])


@pytest.mark.parametrize("router", ["soft", "expert_choice"])
def test_routing_that_looks_ahead_cannot_write(router: str) -> None:
    config = sparse(small())
    config.text.router.type = router
    backbone = Backbone(config)
    with pytest.raises(UserError, match=f"'model.text.router.type' is {router}: its routing looks at later tokens"):
        backbone([backbone.image(image()), backbone.text(text())], causal="text")


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_nothing_of_a_patch_reaches_another_before_the_blocks(stem: str) -> None:
    """A hidden patch may hold anything, and a visible one changes its own token alone."""
    backbone = Backbone(small(patch_stem=stem))
    one = image(1)
    other = one.clone()
    other[..., :8, 8:] = 255 - other[..., :8, 8:]  # the second of four patches
    shown = backbone.image(torch.cat([one, other])).x_BTD[:, 1:]
    assert (shown[0] != shown[1]).any(dim=1).tolist() == [False, True, False, False]
    hidden = backbone.image(torch.cat([one, other]), torch.tensor([[False, True, False, False]] * 2)).x_BTD
    assert torch.equal(hidden[0], hidden[1])


def test_a_stem_sees_shapes_that_no_single_pixel_tells() -> None:
    """The projection of a patch is linear, so it takes the mean of two patches to the mean of what they give."""
    both = image(2)
    both[1] = 255 - both[0]
    mean = torch.full_like(both[:1], 127)  # within a two hundred and fifty-fifth
    for stem, linear in (("linear", True), ("conv", False)):
        backbone = Backbone(small(patch_stem=stem))
        a, b, m = backbone.image(torch.cat([both, mean])).x_BTD[:, 1:]
        assert torch.allclose((a + b) / 2, m, atol=0.05) == linear
