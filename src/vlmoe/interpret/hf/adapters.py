"""Where the sparse models of transformers route: one `Adapter` for each type of model, and the sites it finds.

Nearly all of them have one form: a block holds a router, called `gate` or `router`, and `experts`, a module that is
called with (hidden states, chosen experts, their gates). What the experts are called with is what the model really
uses, wherever it was computed, so a site reads and changes it there; the router is asked for its logits only.

Shape suffixes: N tokens a site decides for · K chosen experts of a token · E experts · R rows (all tokens of a batch).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmoe.config import UserError
from vlmoe.interpret.sites import Choice

DOCS = "docs/adapters.md"
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_NE: logits_NE.float().softmax(dim=-1),
    "sigmoid": lambda logits_NE: logits_NE.float().sigmoid(),
    "none": lambda logits_NE: logits_NE.float(),
}
GATES = ("sum", "scale")


@dataclass
class Pass:
    """What is known of the forward pass that is under way. valid_R: False at padding. vision_R: tokens of an image."""

    valid_R: Tensor | None = None
    vision_R: Tensor | None = None


class BlockSite:
    """The router of one sparse block (see `vlmoe.interpret.sites.Site`). For blocks of another form, a subclass says in
    `attach` where logits, experts and gates are read and put back, and in `note` what readers should know of them."""

    note = ""

    def __init__(
        self, name: str, layer: int, modality: str, router: nn.Module, experts: nn.Module, adapter: Adapter, now: Pass
    ) -> None:
        self.name, self.layer, self.modality = name, layer, modality
        self.router, self.block_experts, self.adapter, self._now = router, experts, adapter, now
        self.experts, self.k = 0, 0  # set by `find_sites`
        normed = getattr(router, "norm_topk_prob", None)
        self.gates = adapter.gates if normed is None else "sum" if normed else "scale"
        self._rules: OrderedDict[int, Callable[[Choice], Choice]] = OrderedDict()
        self._watchers: OrderedDict[int, Callable[[Choice], None]] = OrderedDict()
        self._attached: list[RemovableHandle] = []

    def watch(self, see: Callable[[Choice], None]) -> RemovableHandle:
        """Call `see` with each decision, as changed by the rules, until the handle is removed."""
        return self._add(self._watchers, see)

    def change(self, rule: Callable[[Choice], Choice]) -> RemovableHandle:
        """Put `rule`'s experts and gates in the place of the router's own, until the handle is removed. Of several
        rules each gets what the one before it made."""
        return self._add(self._rules, rule)

    def attach(self) -> list[RemovableHandle]:
        """Hooks that call `decide` in each forward pass, and give the model what it returns."""
        logits: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            logits[:] = [output[0] if isinstance(output, tuple) else output]

        def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if len(args) < 3 or not logits:
                raise UserError(
                    f"site {self.name}: expected the router first, then experts called with (hidden states, chosen "
                    f"experts, gates), got {len(args)} arguments; its adapter does not fit, see {DOCS}"
                )
            changed = self.decide(logits.pop(), args[1], args[2])
            return None if changed is None else (args[0], *changed, *args[3:])

        return [self.router.register_forward_hook(keep), self.block_experts.register_forward_pre_hook(choose)]

    def decide(self, logits: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> tuple[Tensor, Tensor] | None:
        """Experts and gates after the rules, for the model to use; None where there is no rule. Tells the watchers."""
        probs_NE = SCORES[self.adapter.score](logits.reshape(len(expert_NK), -1))
        probs_NE = probs_NE / probs_NE.sum(dim=1, keepdim=True)
        # some routers give their choice in no order
        order_NK = gate_NK.argsort(dim=1, descending=True, stable=True)
        best_NK = expert_NK.gather(1, order_NK).long()
        choice = Choice(best_NK, gate_NK.gather(1, order_NK), self._kept(expert_NK), probs_NE)
        for rule in list(self._rules.values()):
            new = rule(choice)
            choice = replace(choice, expert_NK=new.expert_NK, gate_NK=new.gate_NK, kept_NK=self._kept(new.expert_NK))
        for see in list(self._watchers.values()):
            see(choice)
        if not self._rules:
            return None
        expert, gate = choice.expert_NK.to(expert_NK.dtype), choice.gate_NK.to(gate_NK.dtype)
        if expert.shape != expert_NK.shape:
            return expert, gate
        back_NK = order_NK.argsort(dim=1)  # as the router had them, so that sums are added in the same order
        return expert.gather(1, back_NK), gate.gather(1, back_NK)

    def _kept(self, expert_NK: Tensor) -> Tensor:
        now, rows = self._now, len(expert_NK)
        valid = now.valid_R
        if valid is not None and self.modality and now.vision_R is not None:
            valid = valid[now.vision_R == (self.modality == "vision")]
        if valid is None or len(valid) != rows:  # the model was called by someone else: nothing is known
            valid = torch.ones(rows, dtype=torch.bool)
        return valid.to(expert_NK.device)[:, None].expand(expert_NK.shape)

    def _add(self, table: OrderedDict[int, Any], function: Callable[..., Any]) -> RemovableHandle:
        handle = _Handle(table, self)
        table[handle.id] = function
        if not self._attached:
            self._attached = self.attach()
        return handle

    def settle(self) -> None:
        """Leave the model as it was, once nobody watches or changes."""
        if not self._rules and not self._watchers:
            for hook in self._attached:
                hook.remove()
            self._attached = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, experts={self.experts}, k={self.k})"


class _Handle(RemovableHandle):
    def __init__(self, table: OrderedDict[int, Any], site: BlockSite) -> None:
        super().__init__(table)
        self.site = site

    def remove(self) -> None:
        super().remove()
        self.site.settle()


class Llama4Site(BlockSite):
    """Llama 4's experts all see all tokens, scaled by scores that are 0 for experts that were not chosen: the score is
    the gate, and lies on an expert's input instead of its output."""

    note = "gates scale what an expert gets, not what it gives: two experts' gates do not compare as shares"

    def attach(self) -> list[RemovableHandle]:
        def choose(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
            score_NE, logits_NE = output
            expert_NK = logits_NE.topk(self.k, dim=1).indices
            changed = self.decide(logits_NE, expert_NK, score_NE.gather(1, expert_NK))
            return None if changed is None else (torch.zeros_like(score_NE).scatter_add(1, *changed), logits_NE)

        return [self.router.register_forward_hook(choose)]


class Gemma4Site(BlockSite):
    """Gemma 4 multiplies each gate by a learned scale of its expert."""

    note = "gates hold a learned scale of each expert: they do not sum to 1"

    def regate(self, choice: Choice, expert_NK: Tensor) -> Tensor:
        """The gates that the router would have given these experts (see `vlmoe.interpret.rules.regate`)."""
        probs_NK = choice.probs_NE.gather(1, expert_NK)
        scale_E: Any = self.router.per_expert_scale
        return (probs_NK / probs_NK.sum(dim=1, keepdim=True) * scale_E[expert_NK]).to(choice.gate_NK.dtype)


@dataclass(frozen=True)
class Adapter:
    """How to find and read the routers of one type of model.

    score: what makes a distribution of the logits that a router returns (alone or first): "softmax", "sigmoid", or
    "none" where they are probabilities. gates: how a token's gates follow from it, "sum" where those of the chosen are
    divided by their sum, "scale" where they are not; a router that has `norm_topk_prob` says it itself. experts: the
    name of the experts in a sparse block. router: names of the module beside it that may be the router. modality: name
    of a block -> "vision" or "text", where each has its own experts.
    site: for blocks of another form, a subclass of `BlockSite`.
    """

    score: str = "softmax"
    gates: str = "sum"
    experts: str = "experts"
    router: tuple[str, ...] = ("gate", "router")
    modality: dict[str, str] = field(default_factory=dict)
    site: type[BlockSite] = BlockSite

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"adapter: score: expected one of {', '.join(SCORES)}, got {self.score!r}")
        if self.gates not in GATES:
            raise UserError(f"adapter: gates: expected one of {', '.join(GATES)}, got {self.gates!r}")


