"""Each architecture of transformers that has an adapter, tiny and random: what a site shows is what the model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")

from tests.interpret.hf_tiny import (
    END,
    EXPECTED,
    IMAGE,
    SEEING,
    START,
    TEXT,
    build,
    pixels_of_gemma4,
    processor,
    tokenizer,
)
from vlmoe.interpret.hf import ADAPTERS, HFBatch, HFSubject
from vlmoe.interpret.recorder import record
from vlmoe.interpret.replay import replay
from vlmoe.interpret.rules import regate
from vlmoe.interpret.sites import Choice

TEXTS = ["the red dog sees 42 birds, near 17 trees.", "a cat sleeps"]
NAMES = [*TEXT, *SEEING]
TOKENS_OF_AN_IMAGE = {"aria": 4, "llama4": 4, "gemma4": 64}  # the others: a grid of 4 x 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("first", "second"):
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


def feed(name: str, images: list[Path]) -> tuple[HFSubject, HFBatch]:
    """A tiny model of the architecture and one batch for it: pairs if it sees images."""
    if name in {"llama4", "gemma4"}:  # their processors need torchvision: tensors as they would make them
        subject = HFSubject(build(name), tokenizer())
        batch = subject.batches(TEXTS)[0]
        count, seen = 4, {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
        if name == "gemma4":
            count, seen = pixels_of_gemma4([np.asarray(Image.open(p).resize((32, 32))) for p in images])
        image = torch.tensor([[START, *[IMAGE] * count, END]] * 2)
        for key, block in (("input_ids", image), ("attention_mask", torch.ones_like(image))):
            batch.inputs[key] = torch.cat([block, batch.inputs[key]], dim=1)
        batch.inputs |= seen
        if name == "gemma4":
            batch.inputs["mm_token_type_ids"] = (batch.inputs["input_ids"] == IMAGE).long()
        return subject, replace(batch, kind="pair")
    if name in SEEING:
        subject = HFSubject(build(name), tokenizer(), processor(name), image_size=32)
        return subject, subject.batches(TEXTS, images)[0]
    subject = HFSubject(build(name), tokenizer())
    return subject, subject.batches(TEXTS)[0]


@pytest.fixture(scope="module", params=NAMES)
def fed(request: pytest.FixtureRequest, images: list[Path]) -> tuple[str, HFSubject, HFBatch]:
    return request.param, *feed(request.param, images)


def logits(subject: HFSubject, batch: HFBatch) -> Tensor:
    return subject.run(batch).logits[batch.inputs["attention_mask"].bool()]


def watched(subject: HFSubject, batch: HFBatch, sites: list[Any]) -> dict[str, Choice]:
    seen: dict[str, Choice] = {}

    def keep(name: str) -> Callable[[Choice], None]:
        return lambda choice: seen.__setitem__(name, choice)

    handles = [site.watch(keep(site.name)) for site in sites]
    subject.run(batch)
    for handle in handles:
        handle.remove()
    return seen


def with_rule(subject: HFSubject, batch: HFBatch, sites: list[Any], rule: Callable[[Choice], Choice]) -> Tensor:
    handles = [site.change(rule) for site in sites]
    changed = logits(subject, batch)
    for handle in handles:
        handle.remove()
    return changed


def silenced(choice: Choice) -> Choice:
    return replace(choice, gate_NK=torch.zeros_like(choice.gate_NK))


def test_every_adapter_is_tried() -> None:
    assert {name.removesuffix("_text") for name in NAMES} == set(ADAPTERS)


def test_sites_are_those_of_the_configuration(fed: tuple[str, HFSubject, HFBatch]) -> None:
    name, subject, _ = fed
    layers, experts, k = EXPECTED[name]
    assert [s.layer for s in subject.sites] == layers
    assert {s.experts for s in subject.sites} == {experts} and {s.k for s in subject.sites} == {k}
    modalities = ["text", "vision"] if name == "ernie4_5_vl_moe" else [""] * len(layers)
    assert [s.modality for s in subject.sites] == modalities
    assert len({s.name for s in subject.sites}) == len(subject.sites)


def test_a_choice_fits_its_rows(fed: tuple[str, HFSubject, HFBatch]) -> None:
    _, subject, batch = fed
    table = subject.tokens(batch)
    seen = watched(subject, batch, subject.sites)
    assert list(seen) == [site.name for site in subject.sites]
    for site in subject.sites:
        choice, rows_N = seen[site.name], table.rows_of(site)
        assert choice.expert_NK.shape == choice.gate_NK.shape == choice.kept_NK.shape == (len(rows_N), site.k)
        assert choice.probs_NE.shape == (len(rows_N), site.experts)
        torch.testing.assert_close(choice.probs_NE.sum(1), torch.ones(len(rows_N)))
        assert np.array_equal(choice.kept_NK.all(1).numpy(), table.valid_R[rows_N])
        assert (choice.gate_NK.diff(dim=1) <= 0).all(), "best first"
        assert all(len(set(row)) == site.k for row in choice.expert_NK.tolist())


def test_gates_follow_from_probabilities(fed: tuple[str, HFSubject, HFBatch]) -> None:
    """As the site says they do, so that a token that is sent elsewhere gets the gate it would have had there."""
    name, subject, batch = fed
    if name == "phimoe":
        pytest.skip("each of its choices has a softmax of its own")
    seen = watched(subject, batch, subject.sites)
    for site in subject.sites:
        choice = seen[site.name]
        torch.testing.assert_close(regate(site, choice, choice.expert_NK), choice.gate_NK)
        if name.startswith("gemma4"):  # a learned scale of each expert is in the gate
            continue
        total_N = choice.gate_NK.sum(1)
        if site.k > 1:
            assert bool((total_N - total_N[0]).abs().max() < 1e-5) == (site.gates == "sum")  # type: ignore[attr-defined]
        chosen_NK = choice.probs_NE.gather(1, choice.expert_NK)
        torch.testing.assert_close(choice.gate_NK / total_N[:, None], chosen_NK / chosen_NK.sum(1, keepdim=True))


def test_the_model_does_what_is_shown(fed: tuple[str, HFSubject, HFBatch]) -> None:
    """The routed part of each sparse block, computed again from the choice with one expert at a time."""
    _, subject, batch = fed
    for site in subject.sites:
        experts: Any = site.block_experts  # type: ignore[attr-defined]
        got: list[tuple[Tensor, Tensor]] = []
        keep = experts.register_forward_hook(lambda _, args, out, got=got: got.append((args[0], out)))
        choice = watched(subject, batch, [site])[site.name]
        keep.remove()
        hidden, out = (t.reshape(-1, t.shape[-1]) for t in got[0])
        N, E = len(choice.expert_NK), site.experts
        if len(hidden) == N * E and E > 1:  # Llama 4: all tokens of one expert after all of another, scaled by scores
            score_NE = torch.zeros(N, E).scatter(1, choice.expert_NK, choice.gate_NK)
            scaled_NED = hidden.reshape(E, N, -1).transpose(0, 1)
            first_ND = scaled_NED[torch.arange(N), choice.expert_NK[:, 0]] / choice.gate_NK[:, :1]
            torch.testing.assert_close(scaled_NED, first_ND[:, None] * score_NE[:, :, None])
            assert first_ND.abs().sum(1).all()
            continue
        expected = torch.zeros_like(out)
        ones = torch.ones(N, 1, dtype=choice.gate_NK.dtype)
        for rank in range(site.k):
            with torch.no_grad():
                one = experts(hidden, choice.expert_NK[:, rank : rank + 1], ones)
            expected += choice.gate_NK[:, rank : rank + 1] * one.reshape(expected.shape)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_changes_change_what_they_say(fed: tuple[str, HFSubject, HFBatch]) -> None:
    _, subject, batch = fed
    plain = logits(subject, batch)
    assert torch.equal(with_rule(subject, batch, subject.sites, lambda choice: choice), plain), "bit-identical"
    for site in subject.sites:
        silent = with_rule(subject, batch, [site], silenced)
        assert not torch.allclose(silent, plain, atol=1e-4), site.name
        forced = with_rule(subject, batch, [site], lambda c: replace(c, expert_NK=torch.full_like(c.expert_NK, 1)))
        assert not torch.allclose(forced, plain, atol=1e-4), site.name
        assert not torch.allclose(forced, silent, atol=1e-4), site.name
    assert torch.equal(logits(subject, batch), plain), "handles removed"


def test_gates_of_zero_take_the_routed_part_away(fed: tuple[str, HFSubject, HFBatch]) -> None:
    _, subject, batch = fed
    for site in subject.sites:
        outs: list[Tensor] = []
        keep = site.block_experts.register_forward_hook(lambda _, args, out, outs=outs: outs.append(out))  # type: ignore[attr-defined]
        with_rule(subject, batch, [site], silenced)
        keep.remove()
        assert outs and not outs[0].any()


def test_a_watcher_sees_the_change_and_rules_follow_each_other(fed: tuple[str, HFSubject, HFBatch]) -> None:
    _, subject, batch = fed
    for site in subject.sites:
        seen: list[Choice] = []
        handles = [
            site.watch(seen.append),  # before the rules, and still told of them
            site.change(lambda c: replace(c, expert_NK=torch.full_like(c.expert_NK, 2))),
            site.change(lambda c: replace(c, expert_NK=c.expert_NK + 1)),
        ]
        subject.run(batch)
        for handle in handles:
            handle.remove()
        assert len(seen) == 1 and (seen[0].expert_NK == 3).all()
        assert not site.router._forward_hooks and not site.block_experts._forward_pre_hooks  # type: ignore[attr-defined]


def test_a_recording_is_replayed_bit_by_bit(fed: tuple[str, HFSubject, HFBatch], tmp_path: Path) -> None:
    """Also where the router would now choose otherwise."""
    _, subject, batch = fed
    recording = record(subject, [batch], tmp_path / "recording")
    plain = logits(subject, batch)
    routers: list[Any] = [site.router for site in subject.sites]  # type: ignore[attr-defined]
    before = [{name: p.detach().clone() for name, p in router.named_parameters()} for router in routers]
    with torch.no_grad():
        for router in routers:
            for parameter in router.parameters():
                parameter.neg_()
    assert not torch.equal(logits(subject, batch), plain)
    with replay(subject, recording):
        replayed = logits(subject, batch)
    for router, kept in zip(routers, before, strict=True):
        router.load_state_dict(kept, strict=False)
    torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)
    with replay(subject, recording):
        assert torch.equal(logits(subject, batch), plain)


@pytest.mark.parametrize("name", list(SEEING))
def test_images_and_texts_are_told_apart(name: str, images: list[Path]) -> None:
    subject, batch = feed(name, images)
    table = subject.tokens(batch)
    assert table.kind == "pair" and len(table.samples) == 2
    count = TOKENS_OF_AN_IMAGE.get(name, 16)
    for sample in range(2):
        rows = (table.sample_R == sample) & table.valid_R
        vision = rows & (table.modality_R == "vision")
        patches = list(range(count))
        if name == "ernie4_5_vl_moe":  # its experts of images serve their marks
            patches = [-1, *patches, -2]
        assert table.position_R[vision].tolist() == patches
        text = rows & (table.modality_R == "text")
        assert table.position_R[text].tolist() == list(range(text.sum()))
        assert "".join(table.text_R[text]).endswith(TEXTS[sample])
        assert not any(table.text_R[vision]) and not any(table.factors["token_class"][vision])
    losses_R = subject.losses(batch)
    assert np.isnan(losses_R[(table.modality_R == "vision") | ~table.valid_R]).all()
    told = (table.modality_R == "text") & table.valid_R
    assert np.array_equal(np.isnan(losses_R[told]), table.factors["token_class"][told] == "special")


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_may_be_computed_in_any_way(name: str, way: str) -> None:
    model: Any = build(name)
    model.set_experts_implementation(way)
    subject = HFSubject(model, tokenizer())
    batch = subject.batches(TEXTS)[0]
    plain = logits(subject, batch)
    assert torch.equal(with_rule(subject, batch, subject.sites, lambda c: c), plain)
    zero = with_rule(subject, batch, subject.sites, silenced)
    other = with_rule(subject, batch, subject.sites, lambda c: replace(silenced(c), expert_NK=c.expert_NK * 0))
    torch.testing.assert_close(zero, other)
    assert not torch.allclose(zero, plain, atol=1e-4)


def test_ernie_without_an_image_asks_its_experts_of_text_only(images: list[Path]) -> None:
    subject, _ = feed("ernie4_5_vl_moe", images)
    batch = subject.batches(TEXTS)[0]
    seen = watched(subject, batch, subject.sites)
    assert list(seen) == ["1/text"]
    assert len(seen["1/text"].expert_NK) == len(subject.tokens(batch).sample_R)
