"""The contrastive loss of retrieval compares in float32, with the pairs of all processes."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.train.launch import context
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


def part(rank: int, world: int, folder: str) -> None:
    """What one process of so many has of six pairs, in a file: gradient and loss, of all of them together."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
    weight = torch.eye(4, requires_grad=True)
    loss, _ = contrastive_loss(image[mine] @ weight, text[mine], torch.tensor(5.0))
    loss.backward()
    assert weight.grad is not None
    if world > 1:
        dist.all_reduce(weight.grad)
        dist.all_reduce(loss.data)
    torch.save((weight.grad / world, loss.detach() / world), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def test_it_is_the_same_over_two_processes(tmp_path: Path) -> None:
    for world in (1, 2):
        started = [context().Process(target=part, args=(rank, world, str(tmp_path))) for rank in range(world)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [0] * world
    (grad, loss), *others = [torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]
    for other_grad, other_loss in others:
        assert torch.allclose(grad, other_grad, atol=1e-6)
        assert torch.allclose(loss, other_loss, atol=1e-6)
