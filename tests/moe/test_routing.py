"""Routing and its losses against values worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from vlmoe.moe import balance
from vlmoe.moe.routers import Router
from vlmoe.moe.routing import Routing, route

# Softmax of log(p) is p when p sums to one, so rows of this table are the gates themselves.
PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])


def routing(k: int = 1, **options: Any) -> Routing:
    return route(PROBS.log(), k, **options)


def close(actual: torch.Tensor, expected: object) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_top_one() -> None:
    r = routing()
    assert r.expert_index_NK.tolist() == [[0], [1], [0], [2]]
    close(r.gate_NK, [[0.5], [0.6], [0.7], [0.5]])
    assert r.noisy_NE is r.logits_NE


def test_top_two_best_first() -> None:
    r = routing(2)
    assert r.expert_index_NK.tolist() == [[0, 1], [1, 2], [0, 1], [2, 1]]
    close(r.gate_NK, [[0.5, 0.3], [0.6, 0.3], [0.7, 0.2], [0.5, 0.3]])


def test_renormalized_gates_sum_to_one() -> None:
    close(routing(2, renormalize=True).gate_NK, [[5 / 8, 3 / 8], [6 / 9, 3 / 9], [7 / 9, 2 / 9], [5 / 8, 3 / 8]])
    close(routing(1, renormalize=True).gate_NK, [[1.0]] * 4)


def test_noise_has_the_given_std_and_gates_follow_it() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(20000, 4)
    r = route(logits, 1, noise_std=0.25)
    assert r.noisy_NE.std().item() == pytest.approx(0.25, rel=0.02)
    assert r.noisy_NE.mean().item() == pytest.approx(0, abs=0.005)
    close(r.probs_NE, r.noisy_NE.softmax(-1))
    close(r.gate_NK[:, 0], r.probs_NE.max(-1).values)
    assert r.logits_NE is logits


def test_load_and_importance() -> None:
    close(balance.load_of(routing(), None), [2, 1, 1])
    close(balance.load_of(routing(2), None), [2, 4, 2])
    close(balance.importance_of(routing(), None), [1.5, 1.4, 1.1])
    mask = torch.tensor([True, True, False, True])
    close(balance.load_of(routing(), mask), [1, 1, 1])
    close(balance.importance_of(routing(), mask), [0.8, 1.2, 1.0])


def test_balance_loss() -> None:
    # shares (.5, .25, .25), mean probabilities (.375, .35, .275): 3 * (.1875 + .0875 + .06875)
    close(balance.balance_loss(routing()), 1.03125)
    # shares of eight choices (.25, .5, .25): 3 * (.09375 + .175 + .06875)
    close(balance.balance_loss(routing(2)), 1.0125)
    # the last three real tokens of four: shares (1/3, 1/3, 1/3) give 1 whatever the probabilities
    close(balance.balance_loss(routing(), torch.tensor([False, True, True, True])), 1.0)


def test_balance_loss_of_collapse_is_the_number_of_experts() -> None:
    close(balance.balance_loss(route(torch.tensor([[50.0, 0, 0, 0]] * 5), 1)), 4.0)


def test_importance_loss() -> None:
    # importance (1.5, 1.4, 1.1): mean 4/3, squared deviations .027778 + .004444 + .054444 = .086667, over 3 and 16/9
    close(balance.importance_loss(routing()), 0.01625)
    # without the third token (.8, 1.2, 1.0): mean 1, variance .08 / 3
    close(balance.importance_loss(routing(), torch.tensor([True, True, False, True])), 0.08 / 3)


def by_hand(logits: list[list[float]], noisy: list[list[float]], k: int, std: float) -> Routing:
    logits_NE, noisy_NE = torch.tensor(logits), torch.tensor(noisy)
    probs_NE = noisy_NE.softmax(-1)
    index_NK = noisy_NE.topk(k).indices
    return Routing(index_NK, probs_NE.gather(-1, index_NK), logits_NE, noisy_NE, probs_NE, std)


def test_load_loss() -> None:
    # Thresholds 1.0 and 0.5 (largest noisy logit), std 0.5.
    # Token 1: (0.5 - 1) / .5 = -1 -> .158655; (1 - 1) -> .5. Token 2: (1 - .5) / .5 = 1 -> .841345; -1 -> .158655.
    r = by_hand([[0.5, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.5, 0.25]], 1, 0.5)
    means = [(0.1586553 + 0.8413447) / 2, (0.5 + 0.1586553) / 2]
    mean = sum(means) / 2
    expected = sum((m - mean) ** 2 for m in means) / 2 / mean**2
    close(balance.load_loss(r), expected)
    assert expected == pytest.approx(0.042352, rel=1e-4)
    # Only the second token: chances .841345 and .158655, mean .5, std .341345
    close(balance.load_loss(r, torch.tensor([False, True])), (0.3413447 / 0.5) ** 2)


def test_load_loss_with_two_choices_takes_the_second_best_as_threshold() -> None:
    # Threshold 1 (second of 3, 1, 0), std 1: chances Phi(2) = .977250, Phi(0) = .5, Phi(-1) = .158655
    r = by_hand([[3.0, 1.0, 0.0]], [[3.0, 1.0, 0.0]], 2, 1.0)
    means = torch.tensor([0.9772499, 0.5, 0.1586553])
    close(balance.load_loss(r), means.var(correction=0) / means.mean() ** 2)


def test_load_loss_is_the_chance_to_be_chosen_again() -> None:
    """Redraw one expert's noise many times: how often it enters the top k is what the loss takes the spread of."""
    torch.manual_seed(1)
    logits, std = torch.randn(1, 4), 0.7
    r = route(logits, 2, noise_std=std)
    threshold = r.noisy_NE.sort(descending=True).values[0, 1]
    redrawn = logits + std * torch.randn(200000, 4)
    frequency_E = (redrawn > threshold).double().mean(0)
    expected = frequency_E.var(correction=0) / frequency_E.mean() ** 2
    assert balance.load_loss(r).item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_load_loss_with_a_bias_is_the_chance_to_be_chosen_again(scores: str, k: int) -> None:
    """Redraw one expert's noise many times, and count how often it is chosen before the k-th expert that was."""
    torch.manual_seed(2)
    logits, std, bias = torch.randn(1, 4).double(), 0.7, torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    r = route(logits, k, noise_std=std, scores=scores, bias_E=bias)
    kth, redrawn = r.expert_index_NK[0, -1], 200000
    frequency = []
    for e in range(4):
        noisy = r.noisy_NE.expand(redrawn, 4).clone()
        noisy[:, e] = logits[0, e] + std * torch.randn(redrawn)
        score = (noisy.sigmoid() if scores == "sigmoid" else noisy.softmax(-1)) + bias
        won = score[:, e] > score[:, kth] if e != kth else noisy[:, e] > r.noisy_NE[0, e]
        frequency.append(won.double().mean())
    expected_E = torch.stack(frequency)
    expected = expected_E.var(correction=0) / expected_E.mean() ** 2
    assert balance.load_loss(r).item() == pytest.approx(expected.item(), rel=0.02)


