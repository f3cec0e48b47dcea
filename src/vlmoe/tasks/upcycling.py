"""A sparse model's experts filled from a dense model's layers, and how far the two models then are from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe.config import UserError
from vlmoe.data.batch import Batch
from vlmoe.model.block import Branch
from vlmoe.moe import FeedForward, MoELayer, upcycle
from vlmoe.moe.upcycle import EXACT, Passes, difference
from vlmoe.tasks.pretrain import MaskedDataModelling


@dataclass
class Upcycled:
    """How far the sparse model is from the dense one before its first step, on the batches it was filled with: the norm
    of the difference over that of the dense one's, over real tokens. output: of the backbones' features, in evaluation.
    layers, layers_in_training: of each filled layer by name, given the dense model's tokens, in evaluation and in
    training, where the router has noise and experts their capacity of training.
    """

    output: float
    layers: dict[str, float]
    layers_in_training: dict[str, float]

    def __str__(self) -> str:
        mode = f"{max(self.layers.values()):.2g} at most in a layer, {max(self.layers_in_training.values()):.2g} with"
        return f"output {self.output:.2g} from the dense model's; {mode} the noise and capacity of training"


@torch.no_grad()
def fill_experts(
    task: MaskedDataModelling,
    earlier: MaskedDataModelling,
    layers: dict[str, tuple[MoELayer, FeedForward]],
    batches: dict[str, Batch],
    allow_inexact: bool = False,
) -> Upcycled:
    """Fill the sparse layers that `continue_from` returned, by `vlmoe.moe.upcycle` with the tokens that the dense
    model's layers see in `batches`.

    Raises:
        UserError: the sparse model would not compute what the dense one does, without `allow_inexact`.
    """
    training = task.training, earlier.training
    task.eval(), earlier.eval()
    seen, wanted = _run(earlier, batches)
    found = Upcycled(0.0, {}, {})
    for name, (layer, dense) in layers.items():
        inputs = seen.get(name.removesuffix(".layer"), [])
        try:
            found.layers[name] = upcycle(layer, dense, inputs, allow_inexact=allow_inexact)
        except ValueError as error:
            raise _refusal(f"{name}: {error}") from None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.layers_in_training[name] = difference(layer, dense, inputs, training=True)
    got = _run(task, batches)[1]
    apart = sum((a - b).double().square().sum().item() for a, b in zip(got, wanted, strict=True))
    found.output = (apart / sum(b.double().square().sum().item() for b in wanted)) ** 0.5
    if not found.output <= EXACT and not allow_inexact:
        raise _refusal(f"the sparse model's output would differ from the dense one's by {found.output:.2g} of its size")
    task.train(training[0]), earlier.train(training[1])
    return found


def _refusal(reason: str) -> UserError:
    return UserError(
        f"cannot start from the pre-trained weights: {reason}. init_allow_inexact=true starts all the same"
    )


def _run(task: MaskedDataModelling, batches: dict[str, Batch]) -> tuple[dict[str, Passes], list[Tensor]]:
    """What each branch's layer is given, pass by pass, by the branch's name; and the features at real positions."""
    seen: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    hooks = []
    for name, module in task.named_modules():
        if isinstance(module, Branch):

            def keep(branch: Branch, args: tuple[Tensor, Tensor | None], name: str = name) -> None:
                seen.setdefault(name, []).append((branch.norm(args[0]), args[1]))

            hooks.append(module.register_forward_pre_hook(keep))
    features = []
    for batch in batches.values():
        output = task.run(batch)
        real = output.x_BTD if output.valid_BT is None else output.x_BTD[output.valid_BT]
        features.append(real)
    for hook in hooks:
        hook.remove()
    return dict(seen), features
