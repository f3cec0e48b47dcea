"""Rules against routers without the expert, effects against values computed by hand, intervals against their claim."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.interpret.test_own import finetuned
from tests.interpret.world import Toy, batch_of, tiny
from vlmoe.config import UserError
from vlmoe.interpret.causal import Matrix, ablate, agreement, force, matrix, task_score
from vlmoe.interpret.effects import Ground
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.recorder import record
from vlmoe.interpret.rules import reroute, silence
from vlmoe.interpret.sites import Choice, Site
from vlmoe.moe import Router, Routing
from vlmoe.tasks.answer import answer_all
from vlmoe.tasks.export import Finetuned


# ---------------------------------------------------------------------------------------------------------------- rules
def without(router: Router, expert: int) -> Callable[[Tensor, Tensor | None], Routing]:
    """The router as if it had never had an expert."""

    def choose(x_ND: Tensor, mask_N: Tensor | None) -> Routing:
        logits_NE = router.logits(x_ND)
        logits_NE[:, expert] = -torch.inf
        return router.choose(logits_NE, mask_N)

    return choose


ROUTERS = {
    "renormalised": ("router.k=2",),
    "three of four": ("router.k=3",),
    "renormalised sigmoid": ("router.type=sigmoid",),
    "sigmoid": ("router.type=sigmoid", "router.renormalize=false"),
    "hash": ("router.type=hash",),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_reroute_is_a_router_without_the_expert(name: str) -> None:
    trained = tiny(*(f"model.text.{change}" for change in ROUTERS[name]))
    subject, batch = OwnSubject(trained), batch_of(trained)
    site = next(s for s in subject.sites if s.name == "1/text")
    layer = trained.model.backbone.routed_layers()["1/text"]
    with site.change(reroute(site, [1])):
        found = subject.run(batch)[0].x_BTD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.router, "forward", without(layer.router, 1))
        wanted = subject.run(batch)[0].x_BTD
    valid = torch.from_numpy(subject.tokens(batch).valid_R).view(found.shape[:2])
    torch.testing.assert_close(found[valid], wanted[valid])
    assert not torch.allclose(found[valid], subject.run(batch)[0].x_BTD[valid])


def test_gates_that_are_probabilities_are_those_of_the_next_best() -> None:
    trained = tiny("model.text.router.k=1", "model.text.router.renormalize=false")
    site = next(s for s in OwnSubject(trained).sites if s.name == "1/text")
    new = reroute(site, [0])(choice_of([[0], [1]], [[0.5], [0.4]], [[0.5, 0.3, 0.2, 0.0], [0.3, 0.4, 0.2, 0.1]]))
    assert new.expert_NK.tolist() == [[1], [1]]
    assert new.gate_NK[:, 0].tolist() == pytest.approx([0.3, 0.4])


def choice_of(expert: list[list[int]], gate: list[list[float]], probs: list[list[float]]) -> Choice:
    gate_NK = torch.tensor(gate)
    return Choice(torch.tensor(expert), gate_NK, gate_NK != 0, torch.tensor(probs))


PROBS = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.3, 0.1], [0.2, 0.1, 0.3, 0.4]]


def toy_site(experts: int = 4) -> Site:
    return Toy(experts).site


def test_kind_of_gates_told_by_the_choice() -> None:
    """A site that does not say how its gates come about."""
    site, index = toy_site(), [[0, 1], [1, 2], [3, 2]]
    summed = choice_of(index, [[4 / 7, 3 / 7], [5 / 8, 3 / 8], [4 / 7, 3 / 7]], PROBS)
    new = reroute(site, [1])(summed)
    assert new.expert_NK.tolist() == [[0, 2], [0, 2], [3, 2]]  # in its place; of equal ones the first
    assert new.gate_NK.tolist() == [pytest.approx([2 / 3, 1 / 3]), pytest.approx([0.25, 0.75]),
                                    pytest.approx([4 / 7, 3 / 7])]  # fmt: skip
    scaled = choice_of(index, [[0.4, 0.3], [0.5, 0.3], [0.4, 0.3]], PROBS)
    assert reroute(site, [1])(scaled).gate_NK[0].tolist() == pytest.approx([0.4, 0.2])
    equal = choice_of(index, [[0.5, 0.5]] * 3, PROBS)
    assert reroute(site, [1])(equal).gate_NK.tolist() == [[0.5, 0.5]] * 3


def test_several_experts_and_no_one_left() -> None:
    site = toy_site()
    choice = choice_of([[0, 1], [1, 2], [3, 2]], [[0.4, 0.3], [0.5, 0.3], [0.4, 0.3]], PROBS)
    new = reroute(site, [0, 1])(choice)
    assert new.expert_NK.tolist() == [[2, 3], [3, 2], [3, 2]]
    few = reroute(site, [0, 1, 2])(choice)
    rows = zip(few.expert_NK.tolist(), few.gate_NK.tolist(), strict=True)
    assert [[e for e, g in zip(*row, strict=True) if g] for row in rows] == [[3]] * 3
    with pytest.raises(UserError, match="no expert of 4 is left to take the tokens"):
        reroute(site, [0, 1, 2, 3])
    for wrong in ([4], [-1], []):
        with pytest.raises(UserError, match="experts are numbered 0 to 3"):
            silence(site, wrong)


def test_fillers_stay_out_and_untouched_tokens_are_untouched() -> None:
    site = toy_site()
    choice = choice_of([[0, 1], [2, 0], [3, 2]], [[0.4, 0.3], [0.3, 0.0], [0.4, 0.3]], PROBS)
    new = reroute(site, [0])(choice)
    assert new.expert_NK.tolist() == [[2, 1], [2, 0], [3, 2]]
    assert new.gate_NK[1].tolist() == pytest.approx([0.3, 0.0])
    assert torch.equal(new.gate_NK[2], choice.gate_NK[2])
    assert reroute(site, [1])(replace(choice, expert_NK=torch.full((3, 2), 2))).gate_NK is choice.gate_NK


def test_silence_takes_the_gate_and_nothing_else() -> None:
    choice = choice_of([[0, 1], [2, 0], [3, 2]], [[0.6, 0.4]] * 3, PROBS)
    new = silence(toy_site(), [0])(choice)
    assert new.gate_NK.tolist() == [pytest.approx([0, 0.4]), pytest.approx([0.6, 0]), pytest.approx([0.6, 0.4])]
    assert torch.equal(new.expert_NK, choice.expert_NK)


# -------------------------------------------------------------------------------------------------------------- effects
def toy_batch(keys: str = "abcd") -> dict[str, Any]:
    """Expert 0 takes the round ones, and is right for those of them that are red."""
    S = len(keys)
    return {
        "samples": list(keys),
        "expert": [[0, 0, 1, 2]] * S,
        "right": [[0, 1, 1, -1]] * S,
        "factors": {
            "shape": [["round", "round", "square", "square"]] * S,
            "colour": [["red", "blue", "", "red"]] * S,
        },
    }


def test_effects_by_hand() -> None:
    """Gates: 1/2 for the chosen, 1/4 for the next; expert 0's next is 1."""
    toy = Toy()
    quiet = ablate(toy, [toy_batch()], {"0": [0]}, "silence", resamples=50)
    assert (quiet.loss.tokens, quiet.loss.samples) == (12, 4)
    assert quiet.loss.delta == pytest.approx(0.5 / 3)  # one of three predicted tokens of each sample
    found = {(g.factor, g.value): g for g in quiet.groups}
    assert found["shape", "round"].effect.delta == pytest.approx(0.25)
    assert found["shape", "square"].effect.delta == 0
    assert found["colour", "red"].effect.delta == pytest.approx(0.5)
    assert found["colour", "red"].effect.tokens == 4  # the other red one is not predicted
    assert found["colour", "blue"].effect.delta == 0
    contrast = found["shape", "round"].contrast
    assert contrast is not None and contrast.delta == pytest.approx(0.25)
    assert (contrast.low, contrast.high) == pytest.approx((0.25, 0.25))  # all samples are alike
    rerouted = ablate(toy, [toy_batch()], {"0": [0]}, "reroute", resamples=50)
    found = {(g.factor, g.value): g for g in rerouted.groups}
    assert found["colour", "red"].effect.delta == pytest.approx(0.5)
    assert found["colour", "blue"].effect.delta == pytest.approx(-0.5)  # expert 1 is right; its gate stays at 1/2 (all
    assert rerouted.loss.delta == pytest.approx(0)  # gates of these tokens are alike, so they are taken as equal)


