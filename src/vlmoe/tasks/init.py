"""From a pre-trained model to another: to a task's, whose positions may be fitted to another size, or to further
pre-training, where experts may start from dense layers.

Shape suffixes: D width · S patches along an edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmoe.config import UserError
from vlmoe.moe import FeedForward, MoELayer
from vlmoe.moe.upcycle import check_upcycle
from vlmoe.tasks.base import Task
from vlmoe.tasks.caption import Caption
from vlmoe.tasks.downstream import Downstream
from vlmoe.tasks.pretrain import MaskedDataModelling

IMAGE_POSITION, TEXT_POSITION = "backbone.image.position", "backbone.text.position"


@torch.no_grad()
def start_from(task: Downstream, pretrained: Task, fresh: Sequence[str] = ()) -> None:
    """Copy a pre-trained model's backbone into a task, and into a captioner the text head's bias.

    Positions of patches are interpolated to another image size; further text positions stay as they were drawn.
    fresh: beginnings of names in the backbone ("text.tokens", "blocks.3") whose content is not copied: they are drawn
    anew with the mean and standard deviation they have, for the rest is used to that size.

    Raises:
        UserError: another tensor has another shape, as after a change of width, patch or experts; it is named. Or a
            name in `fresh` fits nothing.
    """
    wanted = task.state_dict()
    skipped = {part: [n for n in wanted if n.startswith(f"backbone.{part}")] for part in fresh}
    for part, names in skipped.items():
        if not names:
            raise UserError(f"key 'train.fresh': the backbone has no {part!r}; it has {_parts(wanted)}")
    fresh_names = {name for names in skipped.values() for name in names}
    for name, tensor in pretrained.state_dict().items():
        ours = isinstance(task, Caption) and isinstance(pretrained, (MaskedDataModelling, Caption))
        if not name.startswith("backbone.") and not (ours and name == "text_bias"):
            continue
        if name in fresh_names and tensor.is_floating_point():
            tensor = torch.randn_like(tensor) * tensor.std(correction=0) + tensor.mean()
        if name == IMAGE_POSITION:
            tensor = interpolate_positions(tensor, wanted[name].shape[1])
        if name == TEXT_POSITION:
            tensor = torch.cat([tensor, wanted[name][:, tensor.shape[1] :]], dim=1)[:, : wanted[name].shape[1]]
        if name not in wanted or tensor.shape != wanted[name].shape:
            here = tuple(wanted[name].shape) if name in wanted else "no such tensor"
            raise UserError(
                f"cannot start from the pre-trained weights: {name} has the shape {tuple(tensor.shape)} there and "
                f"{here} here; of the model's sizes only image_size and max_text may change"
            )
        wanted[name].copy_(tensor)
    missing = [n for n in wanted if n.startswith("backbone.") and n not in pretrained.state_dict()]
    if missing:
        raise UserError(f"cannot start from the pre-trained weights: they have no {', '.join(missing[:3])}")


@torch.no_grad()
def continue_from(task: MaskedDataModelling, earlier: MaskedDataModelling) -> dict[str, tuple[MoELayer, FeedForward]]:
    """Copy an earlier pre-training's weights into a fresh model. Returns by name the layers that are sparse here and
    dense there: `vlmoe.tasks.upcycling` fills them.

    Raises:
        UserError: a tensor that only one of the two has, or that has another shape; it is named. Or a dense layer that
            cannot fill the experts.
    """
    layers, there = {}, dict(earlier.named_modules())
    for name, layer in task.named_modules():
        dense = there.get(name)
        if isinstance(layer, MoELayer) and isinstance(dense, FeedForward):
            try:
                check_upcycle(layer, dense)
            except ValueError as error:
                raise UserError(f"cannot start from the pre-trained weights: {name}: {error}") from None
            layers[name] = layer, dense
    left_out = tuple(f"{name}." for name in layers)
    ours, theirs = (
        {name: tensor for name, tensor in t.state_dict().items() if not name.startswith(left_out)}
        for t in (task, earlier)
    )
    for name in ours | theirs:
        now, then = (tuple(t[name].shape) if name in t else "no such tensor" for t in (ours, theirs))
        if now != then:
            raise UserError(f"cannot start from the pre-trained weights: {name}: {then} there, {now} here")
        ours[name].copy_(theirs[name])
    return layers


def _parts(names: Iterable[str]) -> str:
    """What a backbone is made of, two names deep."""
    inside = (name.split(".")[1:3] for name in names if name.startswith("backbone."))
    return ", ".join(dict.fromkeys(".".join(part) for part in inside))


def interpolate_positions(position: Tensor, tokens: int) -> Tensor:
    """(1, 1 + S*S, D) -> (1, tokens, D): the grid of patch positions resized bicubically, the class token's kept."""
    if position.shape[1] == tokens:
        return position
    old, new, D = math.isqrt(position.shape[1] - 1), math.isqrt(tokens - 1), position.shape[2]
    grid = position[:, 1:].reshape(1, old, old, D).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([position[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, D)], dim=1)
