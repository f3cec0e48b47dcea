"""A tiny run of ours with random weights, and a toy subject whose losses can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vlmoe.config import Recipe, load_recipe
from vlmoe.data.batch import Batch
from vlmoe.data.loader import held_out
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.interpret.sites import Choice, Site, TokenTable
from vlmoe.tasks.export import Pretrained
from vlmoe.tasks.pretrain import MaskedDataModelling

SIZES = [
    "model.width=32", "model.heads=2", "model.codes=64", "data.text_tokenizer.samples=300", "data.workers=0",
    *(f"model.{side}.{change}" for side in ("vision", "text")
      for change in ("experts=4", "granularity=1", "shared_experts=0", "router.k=2", "router.renormalize=true")),
]  # fmt: skip


def tiny_recipe(*changes: str) -> Recipe:
    """The recipe `characters`, shrunk: four experts in blocks 1 and 3; the last serves images and texts alone."""
    return load_recipe("characters", [*SIZES, "run.dir=unused", *changes])


_words: dict[str, TextTokenizer] = {}


def tiny(*changes: str) -> Pretrained:
    """Routers are made to prefer something, which random ones hardly do."""
    recipe = tiny_recipe(*changes)
    if "" not in _words:
        _words[""] = build_text_tokenizer(recipe)
    torch.manual_seed(0)
    m = recipe.model
    visual = VQTokenizer(m.image_size, m.patch, m.codes, 8, 16)
    model = MaskedDataModelling(m, visual).eval()
    with torch.no_grad():
        for layer in model.backbone.routed_layers().values():
            layer.router.weight.mul_(30)
    return Pretrained(model, _words[""], visual, recipe, Path("tiny"))


def batch_of(trained: Pretrained, kind: str = "pair", start: int = 0, n: int = 8) -> Batch:
    return held_out(trained.recipe, trained.text_tokenizer, "val", kind, start, n, factors=True)


# ------------------------------------------------------------------------------------------------------------------ toy
class ToyRouter(nn.Module):
    def forward(self, choice: Choice) -> Choice:
        return choice


@dataclass(eq=False)
class ToySite:
    """Chooses what the batch says."""

    name: str = "0"
    layer: int = 0
    modality: str = ""
    experts: int = 3
    k: int = 1
    router: ToyRouter = field(default_factory=ToyRouter)

    def watch(self, see: Callable[[Choice], None]) -> RemovableHandle:
        return self.router.register_forward_hook(lambda _, __, choice: see(choice))

    def change(self, rule: Callable[[Choice], Choice]) -> RemovableHandle:
        return self.router.register_forward_hook(lambda _, __, choice: replace(choice, **vars(rule(choice))))


class Toy:
    """One site for all tokens. A batch is {"samples": keys, "expert": (S, T), "right": (S, T), "factors": name -> (S,
    T)}; a token's loss is 1 less the gate of its right expert, nan where `right` is -1. The expert chosen has gate 1/2,
    and the others follow it in the order of their numbers."""

    def __init__(self, experts: int = 3) -> None:
        self.site = ToySite(experts=experts)
        self.model: nn.Module = self.site.router
        self.sites: list[Site] = [self.site]

    def tokens(self, batch: Any) -> TokenTable:
        S, T = np.shape(batch["expert"])
        factors = {name: np.array(v, dtype=object).reshape(-1) for name, v in batch.get("factors", {}).items()}
        return TokenTable(
            kind="text",
            samples=list(batch["samples"]),
            sample_R=np.repeat(np.arange(S), T),
            modality_R=np.full(S * T, "text"),
            position_R=np.tile(np.arange(T), S),
            valid_R=np.ones(S * T, dtype=bool),
            text_R=np.array([f"w{e}" for e in np.reshape(batch["expert"], -1)], dtype=object),
            factors=factors,
        )

    def run(self, batch: Any) -> Choice:
        first_N = torch.tensor(batch["expert"]).reshape(-1)
        E = self.site.experts
        probs_NE = torch.zeros(len(first_N), E)
        for step in range(E):
            probs_NE.scatter_(1, ((first_N + step) % E)[:, None], 0.5 ** (step + 1 - (step == E - 1)))
        expert_N1 = first_N[:, None]
        kept_N1 = torch.ones_like(expert_N1, dtype=torch.bool)
        return self.site.router(Choice(expert_N1, probs_NE.gather(1, expert_N1), kept_N1, probs_NE))

    def losses(self, batch: Any) -> np.ndarray:
        choice = self.run(batch)
        right_N = torch.tensor(batch["right"]).reshape(-1)
        hit_NK = choice.expert_NK == right_N[:, None]
        loss_N = 1 - (choice.gate_NK * hit_NK).sum(dim=1)
        return torch.where(right_N >= 0, loss_N, torch.nan).numpy()
