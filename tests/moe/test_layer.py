"""The sparse layer as a whole: backends against the oracle, and what must not depend on anything."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmoe.moe import Experts, FeedForward, Groups, LocalDispatcher, MoELayer, replay_context_fn, route
from vlmoe.moe.backends import _ends, _grouped_linear, has_kernel, run_loop

D, H = 8, 12


def layer(experts: int = 4, dtype: torch.dtype = torch.float64, sharp: float = 50.0, **options: Any) -> MoELayer:
    """A layer whose router has opinions and whose experts differ."""
    torch.manual_seed(0)
    made = MoELayer(D, H, experts, **options).to(dtype)
    with torch.no_grad():
        made.router.weight.mul_(sharp)
        for p in made.experts.parameters():
            p.normal_(std=0.3)
    return made


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def results(moe: MoELayer, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Output and every gradient of a loss that uses both outputs."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y, stats = moe(x, mask)
    (y.sin().sum() + stats.loss).backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in moe.named_parameters()}}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        rtol, atol = (None, None) if a[name].dtype == torch.float64 else (1e-4, 1e-5)  # None: torch's own
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


DTYPES = [("padded", torch.float64), ("grouped", torch.float32), ("auto", torch.float32)]  # the kernel has no float64
VARIANTS: list[dict[str, Any]] = [
    {},
    {"k": 2, "renormalize": True},
    {"k": 3, "activation": "swiglu", "inner_norm": True},
    {"activation": "relu", "bias": False},
    {"k": 2, "capacity_factor": 0.8, "importance": 0.5, "load": 0.5},
    {"capacity_factor": 1.0, "priority": "arrival", "inner_norm": True},
    {"sharp": 0.0, "noise": 0.0},  # every token to expert 0: all others empty
]


@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_backends_equal_the_loop(
    backend: str, dtype: torch.dtype, options: dict[str, Any], padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tokens(3, 11, dtype=dtype)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) > 0.3 if padding else None
    expected = results(layer(backend="loop", dtype=dtype, **options), x, mask)
    monkeypatch.setattr("vlmoe.moe.backends.run_loop", None)  # what is tested must not fall back on it
    assert_same(results(layer(backend=backend, dtype=dtype, **options), x, mask), expected)


def test_what_the_grouped_kernel_does_not_take_goes_through_the_loop() -> None:
    """float64, and rows that are no multiple of 16 bytes."""
    for width, dtype in ((H, torch.float64), (H + 1, torch.float32)):
        made = Experts(D, width, 4, backend="grouped").to(dtype)
        assert not has_kernel((made.w1, made.w2), dtype)
        routing = route(torch.randn(9, 4, dtype=dtype), k=2)
        x_RD, groups, _ = LocalDispatcher().dispatch(tokens(9, dtype=dtype), routing, None, None)
        weights = (made.w1, made.b1, made.w2, made.b2)
        expected = run_loop(x_RD, groups, *weights, torch.nn.functional.gelu)
        assert torch.equal(made(x_RD, groups), expected)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_the_gpu_path_equals_the_loop(options: dict[str, Any], padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU counts stay on the device, unkept choices fill the end, and torch's grouped kernel computes. The kernel
    exists for CPU tensors too, so all but the device can be tested anywhere."""
    x = tokens(3, 11, dtype=torch.float32)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) > 0.3 if padding else None
    expected = results(layer(backend="loop", dtype=torch.float32, **options), x, mask)
    monkeypatch.setattr("vlmoe.moe.dispatch._on_host", lambda device: False)
    monkeypatch.setattr("vlmoe.moe.backends.has_kernel", lambda weights, dtype: True)
    for backend in ("grouped", "loop", "padded"):
        got = results(layer(backend=backend, dtype=torch.float32, **options), x, mask)
        assert_same(got, expected)


