"""Masked data modelling: predict hidden text tokens and the visual codes of hidden patches.

One objective over three kinds of batches: texts (MLM), images (MIM), pairs (both, each helped by the other modality).
Source: BEiT-3 (Wang et al. 2022), VL-MoE (Shen et al. 2023).

Shape suffixes: B batch · P patches · T text tokens · D width · M hidden positions · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.config import ModelConfig
from vlmoe.data.batch import Batch
from vlmoe.data.visual_tokenizer import VisualTokenizer
from vlmoe.model import Backbone, BackboneOutput
from vlmoe.moe import RoutingStats
from vlmoe.moe.balance import balance_of
from vlmoe.tasks.base import ROUTING, Span, StepOutput, Summed, Task


class MaskedDataModelling(Task):
    """Backbone with two heads: the text head shares the token embedding's matrix, the image head is linear.

    The visual tokenizer gives the targets of masked patches; it is frozen and no part of the module's state. A model
    that only reads text needs none.
    """

    def __init__(self, config: ModelConfig, visual_tokenizer: VisualTokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.text_bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.image_head = nn.Linear(config.width, config.codes)
        nn.init.trunc_normal_(self.image_head.weight, std=0.02)
        nn.init.zeros_(self.image_head.bias)
        self._visual_tokenizer = (visual_tokenizer,)  # in a tuple, so that it does not register as a submodule

    @property
    def visual_tokenizer(self) -> VisualTokenizer | None:
        return self._visual_tokenizer[0]

    def use(self, visual_tokenizer: VisualTokenizer | None) -> None:
        """Take targets from another visual tokenizer, or have none."""
        self._visual_tokenizer = (visual_tokenizer,)

    def prepare(self, device: torch.device) -> None:
        if isinstance(self.visual_tokenizer, nn.Module):
            self.visual_tokenizer.to(device)

    def run(self, batch: Batch, *, hide_patches: bool = True) -> BackboneOutput:
        """The backbone over whatever the batch holds; `hide_patches=False` shows the whole image."""
        parts = []
        if batch.image_BCHW is not None:
            parts.append(self.backbone.image(batch.image_BCHW, batch.patch_mask_BP if hide_patches else None))
        if batch.text_BT is not None:
            parts.append(self.backbone.text(batch.text_BT, batch.valid_BT))
        return self.backbone(parts)

    def text_logits(self, x_MD: Tensor) -> Tensor:
        """(..., D) features of text positions -> (..., V) logits."""
        return F.linear(x_MD, self.backbone.text.tokens.weight, self.text_bias)

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        losses: dict[str, Summed] = {}
        scores: dict[str, Tensor] = {}
        routed: list[tuple[str, RoutingStats]] = []
        for kind, batch in batches.items():
            output = self.run(batch)
            routed += output.stats.items()
            for objective, (logits_MV, target_M) in self._heads(batch, output).items():
                name = f"{kind}/{objective}"
                losses[name] = _cross_entropy(logits_MV, target_M)
                if self.measuring:
                    scores[f"{name}_accuracy"] = (logits_MV.detach().argmax(dim=-1) == target_M).float().mean()
        routing = summarise_routing(routed, self.measuring)
        means = {name: loss.mean.detach() for name, loss in losses.items()} if self.measuring else {}
        metrics = means | scores | routing.metrics
        return StepOutput(pool(losses) | routing.losses, metrics, routing.load, routing.layers, routing.spans)

    def predictions(self, batches: dict[str, Batch]) -> dict[str, int]:
        counts = {"mlm": 0, "mim": 0}
        for batch in batches.values():
            if batch.target_BT is not None:
                counts["mlm"] += len(batch.hidden_tokens())
            if batch.patch_mask_BP is not None:
                counts["mim"] += len(batch.hidden_patches())
        return counts | self.routed_tokens(batches)

    @torch.no_grad()
    def choices(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        return first_choices(item for batch in batches.values() for item in self.run(batch).stats.items())

    def losses(self, batch: Batch) -> dict[str, Summed]:
        """ "mlm", "mim" -> loss of one batch, where it has predictions of that sort."""
        return {name: _cross_entropy(*found) for name, found in self._heads(batch, self.run(batch)).items()}

    def losses_by_sample(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """ "mlm", "mim" -> of each sample (B,) the summed loss and the number of its predictions."""
        found = {}
        for name, (logits_MV, target_M) in self._heads(batch, self.run(batch)).items():
            hidden_M = batch.hidden_tokens() if name == "mlm" else batch.hidden_patches()
            places = batch.target_BT if name == "mlm" else batch.patch_mask_BP
            assert places is not None
            sample_M = hidden_M // places.shape[1]
            loss_M = F.cross_entropy(logits_MV.float(), target_M, reduction="none")
            total_B = loss_M.new_zeros(len(batch)).index_add(0, sample_M, loss_M)
            found[name] = total_B, torch.bincount(sample_M, minlength=len(batch))
        return found

    def tokens(self, batches: dict[str, Batch]) -> int:
        total = 0
        for batch in batches.values():
            if batch.patch_mask_BP is not None:
                total += batch.patch_mask_BP.numel() + len(batch)
            if batch.valid_BT is not None:
                total += int(batch.valid_BT.sum())
        return total

    def _heads(self, batch: Batch, output: BackboneOutput) -> dict[str, tuple[Tensor, Tensor]]:
        """ "mim", "mlm" -> logits and targets of the hidden patches and tokens."""
        found = {}
        if hides_patches(batch):
            found["mim"] = self._mim(batch, output)
        if batch.text_BT is not None:
            found["mlm"] = self._mlm(batch, output)
        return found

    def _mim(self, batch: Batch, output: BackboneOutput) -> tuple[Tensor, Tensor]:
        if self.visual_tokenizer is None:
            raise ValueError("masked image modelling needs a visual tokenizer; this model was built without one")
        hidden_M = batch.hidden_patches()
        target_M = self.visual_tokenizer.targets(batch)
        x_MD = output.features("vision")[:, 1:].flatten(0, 1).index_select(0, hidden_M)  # the class token has no code
        return self.image_head(x_MD), target_M

    def _mlm(self, batch: Batch, output: BackboneOutput) -> tuple[Tensor, Tensor]:
        assert batch.target_BT is not None
        hidden_M = batch.hidden_tokens()
        x_MD = output.features("text").flatten(0, 1).index_select(0, hidden_M)
        return self.text_logits(x_MD), batch.target_BT.flatten().index_select(0, hidden_M)


def hides_patches(batch: Batch) -> bool:
    """Whether there are patches to predict: there are none in texts, nor where `data.masking.pair_patches` is 0."""
    return batch.patch_mask_BP is not None and len(batch.hidden_patches()) > 0


def pool(losses: dict[str, Summed]) -> dict[str, Summed]:
    """ "mlm", "mim" -> over all hidden text tokens, or patches, whatever kind of batch they are in.

    losses: "kind/objective" -> loss. Adding the kinds' means instead would give four texts the weight of thirty-two
    pairs, and their noise most of the gradient.
    """
    found: dict[str, Summed] = {}
    for name, loss in losses.items():
        objective = name.rpartition("/")[2]
        before = found.get(objective)
        found[objective] = loss if before is None else Summed(before.total + loss.total, before.count + loss.count)
    return found


def _cross_entropy(logits_MV: Tensor, target_M: Tensor) -> Summed:
    """In float32."""
    return Summed(F.cross_entropy(logits_MV.float(), target_M, reduction="sum"), len(target_M))


@dataclass
class RoutingSummary:
    """losses: of routing, "routing/block/modality" -> weighted by tokens. metrics: averaged over the layers
    of a modality ("vision/balance", "text/max_load", ...). load, layers, spans: see `StepOutput`."""

    losses: dict[str, Summed]
    metrics: dict[str, Tensor]
    load: dict[str, Tensor]
    layers: dict[str, dict[str, Tensor]]
    spans: dict[str, Span]


def summarise_routing(routed: Iterable[tuple[str, RoutingStats]], measuring: bool = True) -> RoutingSummary:
    """Join the routing of several passes through the same layers.

    routed: ("block/modality", stats) once for each pass. measuring: with metrics and layers. A layer's loss is the
    token-weighted mean over its passes, so that each token counts once; layers are summed.
    """
    passes: dict[str, list[RoutingStats]] = {}
    for name, stats in routed:
        passes.setdefault(name, []).append(stats)
    found = RoutingSummary({}, {}, {}, {}, {})
    by_modality: dict[str, list[Tensor]] = {}
    for name, layer in passes.items():
        modality = name.rsplit("/", 1)[1]
        tokens = torch.stack([s.tokens for s in layer])
        total = (torch.stack([s.loss for s in layer]) * tokens).sum()
        found.losses[f"{ROUTING}/{name}"] = Summed(total, tokens.sum())
        found.load[name] = load_E = torch.stack([s.load_E for s in layer]).sum(dim=0).detach()
        sums = [s.balance for s in layer if s.balance is not None]
        if sums:
            probability_E = torch.stack([s.probability_E for s in sums]).sum(dim=0)
            found.spans[name] = Span(load_E, probability_E, tokens.sum(), sums[0].weight, sums[0].scope)
        if not measuring:
            continue
        share = tokens.float() / tokens.sum().clamp_min(1)
        values = {key: (torch.stack([s.losses[key] for s in layer]) * share).sum() for key in layer[0].losses}
        values["entropy"] = (torch.stack([s.entropy for s in layer]) * share).sum()
        values["max_load"] = load_E.max() / load_E.float().mean().clamp_min(1e-9)  # 1 is even
        values["idle"] = (load_E == 0).float().mean()
        values["dropped"] = torch.stack([s.dropped for s in layer]).sum() / load_E.sum().clamp_min(1)
        values["unserved"] = torch.stack([s.unserved for s in layer]).sum() / tokens.sum().clamp_min(1)
        values["logits"] = (torch.stack([s.logit_size for s in layer]) * share).sum()
        found.layers[name] = {key: value.detach() for key, value in values.items()}
        for key, value in found.layers[name].items():
            by_modality.setdefault(f"{modality}/{key}", []).append(value)
    found.metrics = {key: torch.stack(list(v)).float().mean() for key, v in by_modality.items()}
    return found


def first_choices(routed: Iterable[tuple[str, RoutingStats]]) -> dict[str, Tensor]:
    """Each layer's first choice for every token of all passes, padding left out as -1."""
    chosen: dict[str, list[Tensor]] = {}
    for name, stats in routed:
        first_N = stats.expert_index_NK[:, 0].masked_fill(~stats.kept_NK.any(dim=1), -1)
        chosen.setdefault(name, []).append(first_N)
    return {name: torch.cat(parts) for name, parts in chosen.items()}


def balance_beyond_passes(
    spans: dict[str, Span], before: dict[str, Tensor], all_reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor | float:
    """The weighted balance losses that span a micro-batch or more, for one micro-batch.

    before: choices of the step's earlier micro-batches, for spans of scope "step" and "global". The share of choices is
    that of all of them, the probabilities are this micro-batch's (Qiu et al. 2025, global-batch balance). all_reduce:
    sums over devices, for scope "global"; None: there is one.
    """
    total: Tensor | float = 0.0
    for name, span in spans.items():
        load_E = span.load_E
        if span.scope != "micro" and name in before:
            load_E = load_E + before[name]
        if span.scope == "global" and all_reduce is not None:
            load_E = all_reduce(load_E)
        total = total + span.weight * balance_of(load_E, span.probability_E, span.tokens)
    return total