_SOFTMAX, _SIGMOID = Adapter(), Adapter(score="sigmoid")
# Each was tried in tests/interpret/test_hf_models.py; a type that is not is left out, however like the others it looks.
ADAPTERS: dict[str, Adapter] = {
    "aria": _SOFTMAX,
    "dbrx": _SOFTMAX,
    "deepseek_v2": Adapter(gates="scale"),
    "deepseek_v3": _SIGMOID,
    "dots1": _SIGMOID,
    "ernie4_5_moe": _SOFTMAX,
    "ernie4_5_vl_moe": Adapter(modality={"text_moe": "text", "vision_moe": "vision"}),
    "gemma4": Adapter(score="none", site=Gemma4Site),
    "glm4_moe": _SIGMOID,
    "glm4v_moe": _SIGMOID,
    "gpt_oss": _SOFTMAX,
    "granitemoe": _SOFTMAX,
    "hunyuan_v1_moe": _SOFTMAX,
    "jamba": Adapter(gates="scale"),
    "lfm2_moe": _SIGMOID,
    "llama4": Adapter(score="sigmoid", gates="scale", site=Llama4Site),
    "minimax_m2": _SIGMOID,
    "mixtral": _SOFTMAX,
    "olmoe": _SOFTMAX,
    "phimoe": Adapter(gates="scale"),  # nearly: each choice has a softmax of its own
    "qwen2_moe": _SOFTMAX,
    "qwen3_5_moe": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "qwen3_vl_moe": _SOFTMAX,
}