def test_the_grouped_kernels_bias_gradient_is_summed_in_float32() -> None:
    """In bfloat16, with one busy expert, one of few rows and one of none. Each sum is rounded once, to 8 bits; added up
    row by row in bfloat16 it stops growing once a row is below half a unit in the last place."""
    counts = [4000, 3, 0, 93]
    torch.manual_seed(0)
    x, w = torch.zeros(sum(counts), 16, dtype=torch.bfloat16), torch.zeros(4, 16, 24, dtype=torch.bfloat16)
    bias = torch.randn(4, 24).bfloat16().requires_grad_()
    y = _grouped_linear(x, w, bias, _ends(Groups(torch.tensor(counts), None, len(x))))
    expert = torch.arange(4).repeat_interleave(torch.tensor(counts))
    assert torch.equal(y, bias[expert])
    grad = (torch.rand(len(x), 24) + 0.5).bfloat16()
    y.backward(grad)
    exact = torch.zeros(4, 24, dtype=torch.float64).index_add_(0, expert, grad.double())
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad.double(), exact, rtol=2**-8, atol=0)
    naive = torch.zeros(24, dtype=torch.bfloat16)
    for r in grad[:4000]:
        naive = naive + r
    assert (naive.double() / exact[0] - 1).abs().max() > 0.5


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_backends_agree_for_any_shape(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    options: dict[str, Any] = {
        "experts": experts,
        "k": data.draw(st.integers(1, experts)),
        "capacity_factor": data.draw(st.none() | st.floats(0.2, 2)),
        "priority": data.draw(st.sampled_from(["batch", "arrival"])),
        "activation": data.draw(st.sampled_from(["gelu", "swiglu"])),
    }
    x = tokens(data.draw(st.integers(0, 24)), seed=data.draw(st.integers(0, 99)))
    mask = torch.rand(len(x)) > 0.5 if data.draw(st.booleans()) else None
    expected = results(layer(backend="loop", **options), x, mask)
    assert_same(results(layer(backend="padded", **options), x, mask), expected)
    expected = results(layer(backend="loop", dtype=torch.float32, **options), x.float(), mask)
    assert_same(results(layer(backend="grouped", dtype=torch.float32, **options), x.float(), mask), expected)


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_gradients_against_finite_differences(backend: str) -> None:
    moe = layer(3, backend=backend, k=2, noise=0.0, importance=0.3, sharp=20.0, activation="swiglu", inner_norm=True)
    x = tokens(5).requires_grad_()
    names = [n for n, _ in moe.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, stats = torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x,))
        return y, stats.loss

    # of the loop every entry; the others, whose gradients are compared with the loop's above, in random directions
    assert torch.autograd.gradcheck(forward, (x, *moe.parameters()), fast_mode=backend != "loop")


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_one_expert_is_the_dense_layer(activation: str, backend: str) -> None:
    moe = layer(1, activation=activation, inner_norm=True, backend=backend)
    dense = FeedForward(D, H, activation, inner_norm=True).double()
    dense.load_state_dict({n: p[0] for n, p in moe.experts.state_dict().items()})
    x = tokens(2, 5)
    torch.testing.assert_close(moe(x)[0], dense(x))


def test_identical_experts_are_the_dense_layer() -> None:
    moe = layer(5, k=3, renormalize=True)
    dense = FeedForward(D, H).double()
    with torch.no_grad():
        for name, p in moe.experts.named_parameters():
            p.copy_(p[:1].expand_as(p).clone())
            dense.get_parameter(name).copy_(p[0])
    x = tokens(4, 6)
    torch.testing.assert_close(moe(x)[0], dense(x))


