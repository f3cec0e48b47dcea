"""What a training step of a recipe costs: FLOPs by part, forward and backward, and memory on each device.

Arithmetic alone; see `flops` and `memory` for what is counted. `Shape`s describe the batches: without any, every text
has `max_text` tokens and no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vlmoe.config import Recipe
from vlmoe.model.flops import PARTS, Flops, Shape, flops
from vlmoe.model.memory import Memory, Sharding, memory
from vlmoe.model.sizes import Sizes, describe_parameters, short, sizes

KINDS = ("image", "text", "pair")


@dataclass
class Account:
    """shapes: the batches of one micro-batch on one device. flops: of each of them, by kind. step: of a whole training
    step on one device, all its micro-batches, as it is computed. charge: the same as a comparison of sparse and dense
    models counts it, padding charged to all layers alike, see `Shape.charged`. tokens: of a step on one device, without
    padding. memory: of one device.
    """

    sizes: Sizes
    shapes: dict[str, Shape]
    flops: dict[str, Flops]
    kind_tokens: dict[str, int]
    step: Flops
    charge: Flops
    tokens: int
    memory: Memory
    precision: str
    sharding: Sharding

    @property
    def flops_per_token(self) -> float:
        """Of training, forward and backward, over real tokens: what padding costs is in it, padding is not counted."""
        return self.step.total / self.tokens

    @property
    def charge_per_token(self) -> float:
        """Of training as a comparison charges it, over real tokens."""
        return self.charge.total / self.tokens

    def as_dict(self) -> dict[str, object]:
        """For JSON: the sizes' own keys, then what a step costs."""
        per_sample = {kind: _plain(f.scaled(1 / self.shapes[kind].samples)) for kind, f in self.flops.items()}
        per_token = {kind: _plain(f.scaled(1 / self.kind_tokens[kind])) for kind, f in self.flops.items()}
        return self.sizes.as_dict() | {
            "training_flops": {
                "per_sample": per_sample,
                "per_token": per_token | {"all": _plain(self.step.scaled(1 / self.tokens))},
                "per_step": _plain(self.step),
            },
            "tokens_per_step": self.tokens,
            "memory_per_device": asdict(self.memory),
            "precision": self.precision,
            "sharding": asdict(self.sharding),
        }


def account(
    recipe: Recipe,
    shapes: Sequence[Shape] | None = None,
    sharding: Sharding | None = None,
    precision: str | None = None,
) -> Account:
    """Of a recipe's training step. precision: fp32 or bf16; None: the recipe's, whose "auto" counts as fp32."""
    batch, tokenizer = recipe.data.batch, recipe.data.visual_tokenizer
    if shapes is None:
        sizes_of = {kind: getattr(batch, kind) for kind in KINDS}
        shapes = [Shape.full(recipe.model, recipe.data.masking, kind, n) for kind, n in sizes_of.items() if n]
    precision = precision or ("bf16" if recipe.train.precision == "bf16" else "fp32")
    found = {shape.kind: flops(recipe.model, shape, tokenizer) for shape in shapes}
    tokens = {shape.kind: shape.tokens(recipe.model) for shape in shapes}
    charged = [found[s.kind] if s.charged() == s else flops(recipe.model, s.charged(), tokenizer) for s in shapes]
    return Account(
        sizes=sizes(recipe.model),
        shapes={shape.kind: shape for shape in shapes},
        flops=found,
        kind_tokens=tokens,
        step=Flops.sum(found.values()).scaled(recipe.train.accumulate),
        charge=Flops.sum(charged).scaled(recipe.train.accumulate),
        tokens=sum(tokens.values()) * recipe.train.accumulate,
        memory=memory(recipe.model, shapes, precision, sharding),
        precision=precision,
        sharding=sharding or Sharding(),
    )


def describe_account(name: str, recipe: Recipe, found: Account) -> str:
    """The account as text for people."""
    lines = describe_parameters(name, recipe.model)
    batches = ", ".join(f"{shape.samples} {kind}s" for kind, shape in found.shapes.items())
    times = f" x {recipe.train.accumulate} micro-batches" if recipe.train.accumulate > 1 else ""
    lines.append(f"  FLOPs, training      {short(found.flops_per_token)} per token; a step of {batches}{times}, "
                 f"{found.tokens:,} tokens, costs {short(found.step.total)}")  # fmt: skip
    lines.append(f"    {'':<12} {'per token':>19} " + "".join(f" {f'per {kind}':>19}" for kind in found.flops))
    lines.append(f"    {'':<12} {'forward  backward':>19} " + f" {'forward  backward':>19}" * len(found.flops))
    each = [found.step.scaled(1 / found.tokens)]
    each += [f.scaled(1 / found.shapes[kind].samples) for kind, f in found.flops.items()]
    for part in (*PARTS, "all"):
        cells = [f"{short(_of(f.forward, part)):>9} {short(_of(f.backward, part)):>9}" for f in each]
        if any(_of(f.forward, part) for f in each):
            lines.append(f"    {part:<12} {cells[0]} " + "".join(f" {cell}" for cell in cells[1:]))
    again = sum(found.step.recompute.values())
    if again:
        lines.append(f"    computed again for the backward pass: {short(again / found.tokens)} per token")
    m, s = found.memory, found.sharding
    cut = f"cut over {s.devices} devices" if s.full else f"whole on each of {s.devices} devices"
    where = "on one device" if s.devices == 1 else f"on each device: {cut}" + (
        f", experts over {s.experts}" if s.experts > 1 else ""
    )  # fmt: skip
    lines.append(f"  memory, training     {gib(m.peak)} at its peak, {found.precision}, {where}")
    for part, size in asdict(m).items():
        if size and part != "peak":
            lines.append(f"    {part:<12} {gib(size):>10}")
    lines.append("  A multiply-add is two FLOPs. Texts are taken as max_text tokens long. Not in the memory: what the")
    lines.append("  allocator rounds up, libraries' workspaces, the process itself. See docs/fair-comparison.md.")
    return "\n".join(lines)


def _of(parts: dict[str, float], part: str) -> float:
    return sum(parts.values()) if part == "all" else parts[part]


def _plain(f: Flops) -> dict[str, object]:
    return asdict(f) | {"total": f.total}


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
