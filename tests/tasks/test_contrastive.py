"""The contrastive loss of retrieval compares in float32."""

import torch
import torch.nn.functional as F

from vlmoe.tasks.retrieval import contrastive_loss


def test_scores_are_float32s_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    first = F.normalize(torch.randn(1, 16, generator=generator), dim=-1)
    image, text = (F.normalize(first + 0.01 * torch.randn(32, 16, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(100.0)
    logits = scale * image @ text.T
    target = torch.arange(32)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    with torch.autocast("cpu", torch.bfloat16):
        loss, accuracy = contrastive_loss(image, text, scale)
    torch.testing.assert_close(loss, expected)
    right = (logits.argmax(1) == target).float().mean() + (logits.argmax(0) == target).float().mean()
    torch.testing.assert_close(accuracy, right / 2)