def test_inner_norm_absorbs_its_affine_part() -> None:
    """LayerNorm with scale and shift before w2 is the one without, with other w2 and b2."""
    torch.manual_seed(0)
    dense = FeedForward(D, H, inner_norm=True).double()
    scale, shift = torch.rand(H).double() + 0.5, torch.randn(H).double()
    x = tokens(6)
    w1, b1, w2, b2 = dense.parameters()
    h = torch.nn.functional.gelu(x @ w1 + b1)
    expected = torch.nn.functional.layer_norm(h, (H,), scale, shift) @ w2 + b2
    with torch.no_grad():
        b2.add_(shift @ w2)
        dense.w2.mul_(scale[:, None])
    torch.testing.assert_close(dense(x), expected)


@pytest.mark.parametrize("k", [1, 2])
def test_a_token_does_not_depend_on_its_company(k: int) -> None:
    moe = layer(k=k).eval()
    x = tokens(4, 6)
    y = moe(x)[0]
    order = torch.randperm(24)
    torch.testing.assert_close(moe(x.view(24, D)[order])[0], y.view(24, D)[order])
    torch.testing.assert_close(torch.cat([moe(x[:1])[0], moe(x[1:])[0]]), y)
    wide = torch.cat([x, torch.full((4, 3, D), float("nan")).double()], dim=1)
    mask = torch.arange(9).expand(4, 9) < 6
    padded, stats = moe(wide, mask)
    torch.testing.assert_close(padded[:, :6], y)
    assert (padded[:, 6:] == 0).all()
    assert stats.tokens == 24
    assert stats.load_E.sum() == 24 * k
    torch.testing.assert_close(stats.loss, moe(x)[1].loss)


def test_padding_gets_and_gives_no_gradient() -> None:
    moe, x = layer(k=2), tokens(2, 6)
    mask = torch.arange(6).expand(2, 6) < 4
    with_padding = results(moe, torch.where(mask[..., None], x, float("inf")), mask)
    assert (with_padding["x"][:, 4:] == 0).all()
    assert all(torch.isfinite(v).all() for v in with_padding.values())


def test_dropped_tokens_come_out_as_zero_and_are_counted() -> None:
    moe = layer(4, capacity_factor_eval=0.5).eval()  # all 8 tokens choose expert 0, which takes one
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([1.0, 0, 0, 0]).double()[:, None].expand(4, D))
    y, stats = moe(tokens(8).abs())
    assert stats.load_E.tolist() == [8, 0, 0, 0]
    assert stats.dropped == 7
    assert stats.kept_NK.sum() == 1
    assert (y.abs().sum(-1) > 0).sum() == 1


def test_capacity_of_training_and_evaluation_are_apart() -> None:
    moe = layer(4, capacity_factor=0.5, sharp=0.0, noise=0.0)
    assert moe.train()(tokens(8))[1].dropped == 7
    assert moe.eval()(tokens(8))[1].dropped == 0


def test_noise_only_in_training() -> None:
    moe, x = layer(noise=1.0, load=0.1), tokens(16)
    first, again = moe(x)[1], moe(x)[1]
    assert not torch.equal(first.gate_NK, again.gate_NK)
    assert "load" in first.losses
    moe.eval()
    assert torch.equal(moe(x)[0], moe(x)[0])
    assert "load" not in moe(x)[1].losses
    quiet = layer(noise=0.0)
    assert torch.equal(quiet(x)[0], quiet(x)[0])


def test_stats() -> None:
    moe = layer(4, k=2, noise=0.0, balance=0.5, z=0.25, importance=2.0)
    x = tokens(3, 5)
    y, stats = moe(x)
    probs = (x.view(15, D) @ moe.router.weight.t()).softmax(-1)
    torch.testing.assert_close(stats.importance_E, probs.sum(0).detach())
    torch.testing.assert_close(stats.entropy, -(probs * probs.log()).sum(-1).mean().detach())
    assert stats.losses.keys() == {"balance", "importance", "z"}
    expected = 0.5 * stats.losses["balance"] + 2 * stats.losses["importance"] + 0.25 * stats.losses["z"]
    torch.testing.assert_close(stats.loss.detach(), expected)
    assert stats.loss.requires_grad
    fields = {n: v for n, v in vars(stats).items() if isinstance(v, Tensor) and n != "loss"}
    assert not any(v.requires_grad for v in [*fields.values(), *stats.losses.values()])
    assert torch.equal(stats.expert_index_NK, probs.topk(2).indices)
    assert torch.equal(torch.bincount(stats.expert_index_NK.flatten(), minlength=4), stats.load_E)
    assert (stats.tokens, stats.dropped) == (15, 0)
    assert stats.kept_NK.all()
    assert y.shape == x.shape


