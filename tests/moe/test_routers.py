"""Every router and balancer against values worked out by hand, and what each promises."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmoe.moe import ROUTERS, Experts, MoELayer, SoftMoELayer, balance, choose_tokens, route
from vlmoe.moe.layer import SCOPES

D, H, E = 8, 12, 4
PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=1e-6)


def make(router: str, **options: Any) -> MoELayer:
    torch.manual_seed(0)
    kind = SoftMoELayer if router == "soft" else MoELayer
    if router != "soft":
        options["router"] = router
    made = kind(D, H, E, **options).double()
    with torch.no_grad():
        for p in made.experts.parameters():
            p.normal_(std=0.3)
        if router != "soft":
            made.router.weight.mul_(50)
    return made


def tokens(n: int = 20) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------- sigmoid
def test_sigmoid_gates_are_each_their_own() -> None:
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])  # sigmoid 0.5, 0.75, 0.25
    r = route(logits, 2, scores="sigmoid")
    assert r.expert_index_NK.tolist() == [[1, 0]]
    close(r.gate_NK, [[0.75, 0.5]])
    close(r.probs_NE, [[0.5 / 1.5, 0.75 / 1.5, 0.25 / 1.5]])
    close(route(logits, 2, scores="sigmoid", renormalize=True).gate_NK, [[0.6, 0.4]])


def test_bias_moves_the_choice_and_not_the_gate() -> None:
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])
    r = route(logits, 1, scores="sigmoid", bias_E=torch.tensor([0.3, 0.0, 0.0]))
    assert r.expert_index_NK.tolist() == [[0]]
    close(r.gate_NK, [[0.5]])


def test_bias_goes_against_the_sign_of_the_excess() -> None:
    router = ROUTERS["sigmoid"](D, E, bias_rate=0.01)
    router.balance(torch.tensor([10, 2, 4, 4]))  # mean 5
    close(router.bias_E, [-0.01, 0.01, 0.01, 0.01])
    router.balance(torch.tensor([5, 5, 5, 5]))
    close(router.bias_E, [-0.01, 0.01, 0.01, 0.01])
    router.balance(torch.tensor([0, 9, 9, 9]), scale=0.0)  # a step that was skipped
    close(router.bias_E, [-0.01, 0.01, 0.01, 0.01])
    assert "bias_E" in router.state_dict()
    assert "bias_E" not in ROUTERS["sigmoid"](D, E).state_dict()


def test_bias_updates_even_out_a_router_without_any_loss() -> None:
    moe, x = make("sigmoid", balance=0.0, z=0.0, noise=0.0, bias_rate=0.002), tokens(400) + 1
    before = moe(x)[1].load_E
    for _ in range(600):
        moe.router.balance(moe(x)[1].load_E)
    after = moe(x)[1].load_E
    assert before.max() > 200
    assert after.max() < 110


# -------------------------------------------------------------------------------------------------------------- cosine
def test_cosine_logits_by_hand() -> None:
    router = ROUTERS["cosine"](2, 2).double()
    with torch.no_grad():
        router.project.copy_(torch.eye(2))  # type: ignore[operator]
        router.weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
        router.log_scale.fill_(math.log(5))  # type: ignore[operator]
    r = router(torch.tensor([[0.0, 7.0], [2.0, 0.0]], dtype=torch.float64))
    close(r.logits_NE, [[0.0, 5 / math.sqrt(2)], [5.0, 5 / math.sqrt(2)]])


def test_cosine_logits_stay_small_however_large_the_tokens() -> None:
    moe, x = make("cosine"), tokens()
    close(moe(x)[1].logit_size, moe(1000 * x)[1].logit_size)
    with torch.no_grad():
        moe.router.log_scale.fill_(50.0)  # type: ignore[operator]
    assert moe(x)[1].logit_size <= 100


# ------------------------------------------------------------------------------------------------------- expert choice
def test_expert_choice_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.31, 0.2], [0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    r = choose_tokens(probs.log(), 1, factor=1.5)  # each expert takes ceil(1.5 * 4 / 3) = 2 tokens
    taken = [
        sorted(e for e, kept in zip(row, chosen, strict=True) if kept)
        for row, chosen in zip(r.expert_index_NK.tolist(), r.chosen_NK.tolist(), strict=True)  # type: ignore[union-attr]
    ]
    # expert 0: tokens 2, 0; expert 1: token 1, then 0 (0.3, before 3); expert 2: tokens 3, 1
    assert taken == [[0, 1], [1, 2], [0], [2]]
    close(r.gate_NK, [[0.5 / 1.01, 0.31 / 1.01], [0.6, 0.3], [0.7, 0.0], [0.5, 0.0]])
    close(balance.load_of(r, None), [2, 2, 2])


def test_expert_choice_takes_no_padding_and_counts_real_tokens() -> None:
    mask = torch.tensor([True, True, False, True])
    r = choose_tokens(PROBS.log(), 1, mask)  # ceil(3 / 3) = 1 token each: 0 -> token 0, 1 -> token 1, 2 -> token 3
    close(balance.load_of(r, mask), [1, 1, 1])
    assert r.chosen_NK is not None
    assert not r.chosen_NK[2].any()


def test_tokens_that_no_expert_takes_are_counted() -> None:
    moe, x = make("expert_choice", noise=0.0), tokens()
    _, stats = moe(x)
    assert stats.load_E.tolist() == [5] * E
    alone = (~stats.kept_NK.any(dim=1)).sum()
    assert stats.unserved == alone > 0
    assert stats.dropped == 0


# ---------------------------------------------------------------------------------------------------------------- hash
def test_hash_never_changes_and_has_no_gradient() -> None:
    moe, x = make("hash", k=2), tokens()
    y, stats = moe(x)
    y.sum().backward()
    close(stats.gate_NK, torch.full((20, 2), 0.5))
    assert moe.router.weight.grad is None
    assert stats.loss == 0
    assert torch.equal(moe(x)[1].expert_index_NK, stats.expert_index_NK)


# ---------------------------------------------------------------------------------------------------------------- soft
def test_soft_mixture_by_hand() -> None:
    """Against the equations of the paper, written with loops over sequences, experts and slots."""
    moe, x = make("soft", slots=2), tokens(10).view(2, 5, D)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    y, stats = moe(x, mask)
    phi = torch.nn.functional.normalize(moe.router.weight, dim=-1)
    squares = torch.zeros((), dtype=torch.float64)
    for b, n in ((0, 5), (1, 3)):
        real = x[b, :n]
        logits = torch.nn.functional.normalize(real, dim=-1) @ phi.t() * D**0.5
        into, out = logits.softmax(dim=0), logits.softmax(dim=1)
        expected = torch.zeros(n, D, dtype=torch.float64)
        for e in range(E):
            for s in range(2):
                slot = (into[:, 2 * e + s, None] * real).sum(dim=0)
                h = torch.nn.functional.gelu(slot @ moe.experts.w1[e] + moe.experts.b1[e])  # type: ignore[index]
                expected += out[:, 2 * e + s, None] * (h @ moe.experts.w2[e] + moe.experts.b2[e])  # type: ignore[index]
        torch.testing.assert_close(y[b, :n], expected)
        squares += logits.square().sum()
    assert (y[1, 3:] == 0).all()
    torch.testing.assert_close(stats.logit_size, (squares / (8 * 2 * E)).sqrt())  # of real tokens, each slot
    assert stats.tokens == 8
    assert stats.load_E.sum() == 8


def test_soft_sequences_do_not_see_each_other() -> None:
    moe, x = make("soft", slots=2), tokens(10).view(2, 5, D)
    torch.testing.assert_close(moe(x)[0][:1], moe(x[:1])[0])
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    x = x.clone().requires_grad_()
    y, _ = moe(x, nothing)
    y.sum().backward()
    assert (y == 0).all()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ all, and combinations
@pytest.mark.parametrize("router", [*ROUTERS, "soft"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_trains_and_backends_agree(router: str, k: int, backend: str) -> None:
    x, mask = tokens(), torch.arange(20) < 17
    found = []
    for name in ("loop", backend):
        moe = make(router, k=k, backend=name, noise=0.0, shared=1)
        z = x.clone().requires_grad_()
        y, stats = moe(z, mask)
        (y.sin().sum() + stats.loss).backward()
        assert all(p.grad is not None for n, p in moe.named_parameters() if p.requires_grad), router
        found.append((y, z.grad, stats.load_E, moe.experts.w1.grad, moe.router.weight.grad))
        assert (y[~mask] == 0).all()
        assert torch.equal(z.grad[~mask], torch.zeros(3, D, dtype=torch.float64))  # type: ignore[index]
    for ours, theirs in zip(*found, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("router", [*ROUTERS, "soft"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_router_without_a_gradient_from_the_task_is_refused(router: str, renormalize: bool) -> None:
    options = {"k": 1, "renormalize": renormalize, "balance": 0.0, "z": 0.0, "noise": 0.0}
    if renormalize and router in ("softmax", "sigmoid", "cosine"):  # g / g = 1 has no slope
        with pytest.raises(ValueError, match=r"renormalize: .* no gradient from the task; expected k above 1"):
            make(router, **options)
        return
    moe = make(router, **options)
    moe(tokens())[0].square().mean().backward()
    if router == "hash":  # learns nothing, by design
        assert moe.router.weight.grad is None
    else:
        assert moe.router.weight.grad is not None and moe.router.weight.grad.norm() > 1e-6


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "cosine", "hash"])
def test_token_choice_does_not_depend_on_company(router: str) -> None:
    moe, x = make(router, k=2, noise=0.0), tokens()
    torch.testing.assert_close(moe(x)[0][:7], moe(x[:7])[0])


def test_shared_experts_serve_every_token() -> None:
    plain, both, x = make("softmax", noise=0.0), make("softmax", noise=0.0, shared=2), tokens()
    assert both.shared is not None
    both.experts.load_state_dict(plain.experts.state_dict())
    both.router.load_state_dict(plain.router.state_dict())
    torch.testing.assert_close(both(x)[0], plain(x)[0] + both.shared(x))


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_common_experts_count_like_own_ones(backend: str) -> None:
    """Three own experts and one in common serve as four of one's own."""
    whole, x = make("softmax", k=2, noise=0.0, backend=backend), tokens()
    parted = MoELayer(D, H, 3, k=2, common=1, noise=0.0, backend=backend).double()
    common = Experts(D, H, 1, backend=backend).double()
    parted.router.load_state_dict(whole.router.state_dict())
    for name in ("w1", "b1", "w2", "b2"):
        full = getattr(whole.experts, name).detach()
        getattr(parted.experts, name).data.copy_(full[:3])
        getattr(common, name).data.copy_(full[3:])
    y, stats = parted(x, None, common)
    expected, _ = whole(x)
    torch.testing.assert_close(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(common.w1.grad, whole.experts.w1.grad[3:])  # type: ignore[index]
    assert stats.load_E.shape == (4,)
    with pytest.raises(ValueError, match="common: expected 1 experts"):
        parted(x)


# --------------------------------------------------------------------------------------------------------------- losses
def test_local_and_global_entropy_by_hand() -> None:
    r = route(torch.tensor([[0.5, 0.5], [1.0, 1e-12]]).log(), 1)
    close(balance.gate_entropy(r), math.log(2) / 2)
    mean = torch.tensor([0.75, 0.25])
    entropy = float(-(mean * mean.log()).sum())
    close(balance.global_entropy_loss(r), math.log(2) - entropy)
    close(balance.global_entropy_loss(r, experts=1.5), 0.0)  # e^H is 1.75: enough
    assert balance.global_entropy_loss(r, torch.zeros(2, dtype=torch.bool)) == 0


def test_sigmoid_entropy_is_that_of_the_normalized_scores() -> None:
    r = route(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), 1, scores="sigmoid")
    close(balance.gate_entropy(r), math.log(4))


