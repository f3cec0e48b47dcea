"""What is measured of a recipe rather than computed: its batches as the data has them, the time and memory of a
step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vlmoe.config import Recipe
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.loader import Step, StepData
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.data.visual_tokenizer import VisualTokenizer
from vlmoe.model.device import pick_device, pick_precision
from vlmoe.model.flops import Shape
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.optim import clip_gradients, make_optimizer


def shape_of(kind: str, batch: Batch) -> Shape:
    """What the accounting needs to know of a batch."""
    text, valid, target, patches = batch.text_BT, batch.valid_BT, batch.target_BT, batch.patch_mask_BP
    return Shape(
        kind,
        len(batch),
        text=0 if text is None else text.shape[1],
        real=0 if valid is None else int(valid.sum()),
        words=0 if target is None else int((target != IGNORE).sum()),
        patches=0 if patches is None else int(patches.sum()),
    )


def shapes_of(step: Step) -> list[Shape]:
    return [shape_of(kind, batch) for kind, batch in step.batches.items()]


def data_shapes(recipe: Recipe, tokenizer: TextTokenizer, micro_batches: int = 64) -> list[list[Shape]]:
    """The shapes of the recipe's first micro-batches: padding and hidden tokens as they really are."""
    data = StepData(recipe, tokenizer)
    return [shapes_of(data[n]) for n in range(micro_batches)]


def mean_shapes(shapes: Sequence[Sequence[Shape]]) -> list[dict[str, Any]]:
    """Of each kind the mean shape of its batches, for a study's report: what a plan's steps will meet."""
    found: dict[str, list[dict[str, Any]]] = {}
    for shape in (s for batch in shapes for s in batch):
        found.setdefault(shape.kind, []).append(asdict(shape))
    return [
        {"kind": kind} | {key: statistics.fmean(s[key] for s in each) for key in each[0] if key != "kind"}
        for kind, each in found.items()
    ]


@dataclass
class StepCost:
    """seconds: of a step, median. memory: bytes of tensors at its worst moment, the model's own included."""

    seconds: float
    memory: int


class ReadyModel:
    """A freshly drawn pre-training model with its optimizer and the recipe's first micro-batches at hand, on the
    recipe's device."""

    def __init__(self, recipe: Recipe, text: TextTokenizer, visual: VisualTokenizer | None) -> None:
        self.config, self.device = recipe.train, pick_device(recipe.train.device)
        self.bf16 = pick_precision(recipe.train.precision, self.device) == torch.bfloat16
        torch.manual_seed(recipe.seed)
        self.task = MaskedDataModelling(recipe.model, visual).to(self.device).train()
        self.task.prepare(self.device)
        self.optimizer = make_optimizer(self.task, recipe.train)
        data = StepData(recipe, text)
        found = [data[n].batches for n in range(max(recipe.train.accumulate, 4))]
        self.batches = [{kind: batch.to(self.device) for kind, batch in batches.items()} for batches in found]

    def step(self, first: int) -> None:
        """One update from the micro-batches that begin with number `first`, in turn."""
        count = self.config.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(count):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.task(self.batches[(first + i) % len(self.batches)]).loss
            (loss / count).backward()
        clip_gradients(self.task, self.config.clip)
        self.optimizer.step()

    def timed_step(self, first: int) -> float:
        """Its seconds."""
        began = time.perf_counter()
        self.step(first)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def peak(self) -> int:
        """Bytes of tensors at the worst moment of the step on the largest micro-batches, all that is kept included."""
        self.optimizer.zero_grad(set_to_none=True)
        held = sum(p.nbytes for p in self.task.parameters())
        held += sum(v.nbytes for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v))
        firsts = range(0, len(self.batches), self.config.accumulate)
        largest = max(firsts, key=lambda n: sum(_bytes(b) for b in self.batches[n].values()))
        held += sum(_bytes(b) for b in self.batches[largest].values())
        return held + peak_memory(lambda: self.step(largest), self.device)


def measure_step(recipe: Recipe, text: TextTokenizer, visual: VisualTokenizer | None, steps: int = 8) -> StepCost:
    """Time and memory of the recipe's first training steps, on the recipe's device, data ready at hand."""
    model = ReadyModel(recipe, text, visual)
    model.step(0)
    took = [model.timed_step(n) for n in range(steps)]
    return StepCost(statistics.median(took), model.peak())


def peak_memory(run: Callable[[], None], device: torch.device | str = "cpu") -> int:
    """Bytes of tensors at the worst moment of `run`, beyond those that were there before; as torch's allocator counts
    them, temporary ones of its operators included."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _bytes(batch: Batch) -> int:
    return sum(v.nbytes for v in vars(batch).values() if torch.is_tensor(v))


def mean_tokens(shapes: Sequence[Sequence[Shape]], recipe: Recipe) -> float:
    """Of a micro-batch, padding not counted."""
    return statistics.fmean(sum(s.tokens(recipe.model) for s in batch) for batch in shapes)