def test_a_set_and_a_forced_route() -> None:
    toy = Toy()
    both = ablate(toy, [toy_batch()], {"0": [0, 1]}, "silence", resamples=10)
    assert both.loss.delta == pytest.approx(2 * 0.5 / 3)
    one = force(toy, [toy_batch()], {"0": [1]}, resamples=10)
    found = {(g.factor, g.value): g.effect.delta for g in one.groups}
    assert found["colour", "red"] == pytest.approx(0.5)
    assert found["colour", "blue"] == pytest.approx(-0.5)
    assert found["shape", "square"] == pytest.approx(0)
    assert (one.mode, one.experts) == ("force", {"0": [1]})


def test_only_the_tokens_of_one_value() -> None:
    toy = Toy()
    for only, wanted in ((("colour", "red"), 0.5), (("colour", "blue"), 0.0), (("shape", "oval"), 0.0)):
        found = ablate(toy, [toy_batch()], {"0": [0]}, "silence", only=only, resamples=10)
        red = next(g for g in found.groups if g.value == "red")
        assert red.effect.delta == pytest.approx(wanted)
    moved = force(toy, [toy_batch()], {"0": [1]}, only=("colour", "blue"), resamples=10)
    assert moved.loss.delta == pytest.approx(-0.5 / 3)