def test_limoe_losses_even_out_a_collapsed_router() -> None:
    """LIMoE, section 2.2."""
    x = tokens(256) + 0.5
    moe = make("softmax", balance=0.0, z=0.0, noise=0.0, local_entropy=0.1, global_entropy=2.0)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0] = x.mean(dim=0)
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    before = moe(x)[1]
    for _ in range(200):
        optimizer.zero_grad()
        moe(x)[1].loss.backward()
        optimizer.step()
    stats = moe(x)[1]
    assert stats.losses["global_entropy"] < 0.1 * before.losses["global_entropy"]
    assert before.load_E.max() > 2 * before.load_E.double().mean()
    assert stats.load_E.max() < before.load_E.max()


def test_switch_loss_equals_that_of_transformers() -> None:
    """On the same logits, k times as large there, because each of k choices counts for a whole token."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    torch.manual_seed(0)
    logits, mask = torch.randn(60, 5), torch.arange(60) % 20 < 15
    for k in (1, 2, 3):
        ours = balance.balance_loss(route(logits, k))
        theirs = mixtral.load_balancing_loss_func((logits,), num_experts=5, top_k=k)
        close(ours * k, float(theirs))
        masked = balance.balance_loss(route(logits, k), mask)
        theirs = mixtral.load_balancing_loss_func((logits,), 5, k, attention_mask=mask.view(3, 20).long())
        close(masked * k, float(theirs))


def test_importance_is_vmoes_with_the_populations_deviation() -> None:
    r = route(PROBS.log(), 1)
    importance = PROBS.sum(dim=0)
    expected = (importance.std(correction=0) / importance.mean()) ** 2
    close(balance.importance_loss(r), float(expected))


def test_a_wider_balance_loss_is_left_to_the_caller() -> None:
    x = tokens()
    for scope in SCOPES:
        moe = make("softmax", noise=0.0, z=0.0, balance_over=scope)
        _, stats = moe(x)
        if scope == "pass":
            assert stats.balance is None
            assert stats.loss > 0
        else:
            assert stats.balance is not None
            assert stats.loss == 0
            value = balance.balance_of(stats.load_E, stats.balance.probability_E, stats.tokens)
            close(value, float(stats.losses["balance"]))


def test_pressure_multiplies_the_routing_losses() -> None:
    moe, x = make("softmax", noise=0.0), tokens()
    once = moe(x)[1].loss
    moe.pressure = 4.0
    torch.testing.assert_close(moe(x)[1].loss, 4 * once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "best"}, "router: expected one of softmax, sigmoid, cosine, expert_choice, hash, got 'best'"),
        ({"balance_over": "world"}, "balance_over: expected one of pass, micro, step, global, got 'world'"),
        ({"shared": -1}, "shared: expected a number of experts"),
        ({"bias_rate": -0.1}, "bias_rate: expected a number not below 0"),
        ({"global_experts": 5}, r"global_experts: expected 1 to experts \(4\), got 5"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(D, H, E, **options)