def register(model_type: str, adapter: Adapter) -> None:
    """Add, or replace, the adapter of a type of model: `model_type` in its config.json."""
    ADAPTERS[model_type] = adapter


def adapter_for(config: Any) -> Adapter:
    """The adapter of a model with this config (of the text decoder alone, too).

    Raises:
        UserError: no adapter is known; the message says what one needs.
    """
    model_type = str(getattr(config, "model_type", "") or "")
    found = ADAPTERS.get(model_type) or ADAPTERS.get(model_type.removesuffix("_text"))
    if found is not None:
        return found
    texts = [config, getattr(config, "text_config", None)]
    keys = [k for c in texts for k, value in getattr(c, "__dict__", {}).items() if isinstance(value, int)]
    dense = not any("expert" in key for key in keys)
    about = "its config names no experts, it seems to be dense; " if dense else ""
    raise UserError(
        f"no adapter for models of type {model_type!r}: {about}known are {', '.join(sorted(ADAPTERS))}. An adapter "
        "says where a sparse block keeps its router (a module that returns its logits first) and its experts (a module "
        f"called with hidden states, chosen experts, gates): vlmoe.interpret.hf.register({model_type!r}, "
        f'Adapter(router=("gate",), experts="experts", score="softmax")); see {DOCS}'
    )


def find_sites(model: nn.Module, adapter: Adapter, now: Pass) -> list[BlockSite]:
    """A site for each sparse block, from the first layer to the last.

    Raises:
        UserError: there is none, as in a configuration that makes every layer dense.
    """
    sites = [_site(path, block, adapter, now) for path, block in _blocks(model, adapter)]
    if not sites:
        names = " or ".join(repr(name) for name in adapter.router)
        raise UserError(
            f"{type(model).__name__}: no layer with experts found (a module {adapter.experts!r} beside {names}); the "
            f"model is dense, or its adapter does not fit, see {DOCS}"
        )
    return sites


def notes_of(sites: list[BlockSite], model: nn.Module) -> list[str]:
    """What readers should know of how this model routes."""
    notes = list(dict.fromkeys(site.note for site in sites if site.note))
    if any("shared_expert" in path or path.endswith("shared_mlp") for path, _ in model.named_modules()):
        notes.append("shared experts serve every token, whatever the router chooses: they are not shown")
    return notes


def _blocks(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    for path, block in model.named_modules():
        children = dict(block.named_children())
        if adapter.experts in children and any(name in children for name in adapter.router):
            yield path, block


def _site(path: str, block: nn.Module, adapter: Adapter, now: Pass) -> BlockSite:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    layer = int(numbers[0]) if numbers else 0
    modality = adapter.modality.get(path.rpartition(".")[2], "")
    children = dict(block.named_children())
    router, experts = next(children[name] for name in adapter.router if name in children), children[adapter.experts]
    name = f"{layer}/{modality}" if modality else str(layer)
    site = adapter.site(name, layer, modality, router, experts, adapter, now)
    for owner in (experts, router, block):
        site.experts = site.experts or int(getattr(owner, "num_experts", 0) or 0)
    configs = (getattr(router, "config", None), getattr(block, "config", None))
    named: list[tuple[Any, str]] = [(router, "top_k"), (block, "top_k"), *((c, "top_k_experts") for c in configs)]
    for owner, key in named:
        site.k = site.k or int(getattr(owner, key, 0) or 0)
    if not 1 <= site.k <= site.experts:
        raise UserError(
            f"{path}: expected 'num_experts' on the experts and 'top_k' on the router or the block, got {site.experts} "
            f"and {site.k}; the model's adapter does not fit, see {DOCS}"
        )
    return site