def test_only_some_rows_of_a_model_of_ours() -> None:
    trained = tiny()
    subject, batch = OwnSubject(trained), batch_of(trained)
    site = next(s for s in subject.sites if s.name == "1/text")
    seen: list[Choice] = []
    with site.watch(seen.append):
        subject.run(batch)
        ground = Ground(subject, [batch], resamples=10)
        seen.clear()
        ablate(subject, ground, {"1/text": [0]}, "silence", only=("word_class", "place"))
    table = subject.tokens(batch)
    rows = table.rows_of(site)
    place = torch.from_numpy(table.factors["word_class"][rows] == "place")
    hit = (seen[0].expert_NK == 0) & torch.from_numpy(table.valid_R[rows])[:, None]
    assert torch.equal(hit & ~seen[0].kept_NK, hit & place[:, None])
    assert (hit & place[:, None]).any() and (hit & ~place[:, None]).any()


def test_samples_that_no_such_site_sees_do_not_count() -> None:
    trained = tiny()
    subject = OwnSubject(trained)
    ground = Ground(subject, [batch_of(trained, "pair"), batch_of(trained, "image", n=4)], resamples=20)
    assert ablate(subject, ground, {"3/vision": [0]}).loss.samples == 4
    assert ablate(subject, ground, {"1/vision": [0]}).loss.samples == 12
    with pytest.raises(UserError, match="no batch passes 3/text: nothing to measure"):
        ablate(subject, ground, {"3/text": [0]})


def test_intervals_hold_what_they_claim() -> None:
    """Samples of different effect: in about 95 of 100 draws of them the interval holds the true mean."""
    toy, rng, hits, runs = Toy(), np.random.default_rng(0), 0, 120
    for _ in range(runs):
        right = np.where(rng.random((60, 4)) < rng.beta(1, 3, size=60)[:, None], 0, 1)  # tokens of a sample are alike
        batch = {"samples": [f"{i}" for i in range(60)], "expert": np.zeros((60, 4), int).tolist()}
        effect = ablate(toy, [batch | {"right": right.tolist()}], {"0": [0]}, "silence", resamples=300).loss
        hits += effect.low <= 0.5 * 0.25 <= effect.high
        assert effect.se == pytest.approx(0.5 * right.mean(axis=1).std() / 60**0.5, rel=0.25)
    assert 0.88 < hits / runs < 0.99


def test_errors() -> None:
    toy = Toy()
    with pytest.raises(UserError, match="mode 'remove': expected reroute or silence"):
        ablate(toy, [toy_batch()], {"0": [0]}, "remove")
    with pytest.raises(UserError, match="no site '7' in this model; there are 0"):
        ablate(toy, [toy_batch()], {"7": [0]})
    with pytest.raises(UserError, match="no factor 'taste' in these batches; there are shape, colour"):
        Ground(toy, [toy_batch()], factors=["taste"])
    with pytest.raises(UserError, match="nothing is predicted in these batches"):
        Ground(toy, [toy_batch() | {"right": [[-1] * 4] * 4}])
    with pytest.raises(UserError, match="give either `only` or `score`"):
        ablate(toy, [toy_batch()], {"0": [0]}, only=("shape", "round"), score=lambda: 0.0)
    assert not toy.site.router._forward_hooks