def test_nothing_to_do_still_trains() -> None:
    """A batch without a single real token gives zeros and gradients of zero, for any backend."""
    for backend in ("loop", "padded", "grouped"):
        moe = layer(backend=backend, importance=0.1, load=0.1)
        got = results(moe, tokens(2, 3), torch.zeros(2, 3, dtype=torch.bool))
        assert all((v == 0).all() for v in got.values())


def test_used_twice_accumulates() -> None:
    x, one, two = tokens(9), layer(noise=0.0), layer(noise=0.0)
    once = results(one, x, None)
    x = x.clone().requires_grad_()
    (y1, s1), (y2, s2) = two(x), two(x)
    (y1.sin().sum() + y2.sin().sum() + s1.loss + s2.loss).backward()
    for name, p in two.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])


def test_non_contiguous_input_and_gradient() -> None:
    x = tokens(6, 5)
    plain = results(layer(noise=0.0), x.transpose(0, 1).contiguous(), None)
    moe, base = layer(noise=0.0), x.clone().requires_grad_()
    y, stats = moe(base.transpose(0, 1))
    (y.transpose(0, 1).sin().sum() + stats.loss).backward()
    assert base.grad is not None
    torch.testing.assert_close(base.grad.transpose(0, 1), plain["x"])
    expanded = layer(noise=0.0)
    expanded(x)[0].sum().backward()  # the gradient of sum is one number expanded


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_autocast(backend: str) -> None:
    moe, x = layer(dtype=torch.float32, backend=backend, noise=0.0), tokens(32, dtype=torch.float32)
    full = results(moe, x, None)
    moe.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = moe(x)
    assert y.dtype == torch.bfloat16
    assert stats.loss.dtype == stats.gate_NK.dtype == torch.float32
    (y.float().sin().sum() + stats.loss).backward()
    torch.testing.assert_close(y.float(), full["y"], rtol=0.05, atol=0.05)
    for name, p in moe.named_parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert (p.grad - full[name]).norm() <= 0.03 * full[name].norm()


