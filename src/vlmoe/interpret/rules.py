"""Rules that put other experts in the place of the router's, for `Site.change`.

Shape suffixes: R rows (all tokens of a batch) · N tokens of a site · K chosen experts · E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmoe.config import UserError
from vlmoe.interpret.recorder import choose_sites
from vlmoe.interpret.sites import Choice, Site, Subject, TokenTable

Rule = Callable[[Choice], Choice]


def regate(site: Site, choice: Choice, expert_NK: Tensor) -> Tensor:
    """The gates that tokens would have had with other experts, as far as a router's probabilities tell.

    A site may say how its gates come about: `site.regate(choice, expert_NK)` does it itself, or `site.gates` is "scale"
    (a gate is the probability times a factor of the token's own: softmax, sigmoid), "sum" (that, divided by the sum of
    the chosen: renormalised gates) or "equal" (all alike). Where it says nothing the choice does: gates all alike are
    "equal", gates of a constant sum are "sum".
    """
    if hasattr(site, "regate"):
        return site.regate(choice, expert_NK)
    kind = getattr(site, "gates", None) or _kind_of(choice)
    total_N1 = choice.gate_NK.sum(dim=1, keepdim=True)
    if kind == "equal":
        return (total_N1 / expert_NK.shape[1]).expand(expert_NK.shape)
    probs_NK = choice.probs_NE.gather(1, expert_NK).to(choice.gate_NK.dtype)
    if kind == "sum":
        return probs_NK * (total_N1 / _positive(probs_NK.sum(dim=1, keepdim=True)))
    first_N1 = choice.probs_NE.gather(1, choice.expert_NK[:, :1]).to(choice.gate_NK.dtype)
    return probs_NK * (choice.gate_NK[:, :1] / _positive(first_N1))


def _kind_of(choice: Choice) -> str:
    gate_NK = choice.gate_NK[choice.kept_NK.all(dim=1)]
    if len(gate_NK) == 0:
        return "scale"
    total_N, middle = gate_NK.sum(dim=1), gate_NK.sum(dim=1).mean()
    if bool((gate_NK - gate_NK.mean()).abs().max() <= 1e-3 * middle.abs()):
        return "equal"
    return "sum" if bool((total_N - middle).abs().max() <= 1e-3 * middle.abs()) else "scale"


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def silence(site: Site, experts: Sequence[int]) -> Rule:
    """The gates of these experts become 0."""
    banned = _checked(site, experts)

    def rule(choice: Choice) -> Choice:
        hit_NK = torch.isin(choice.expert_NK, banned.to(choice.expert_NK.device))
        return replace(choice, gate_NK=choice.gate_NK.masked_fill(hit_NK, 0)) if bool(hit_NK.any()) else choice

    return rule


def reroute(site: Site, experts: Sequence[int]) -> Rule:
    """Tokens that chose these experts take their next best ones in the same places."""
    banned = _checked(site, experts)
    if len(set(experts)) >= site.experts:
        raise UserError(f"site {site.name}: no expert of {site.experts} is left to take the tokens; use silence")

    def rule(choice: Choice) -> Choice:
        index_NK, probs_NE = choice.expert_NK, choice.probs_NE
        device = index_NK.device
        hit_NK = torch.isin(index_NK, banned.to(device)) & (choice.gate_NK != 0)  # fillers have gate 0
        if not bool(hit_NK.any()):
            return choice
        taken_NE = torch.zeros_like(probs_NE, dtype=torch.bool).scatter_(1, index_NK, choice.gate_NK != 0)
        taken_NE[:, banned.to(device)] = True
        order_NE = probs_NE.masked_fill(taken_NE, -1).argsort(dim=1, descending=True, stable=True)
        place_NK = (hit_NK.cumsum(dim=1) - 1).clamp_min(0)  # the j-th expert taken away is followed by the j-th best
        new_NK = torch.where(hit_NK, order_NE.gather(1, place_NK), index_NK)
        none_NK = hit_NK & taken_NE.gather(1, new_NK)  # fewer experts are left than the token had
        changed_N1 = hit_NK.any(dim=1, keepdim=True)
        gate_NK = torch.where(changed_N1, _regated(site, choice, new_NK, none_NK), choice.gate_NK)
        return replace(choice, expert_NK=new_NK, gate_NK=gate_NK.masked_fill(none_NK, 0))

    return rule


def _regated(site: Site, choice: Choice, new_NK: Tensor, none_NK: Tensor) -> Tensor:
    """`regate`, with fillers and places without an expert counting nothing in a sum."""
    out_NK = none_NK | (choice.gate_NK == 0)
    gate_NK = regate(site, choice, new_NK)
    if bool(out_NK.any()):
        before_N1 = gate_NK.sum(dim=1, keepdim=True)
        gate_NK = gate_NK.masked_fill(out_NK, 0)
        if (getattr(site, "gates", None) or _kind_of(choice)) != "scale":
            gate_NK = gate_NK * (before_N1 / _positive(gate_NK.sum(dim=1, keepdim=True)))
    return gate_NK


def forced(site: Site, experts: Sequence[int]) -> Rule:
    """Every token goes to these experts, in this order."""
    wanted = _checked(site, experts)

    def rule(choice: Choice) -> Choice:
        new_NK = wanted.to(choice.expert_NK.device).expand(len(choice.expert_NK), -1)
        return replace(choice, expert_NK=new_NK, gate_NK=regate(site, choice, new_NK))

    return rule


def _checked(site: Site, experts: Sequence[int]) -> Tensor:
    wrong = [e for e in experts if not 0 <= e < site.experts]
    if wrong or not len(experts):
        raise UserError(f"site {site.name}: experts are numbered 0 to {site.experts - 1}, got {list(experts)}")
    return torch.tensor(list(dict.fromkeys(experts)))


class OnRows:
    """A rule on some rows of the running batch only. `start` names the rows before each batch."""

    def __init__(self, site: Site, rule: Rule) -> None:
        self.site, self.rule = site, rule
        self.wanted_N: np.ndarray | None = None
        self.at = 0

    def start(self, table: TokenTable | None, wanted_R: np.ndarray | None) -> None:
        self.at = 0
        self.wanted_N = None
        if table is not None and wanted_R is not None:
            self.wanted_N = np.asarray(wanted_R[table.rows_of(self.site)], dtype=bool)

    def __call__(self, choice: Choice) -> Choice:
        if self.wanted_N is None:
            return self.rule(choice)
        N = len(choice.expert_NK)
        mask_N1 = torch.from_numpy(self.wanted_N[self.at : self.at + N]).to(choice.expert_NK.device)[:, None]
        self.at += N
        new = self.rule(choice)
        K = max(new.expert_NK.shape[1], choice.expert_NK.shape[1])
        sides = [[F.pad(t, (0, K - t.shape[1])) for t in (c.expert_NK, c.gate_NK)] for c in (new, choice)]
        expert_NK, gate_NK = (torch.where(mask_N1, a, b) for a, b in zip(*sides, strict=True))
        return replace(choice, expert_NK=expert_NK, gate_NK=gate_NK)


@contextmanager
def applied(
    subject: Subject, rules: Mapping[str, Rule], only: tuple[str, str] | None = None
) -> Iterator[Callable[[Any], None]]:
    """Sites change by their rules while it is open. only: (factor, value): just for the tokens that have it; then the
    function it gives must be called with each batch before it is run."""
    changed = {site.name: OnRows(site, rules[site.name]) for site in choose_sites(subject, list(rules))}

    def ready(batch: Any) -> None:
        table = subject.tokens(batch) if only is not None else None
        wanted_R = None
        if table is not None and only is not None:
            wanted_R = np.zeros(len(table.sample_R), dtype=bool)
            if only[0] in table.factors:
                wanted_R = table.factors[only[0]] == only[1]
        for rule in changed.values():
            rule.start(table, wanted_R)

    handles = [site.change(changed[site.name]) for site in subject.sites if site.name in changed]
    try:
        yield ready
    finally:
        for handle in handles:
            handle.remove()
