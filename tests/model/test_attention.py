"""Attention by plain products is torch's own attention."""

import pytest
import torch
import torch.nn.functional as F

from vlmoe.model.attention import SHORT, SelfAttention, _by_products
from vlmoe.model.segments import Segment, causal_mask

B, H, T, A = 3, 2, 7, 4
SEGMENTS = (Segment("vision", slice(0, 3)), Segment("text", slice(3, T), padded=True))
VALID = torch.arange(T) < torch.tensor([[7], [5], [4]])
MASKS = {
    "all": None,
    "padding": VALID[:, None, None, :],
    "causal": causal_mask(SEGMENTS, "text", torch.device("cpu")),
    "both": VALID[:, None, None, :] & causal_mask(SEGMENTS, "text", torch.device("cpu")),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_products_are_the_kernel(mask: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    qkv = (3 * torch.randn(3, B, H, T, A, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(B, H, T, A, dtype=torch.float64)
    found = []
    q, k, v = qkv
    for y in (_by_products(qkv, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)):
        y.backward(grad)
        assert qkv.grad is not None
        found.append((y.detach(), qkv.grad.clone()))
        qkv.grad = None
    torch.testing.assert_close(found[0], found[1])


def test_a_row_that_may_look_at_nothing_is_finite() -> None:
    qkv = torch.randn(3, B, H, T, A, requires_grad=True)
    y = _by_products(qkv, torch.zeros(B, 1, 1, T, dtype=torch.bool))
    y.sum().backward()
    assert qkv.grad is not None
    assert y.isfinite().all()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("length", [SHORT, SHORT + 1])
def test_either_side_of_the_limit_agrees(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 2, modalities=("text",))
    x, segments = torch.randn(2, length, 16), (Segment("text", slice(0, length)),)
    chosen = attention(x, None, segments)
    for limit in (0, length):
        monkeypatch.setattr("vlmoe.model.attention.SHORT", limit)
        torch.testing.assert_close(attention(x, None, segments), chosen)