def test_load_loss_with_a_bias_by_hand() -> None:
    # Sigmoid scores .5, .5, .25 of noisy logits 0, 0, -ln 3; biases 0, -.25, .25 choose expert 0 or 2 (.5 each): k = 2
    # takes both, the last chosen has .5. Expert 0 needs a score of .5, expert 1 of .75, expert 2 of .25: logits 0, ln 3
    # and -ln 3; its own noise-free logits are these minus 1, std 1: chances Phi(-1) each, so they are even.
    third = math.log(3)
    r = Routing(
        torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[-1.0, third - 1, -third - 1]]),
        torch.tensor([[0.0, 0.0, -third]]), torch.full((1, 3), 1 / 3), 1.0, "sigmoid",
        bias_E=torch.tensor([0.0, -0.25, 0.25]),
    )  # fmt: skip
    close(balance.load_loss(r), 0.0)
    # Without a bias the threshold is -ln 3 for all: chances Phi of the excesses
    chance = torch.tensor([-1 + third, 2 * third - 1, -1.0]).double()
    chance = torch.distributions.Normal(0.0, 1.0).cdf(chance)
    close(balance.load_loss(replace(r, bias_E=None)), chance.var(correction=0) / chance.mean() ** 2)
    # Softmax: d = 0 everywhere is no bias at all
    soft = route(torch.randn(5, 4), 2, noise_std=0.5)
    close(balance.load_loss(replace(soft, bias_E=torch.full((4,), 0.1))), balance.load_loss(soft))


def test_load_loss_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="noise"):
        balance.load_loss(routing())


def test_z_loss() -> None:
    close(balance.z_loss(routing()), 0.0)  # log of probabilities: logsumexp is 0
    # logsumexp of (0, 0) is log 2, of (1, 1) is 1 + log 2
    r = route(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1)
    close(balance.z_loss(r), (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2)
    close(balance.z_loss(r, torch.tensor([True, False])), math.log(2) ** 2)


def test_entropy() -> None:
    close(balance.gate_entropy(route(torch.zeros(3, 4), 1)), math.log(4))
    close(balance.gate_entropy(route(torch.tensor([[0.5, 0.25, 0.25]]).log(), 1)), 1.5 * math.log(2))


@pytest.mark.parametrize("name", ["balance_loss", "importance_loss", "load_loss", "z_loss", "gate_entropy"])
def test_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    logits, noise = torch.randn(6, 4), 0.3 * torch.randn(6, 4)
    loss = getattr(balance, name)
    real = by_hand(logits.tolist(), (logits + noise).tolist(), 2, 0.3)
    bad = torch.full((3, 4), float("nan"))
    padded = by_hand(torch.cat([logits, bad]).tolist(), torch.cat([logits + noise, bad]).tolist(), 2, 0.3)
    padded.expert_index_NK[6:] = torch.tensor([0, 1])
    close(loss(padded, torch.arange(9) < 6), loss(real))
    close(loss(padded, torch.zeros(9, dtype=torch.bool)), 0.0)


def test_losses_have_gradients_that_lower_them() -> None:
    torch.manual_seed(0)
    for loss in (balance.balance_loss, balance.importance_loss, balance.load_loss, balance.z_loss):
        logits = (torch.randn(64, 4) + torch.tensor([1.0, 0, 0, 0])).requires_grad_()
        noise = 0.25 * torch.randn(64, 4)

        def value(logits: torch.Tensor, loss: object = loss, noise: torch.Tensor = noise) -> torch.Tensor:
            noisy = logits + noise
            index = noisy.topk(1).indices
            probs = noisy.softmax(-1)
            return loss(Routing(index, probs.gather(-1, index), logits, noisy, probs, 0.25))  # type: ignore[operator]

        before = value(logits)
        (grad,) = torch.autograd.grad(before, logits)
        assert grad.abs().sum() > 0
        assert value(logits.detach() - 0.5 * grad / grad.norm()) < before


def test_router_works_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    router, x = Router(16, 4), torch.randn(8, 16)
    plain = router(x).logits_NE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = router(x).logits_NE
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)
    assert router(x.bfloat16()).logits_NE.dtype == torch.float32