# ------------------------------------------------------------------------------------------------- matrix and agreement
def test_matrix_and_agreement_by_hand(tmp_path: Path) -> None:
    """Expert 0 takes all round tokens and is right for the red ones; expert 1 takes the square ones and is right for
    none; expert 2 takes nothing."""
    toy, rng = Toy(), np.random.default_rng(0)
    red = rng.random((40, 4)) < 0.5
    batch = {
        "samples": [f"s{i}" for i in range(40)],
        "expert": [[0, 0, 1, 1]] * 40,
        "right": np.where(red & [True, True, False, False], 0, 2).tolist(),
        "factors": {
            "shape": [["round", "round", "square", "square"]] * 40,
            "colour": np.where(red, "red", "blue").tolist(),
        },
    }
    recording = record(toy, [batch], tmp_path / "r")
    found = matrix(toy, [batch], mode="silence")
    assert list(found.sites["0"]) == [0, 1, 2]
    assert found.comparisons == 3 * 4
    values, delta_EV = found.table("0", "colour", "text")
    assert values == ["blue", "red"]
    half = float((red[:, :2].sum() / red.sum()) * 0.5)
    assert delta_EV.tolist() == [pytest.approx([0, half]), [0, 0], [0, 0]]
    causes = {(e, g.factor, g.value) for e, g in found.causes("0")}
    assert causes == {(0, "shape", "round"), (0, "colour", "red")}
    agreed = agreement(recording, found, "0")
    assert {(p.expert, p.value) for p in agreed.causes} == {(0, "round"), (0, "red")}
    assert [(p.expert, p.value, p.delta) for p in agreed.looks_specialised_but_is_not] == [(1, "square", 0)]
    assert agreed.pairs == 12
    assert 0 < agreed.spearman < 1 and agreed.interval[0] <= agreed.spearman <= agreed.interval[1] + 1e-9
    low, high = found.interval(found.sites["0"][0].groups[0].effect)
    effect = found.sites["0"][0].groups[0].effect
    assert low <= effect.low and high >= effect.high  # of all comparisons together


def test_fewer_samples_make_no_claim() -> None:
    toy = Toy()
    found = matrix(toy, [toy_batch("abcd")], mode="silence")
    assert found.comparisons == 0 and not found.causes("0")
    many = matrix(toy, [toy_batch("abcdefghijkl")], {"0": [0]}, mode="silence")
    assert many.comparisons == 4
    assert {(e, g.value) for e, g in many.causes("0")} == {(0, "round"), (0, "red")}
    assert list(many.sites["0"]) == [0]


def test_progress_and_the_mode_asked_for() -> None:
    calls: list[tuple[int, int]] = []
    found = matrix(Toy(), [toy_batch()], mode="silence", progress=lambda done, total: calls.append((done, total)))
    assert isinstance(found, Matrix) and calls == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(UserError, match="mode 'no'"):
        matrix(Toy(), [toy_batch()], mode="no")


# --------------------------------------------------------------------------------------------------------------- scores
def test_score_of_a_task_under_an_ablation() -> None:
    subject, data = finetuned("classify")
    trained = subject.trained
    assert isinstance(trained, Finetuned)
    score = task_score(trained, "val", samples=8, batch=4)
    before = np.asarray(score())
    seen = answer_all(trained.model, data, torch.device("cpu"))
    assert before.mean() == pytest.approx(seen.scores(trained.model)["accuracy"].value)
    found = ablate(subject, [data[0], data[1]], {"1/vision": [0, 1]}, score=score, resamples=50)
    assert found.score is not None
    site = next(s for s in subject.sites if s.name == "1/vision")
    with site.change(reroute(site, [0, 1])):
        after = np.asarray(score())
    assert found.score.delta == pytest.approx((after - before).mean())
    assert found.score.low <= found.score.delta <= found.score.high
    assert (found.score.samples, found.loss.tokens) == (8, 8)


def test_a_score_that_is_one_number() -> None:
    scores = iter([0.5, 0.7])  # after, then before
    found = ablate(Toy(), [toy_batch()], {"0": [0]}, score=lambda: next(scores))
    assert found.score is not None and found.score.delta == pytest.approx(-0.2)
    assert np.isnan(found.score.low)