def disturb(moe: MoELayer, change: Callable[[Tensor], Tensor]) -> None:
    logits = moe.router.logits
    moe.router.logits = lambda x_ND: change(logits(x_ND))  # type: ignore[method-assign]


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 2, "capacity_factor": 0.7},
        {"router": "expert_choice", "k": 2},
        {"router": "sigmoid", "bias_rate": 0.1},
    ],
    ids=str,
)
def test_recomputation_replays_the_routing(backend: str, options: dict[str, Any]) -> None:
    """The second pass sees other logits, as other rounding would give; decisions and shapes stay those of the first."""
    moe, x = layer(4, backend=backend, noise=0.0, **options), tokens(20).requires_grad_()
    passes: list[tuple[Tensor, Tensor, Tensor]] = []
    disturbance = torch.randn(20, 4, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        y, stats = moe(x)
        passes.append((stats.expert_index_NK, stats.kept_NK, stats.gate_NK))
        return y.tanh()  # needed by backward, so that the recomputation runs to the end

    disturb(moe, lambda logits: logits + disturbance * len(passes))  # nothing in the first pass
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        out = checkpoint(run, x, use_reentrant=False, context_fn=replay_context_fn)
        out.sum().backward()
    (index, kept, gate), (index_again, kept_again, gate_again) = passes
    assert torch.equal(index, index_again)
    assert torch.equal(kept, kept_again)
    assert not torch.equal(gate, gate_again)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_recomputation_gives_the_same_gradients() -> None:
    x = tokens(20)
    for backend in ("loop", "padded", "grouped"):
        plain = results(layer(backend=backend, k=2, capacity_factor=0.9), x, None)
        moe, z = layer(backend=backend, k=2, capacity_factor=0.9), x.clone().requires_grad_()
        torch.manual_seed(7)
        y, stats = checkpoint(moe, z, None, use_reentrant=False, context_fn=replay_context_fn)
        (y.sin().sum() + stats.loss).backward()
        assert z.grad is not None
        got = {"y": y.detach(), "x": z.grad, **{n: p.grad for n, p in moe.named_parameters()}}
        assert_same(got, plain)


def test_without_replay_the_disturbance_would_show() -> None:
    """The test above can fail: the same disturbance changes choices when nothing is replayed."""
    moe, x = layer(4, noise=0.0), tokens(20)
    first = moe(x)[1].expert_index_NK
    disturb(moe, lambda logits: logits + torch.randn_like(logits))
    assert not torch.equal(first, moe(x)[1].expert_index_NK)


def test_compiles() -> None:
    """Graph breaks are allowed, other numbers are not."""
    moe, x = layer(k=2, noise=0.0), tokens(12)
    expected = results(moe, x, None)
    moe.zero_grad()
    x = x.clone().requires_grad_()
    y, stats = torch.compile(moe, backend="eager")(x)
    (y.sin().sum() + stats.loss).backward()
    torch.testing.assert_close(y.detach(), expected["y"])
    for name, p in moe.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_built_on_meta_and_materialised() -> None:
    with torch.device("meta"):
        moe = MoELayer(64, 96, 8)
    moe.to_empty(device="cpu")
    moe.reset_parameters()
    for name, p in moe.named_parameters():
        if name.split(".")[-1] in {"b1", "b2"}:
            assert (p == 0).all()
        else:
            assert 0.018 < p.std().item() < 0.022
    assert not torch.equal(moe.experts.w1[0], moe.experts.w1[1])


def test_frozen_experts_and_frozen_input() -> None:
    x = tokens(10)
    for backend in ("padded", "grouped"):
        moe = layer(backend=backend)
        moe.experts.requires_grad_(False)
        y, stats = moe(x)
        (y.sum() + stats.loss).backward()
        assert moe.router.weight.grad is not None
        assert all(p.grad is None for p in moe.experts.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts: expected at least 1, got 0"),
        ({"k": 5}, r"k: expected 1 to experts \(4\), got 5"),
        ({"k": 0}, "k: expected"),
        ({"width": 0}, "width: expected"),
        ({"activation": "tanh"}, "activation: expected one of gelu, relu, swiglu, got 'tanh'"),
        ({"priority": "random"}, "priority: expected one of batch, arrival, first_batch, first_arrival, got 'random'"),
        ({"backend": "fast"}, "backend: expected one of auto, loop, padded, grouped, got 'fast'"),
        ({"capacity_factor": 0.0}, "capacity_factor: expected a number above 0"),
        ({"capacity_factor_eval": float("nan")}, "capacity_factor_eval: expected a number above 0"),
        ({"noise": -1.0}, "noise: expected a number not below 0"),
        ({"balance": -0.1}, "balance: expected a number not below 0"),
        ({"load": 0.1, "noise": 0.0}, "load: .* noise above 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(**{"width": D, "hidden": H, "experts": 4, **options})


def test_bad_inputs() -> None:
    moe = MoELayer(D, H, 4)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 8\), got \(2, 7\)"):
        moe(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(2, 3\), got torch.bool of \(3, 2\)"):
        moe(torch.zeros(2, 3, D), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected bool"):
        moe(torch.zeros(2, 3, D), torch.ones(2, 3))
