"""Our own runs as a `Subject`: pre-trained ones with a loss for each hidden word and patch, fine-tuned ones with the
loss of each example.

Shape suffixes: R rows (all tokens of a batch) · B batch · P patches · T text tokens · N tokens of a router · K chosen
experts of a token · E experts · D width · M hidden positions · V vocabulary.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmoe.config import UserError
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.loader import Step
from vlmoe.interpret.coding import Coded, CodedTable, Combinations, names_of
from vlmoe.interpret.sites import Choice, Site, TokenTable
from vlmoe.model import BackboneOutput
from vlmoe.moe import MoELayer, Routing, RoutingStats, SoftMoELayer
from vlmoe.moe.routers import ExpertChoiceRouter, HashRouter
from vlmoe.tasks.caption import Caption
from vlmoe.tasks.downstream import Classifier, Downstream
from vlmoe.tasks.export import Finetuned, Pretrained
from vlmoe.tasks.pretrain import MaskedDataModelling

START, END = "<start>", "<end>"  # how these tokens are shown
SAID = ["", "shown", "hidden"]
MODALITIES = ["vision", "text"]
HIDDEN = "hidden"  # the factor that tells what the model was shown from what it must predict


class Handles(RemovableHandle):
    """Several handles as one."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        super().__init__(OrderedDict())
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(eq=False)
class OwnSite:
    """The router of one sparse layer.

    common: how many of its experts, the last ones, the other modality's router of this block may choose as well. gates:
    how a token's gates follow from its probabilities, for rules that choose other experts (see `causal.regate`).
    """

    name: str
    layer: int
    modality: str
    moe: MoELayer

    def __post_init__(self) -> None:
        router = self.moe.router
        self.experts, self.k, self.common = self.moe.num_experts, self.moe.k, self.moe.common
        self.gates = "equal" if isinstance(router, HashRouter) else "sum" if router.renormalize else "scale"

    def watch(self, see: Callable[[Choice], None]) -> RemovableHandle:
        """See `Site`. Experts, gates and what was kept are the layer's own report, so they are those of a `change`,
        where there is one; the probabilities are the router's."""
        seen: dict[str, Tensor] = {}

        def decide(_: nn.Module, __: Any, routing: Routing) -> None:
            seen["probs_NE"] = routing.probs_NE.detach()

        def done(_: nn.Module, __: Any, output: tuple[Tensor, RoutingStats]) -> None:
            stats = output[1]
            see(Choice(stats.expert_index_NK, stats.gate_NK, stats.kept_NK, seen.pop("probs_NE")))

        return Handles([self.moe.router.register_forward_hook(decide), self.moe.register_forward_hook(done)])

    def change(self, rule: Callable[[Choice], Choice]) -> RemovableHandle:
        """See `Site`. A choice of gate 0 is not computed and takes no capacity."""

        def swap(_: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing | None:
            kept_NK = routing.chosen_NK
            if kept_NK is None:
                kept_NK = torch.ones_like(routing.expert_index_NK, dtype=torch.bool)
            if len(args) > 1 and args[1] is not None:
                kept_NK = kept_NK & args[1][:, None]
            given = Choice(routing.expert_index_NK, routing.gate_NK.detach(), kept_NK, routing.probs_NE.detach())
            new = rule(given)
            if new is given:
                return None
            gate_NK = new.gate_NK.to(routing.gate_NK.dtype)
            return replace(routing, expert_index_NK=new.expert_NK, gate_NK=gate_NK, chosen_NK=gate_NK != 0)

        return self.moe.router.register_forward_hook(swap)


class OwnSubject:
    """A run as `vlmoe.load` returns it. notes: what cannot be shown of it, in words.

    A batch is a `Batch` of a pre-trained run; of a fine-tuned one what its task's loader gives, a `Step` or the
    dictionary of batches in it. A `Step` of examples adds their factors to all of their tokens.

    An image is its class token (position -1, no factors) and its patches. The factor "hidden" says "hidden" of what the
    model must predict and "shown" of the rest; `text_R` is the true word either way. A fine-tuned run has one loss for
    each example, which stands at the example's first token; of captions there is one for each hidden token.
    """

    def __init__(self, trained: Pretrained | Finetuned) -> None:
        self.trained = trained
        self.model: nn.Module = trained.model.eval()
        self.task = trained.model.task if isinstance(trained.model, Downstream) else "pretrain"
        self.sites: list[Site] = []
        self.notes: list[str] = []
        soft = []
        for name, layer in trained.model.backbone.routed_layers().items():
            if isinstance(layer, SoftMoELayer):
                soft.append(name)
                continue
            block, modality = name.split("/")
            self.sites.append(OwnSite(name, int(block), modality, layer))
            if isinstance(layer.router, ExpertChoiceRouter):
                self.notes.append(f"{name}: experts choose tokens here, so a token may have no expert, or several")
        if soft:
            self.notes.append(
                f"{', '.join(soft)}: soft routing mixes all tokens into every expert and chooses none: not shown"
            )
        self._words = _vocabulary(trained)
        self._combinations = Combinations()

    # ------------------------------------------------------------------------------------------------------- protocol
    def tokens(self, batch: Any) -> TokenTable:
        """The table of a batch. Raises UserError for what is no batch of this run."""
        known = {e.key: e.factors for e in batch.examples} if isinstance(batch, Step) else {}
        passes = self._passes(batch)
        several = len(passes) > 1
        parts = [self._table(b, f"/{name}" if several else "", known) for name, b in passes.items()]
        if not several:
            return parts[0]
        start, kinds = 0, {p.kind for p in parts}
        for part in parts:
            part.sample_R = part.sample_R + start
            start += len(part.samples)
        names = list(dict.fromkeys(name for p in parts for name in p.factors))

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(p, name) for p in parts])

        return TokenTable(
            kinds.pop() if len(kinds) == 1 else "pair",
            [key for p in parts for key in p.samples],
            joined("sample_R"), joined("modality_R"), joined("position_R"), joined("valid_R"), joined("text_R"),
            {n: np.concatenate([p.factors.get(n, _blank(p)) for p in parts]) for n in names},
        )  # fmt: skip

    @torch.no_grad()
    def run(self, batch: Any) -> list[BackboneOutput]:
        """What the backbone did, one output for each pass."""
        return self._forward(self._passes(batch))[1]

    @torch.no_grad()
    def losses(self, batch: Any) -> np.ndarray:
        """See `Subject`. Raises UserError for retrieval, whose loss belongs to a batch and not to an example."""
        passes = self._passes(batch)
        logits_BL, outputs = self._forward(passes)
        if not isinstance(self.model, Classifier):
            if self.task == "retrieval":
                raise UserError("retrieval has no loss of single examples: measure its score (`causal.task_score`)")
            return np.concatenate([self._hidden_losses(b, o) for b, o in zip(passes.values(), outputs, strict=True)])
        assert logits_BL is not None
        rows = [np.full(o.x_BTD.shape[:2], np.nan, np.float32) for o in outputs]
        label = next((b.label_B for b in passes.values() if b.label_B is not None), None)
        for b in range(0 if label is None else len(logits_BL)):
            if label is not None and (label.ndim > 1 or label[b] >= 0):
                rows[0][b, 0] = float(self.model.loss(logits_BL[b : b + 1].float(), label[b : b + 1]))
        return np.concatenate([r.reshape(-1) for r in rows])

    def pictures(self, batch: Any) -> list[np.ndarray | None]:
        """The image of each sample, uint8 (H, W, 3), for a report."""
        found: list[np.ndarray | None] = []
        for part in self._passes(batch).values():
            image = part.image_BCHW
            found += [None] * len(part) if image is None else list(image.permute(0, 2, 3, 1).cpu().numpy())
        return found

    # ---------------------------------------------------------------------------------------------------------- inside
    def _passes(self, batch: Any) -> dict[str, Batch]:
        """The batches that go through the backbone one after the other, on the model's device."""
        found = batch.batches if isinstance(batch, Step) else batch
        if isinstance(found, Batch):
            found = {"": found}
        if not isinstance(found, dict) or not found or not all(isinstance(b, Batch) for b in found.values()):
            raise UserError(f"expected a Batch, or a Step or dictionary of them, got {type(batch).__name__}")
        if isinstance(self.model, MaskedDataModelling) and len(found) > 1:
            raise UserError(f"a pre-trained run takes one kind of batch at a time, got {', '.join(found)}")
        if isinstance(self.model, Classifier) and "" in found:
            found = {"pair": found[""]}
        device = next(self.model.parameters()).device
        return {name: b.to(device) for name, b in found.items()}

    def _forward(self, passes: dict[str, Batch]) -> tuple[Tensor | None, list[BackboneOutput]]:
        """A classifier's logits, and what the backbone did."""
        if isinstance(self.model, Classifier):
            return self.model.logits(passes)
        model = self.model
        assert isinstance(model, (MaskedDataModelling, Downstream))
        if isinstance(model, Caption):
            return None, [model.run(b, "text" if b.text_BT is not None else None) for b in passes.values()]
        return None, [model.run(b) for b in passes.values()]

    def _hidden_losses(self, batch: Batch, output: BackboneOutput) -> np.ndarray:
        """(R,) of one pass: cross-entropy of hidden words and of hidden patches' codes."""
        model = self.model
        assert isinstance(model, (MaskedDataModelling, Caption))
        parts = []
        if batch.image_BCHW is not None:
            x_BPD = output.features("vision")
            loss_BP = x_BPD.new_full(x_BPD.shape[:2], torch.nan, dtype=torch.float32)
            if batch.patch_mask_BP is not None and isinstance(model, MaskedDataModelling) and model.visual_tokenizer:
                hidden_BP = batch.patch_mask_BP
                logits_MV = model.image_head(x_BPD[:, 1:][hidden_BP]).float()
                target_M = model.visual_tokenizer.encode(batch)[hidden_BP]
                loss_BP[:, 1:][hidden_BP] = F.cross_entropy(logits_MV, target_M, reduction="none")
            parts.append(loss_BP)
        if batch.text_BT is not None:
            x_BTD = output.features("text")
            loss_BT = x_BTD.new_full(x_BTD.shape[:2], torch.nan, dtype=torch.float32)
            if batch.target_BT is not None:
                hidden_BT = batch.target_BT != IGNORE
                logits_MV = model.text_logits(x_BTD[hidden_BT]).float()
                loss_BT[hidden_BT] = F.cross_entropy(logits_MV, batch.target_BT[hidden_BT], reduction="none")
            parts.append(loss_BT)
        return torch.cat(parts, dim=1).flatten().cpu().numpy()

    def _table(self, batch: Batch, suffix: str, known: dict[str, dict[str, str]]) -> CodedTable:
        """The tokens of one pass. suffix: of the samples' keys. known: key -> factors of the whole example."""
        B = len(batch)
        P = 0 if batch.image_BCHW is None else (batch.image_BCHW.shape[2] // self.trained.recipe.model.patch) ** 2
        T = 0 if batch.text_BT is None else batch.text_BT.shape[1]
        V = P + 1 if batch.image_BCHW is not None else 0
        valid_BR = np.ones((B, V + T), dtype=bool)
        word_BR = np.full((B, V + T), len(self._words) - 1)  # the last word is ""
        hidden_BR = np.zeros((B, V + T), dtype=np.int32)
        if batch.text_BT is not None:
            ids_BT = batch.text_BT.cpu().numpy()
            if batch.valid_BT is not None:
                valid_BR[:, V:] = batch.valid_BT.cpu().numpy()
            if batch.target_BT is not None:
                target_BT = batch.target_BT.cpu().numpy()
                hidden_BR[:, V:] = 1 + (target_BT != IGNORE)
                ids_BT = np.where(target_BT != IGNORE, target_BT, ids_BT)
            word_BR[:, V:] = ids_BT
        if batch.patch_mask_BP is not None and V:
            hidden_BR[:, 1:V] = 1 + batch.patch_mask_BP.cpu().numpy()
        factors = self._factors(batch, V, T)
        if hidden_BR.any():
            factors[HIDDEN] = Coded(hidden_BR.reshape(-1), SAID)
        if self.task != "pretrain":
            factors["task"] = Coded(np.zeros(B * (V + T), np.int32), [self.task])
        for name in names_of([*known.values()]):
            values, code_B = np.unique([known.get(key, {}).get(name, "") for key in batch.keys], return_inverse=True)
            factors[name] = Coded(np.repeat(code_B, V + T).astype(np.int32), values.tolist())
        row = np.repeat(np.array([0, 1], dtype=np.int32), [V, T])
        return CodedTable(
            kind="pair" if V and T else "image" if V else "text",
            samples=_unique([key + suffix for key in batch.keys]),
            sample_R=np.repeat(np.arange(B), V + T),
            position_R=np.tile(np.concatenate([np.arange(-1, P) if V else np.arange(0), np.arange(T)]), B),
            valid_R=valid_BR.reshape(-1),
            modality=Coded(np.tile(row, B), MODALITIES),
            text=Coded(word_BR.reshape(-1), self._words),
            factors=factors,
        )

    def _factors(self, batch: Batch, V: int, T: int) -> dict[str, Coded]:
        """What the data knows of each token, "" where nothing; the class token comes first in an image's V."""
        patch, token, seen = batch.patch_factors, batch.token_factors, self._combinations
        seen.tidy()
        number_BR = np.zeros((len(batch), V + T), np.int32)
        if patch and V:
            number_BR[:, 1:V] = seen.numbers(patch, V - 1)
        if token and T:
            number_BR[:, V:] = seen.numbers(token, T)
        return seen.columns(number_BR.reshape(-1), names_of([*patch, *token]))


def _vocabulary(trained: Pretrained | Finetuned) -> list[str]:
    """Each id in words, and "" after the last."""
    tokenizer = trained.text_tokenizer
    words = [tokenizer.decode([i]) if i < tokenizer.size else "" for i in range(trained.recipe.model.vocabulary)]
    words[tokenizer.start_id], words[tokenizer.end_id] = START, END
    return [*words, ""]


def _blank(table: TokenTable) -> np.ndarray:
    return np.full(len(table.sample_R), "", dtype=object)


def _unique(keys: list[str]) -> list[str]:
    """Keys as they are, from the second of the same on with its number (an image's captions share its key)."""
    if len(set(keys)) == len(keys):
        return keys
    seen: Counter[str] = Counter()
    named = []
    for key in keys:
        seen[key] += 1
        named.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return named
