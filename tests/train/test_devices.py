"""What a training step does on a GPU, seen without one: no tensor is the CPU's, and the host waits for nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.golden.record import OVERRIDES
from tests.tasks.world import recipe as task_recipe
from tests.tasks.world import tokenizer as task_tokenizer
from tests.train.other_device import OTHER, DeviceError, OtherDevice, other
from vlmoe.config import TASKS, load_recipe
from vlmoe.data.downstream.loader import TrainData, open_split
from vlmoe.data.loader import StepData
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.moe import Experts, Router
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.tasks.registry import build_task, collate_of
from vlmoe.train.loop import Trainer

__all__ = ["other"]
QUIET = {"log_every": 1000, "watch_every": 1000, "checkpoint_every": 1000, "steps": 1000}
Change = Callable[[nn.Module], None]


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return build_text_tokenizer(load_recipe("characters", OVERRIDES))


class Launch:
    """A run on the other device, step by step; data is made on the host and sent over."""

    def __init__(
        self, mode: OtherDevice, recipe: Any, task: Any, data: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe.train.device = "cpu"
        for name, value in QUIET.items():
            setattr(recipe.train, name, value)
        recipe.train.guard.every = 1000
        # the fused optimizer knows no meta device, and routing's records are looks
        monkeypatch.setattr("vlmoe.train.loop.make_optimizer", lambda task, config: _Optimizer(task.parameters()))
        monkeypatch.setattr("vlmoe.train.loop.routing_every", lambda config: 1000)
        self.mode, self.trainer = mode, Trainer(recipe, task, data, folder, OTHER)
        self.trainer.journal = self.trainer.feed.budget = _Nothing()  # type: ignore[assignment]
        self.trainer.feed.source = (data[n] for n in range(100))
        draw = self.trainer.feed.next

        def make_and_send() -> Any:
            with mode.on_host():
                return draw()

        monkeypatch.setattr(self.trainer.feed, "next", make_and_send)

    def step(self) -> int:
        """How many values were read in it."""
        before = self.mode.reads
        with self.mode:
            self.trainer._step()
        return self.mode.reads - before

    def look(self) -> None:
        """A step with every instrument."""
        config = self.trainer.config
        config.log_every = config.watch_every = self.trainer.watch.every = config.guard.every = 1
        self.step()


class _Optimizer:
    """The fused step is one kernel that reads `found_inf` on the device; there is nothing to see in it."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.parameters, self.param_groups = list(parameters), [{"lr": 0.1}]
        self.state: dict[nn.Parameter, dict[str, Any]] = {}

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        return


class _Nothing:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def launch(
    mode: OtherDevice, folder: Path, monkeypatch: pytest.MonkeyPatch, words: TextTokenizer, *overrides: str,
    change: Change | None = None,
) -> Launch:  # fmt: skip
    recipe = load_recipe("characters", [*OVERRIDES, *overrides])
    m = recipe.model
    task = MaskedDataModelling(m, VQTokenizer(m.image_size, m.patch, m.codes, 8, 16))
    if change is not None:
        change(task)
    return Launch(mode, recipe, task, StepData(recipe, words), folder, monkeypatch)


def both(*changes: str) -> list[str]:
    return [f"model.{side}.{change}" for side in ("vision", "text") for change in changes]


def frozen(*kinds: type[nn.Module]) -> Change:
    def change(task: nn.Module) -> None:
        for module in task.modules():
            if isinstance(module, kinds):
                module.requires_grad_(False)

    return change


RUNS: dict[str, tuple[list[str], Change | None]] = {
    "demo": ([], None),
    "dense": (both("sparse=none"), None),
    "hash": (both("router.type=hash"), None),
    "cosine": (both("router.type=cosine"), None),
    "sigmoid with bias": (both("router.type=sigmoid", "router.bias_rate=0.01", "router.load=0.1"), None),
    "softmax with bias": (both("router.bias_rate=0.01", "router.load=0.1"), None),
    "soft": (both("router.type=soft"), None),
    "capacity": (both("router.capacity_factor=1.25"), None),
    "first choices first": (both("router.capacity_factor=1.25", "router.priority=first_batch"), None),
    "all losses": (both("router.importance=0.1", "router.load=0.1", "router.local_entropy=0.1",
                        "router.global_entropy=0.1"), None),
    "wider balance": ([*both("router.balance_over=step"), "train.accumulate=2"], None),
    "common experts": (["model.common_experts=2"], None),
    "sub-LN, swiglu": (["model.sub_ln=true", "model.activation=swiglu", "model.attention=split"], None),
    "drop path": (["model.drop_path=0.1", *both("expert_dropout=0.1")], None),
    "frozen routers": ([], frozen(Router)),
    "frozen experts": ([], frozen(Experts)),
    "expert choice": (both("router.type=expert_choice"), None),
    "no guard": (["train.guard.on=false"], None),
}  # fmt: skip
# Values read in a step. Each of two layers sees texts or images twice: 8 passes, but 6 with the VL-FFN on top. Common
# experts need the number of rows that are theirs, expert choice the most experts that a token has; without the guard a
# step asks whether the loss is a number.
WAITING = {"common experts": 6, "expert choice": 6, "no guard": 1}


@pytest.mark.parametrize("name", RUNS)
def test_a_pretraining_step_stays_on_its_device_and_waits_for_nothing(
    name: str, other: OtherDevice, words: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, change = RUNS[name]
    run = launch(other, tmp_path, monkeypatch, words, *overrides, change=change)
    assert run.step() == WAITING.get(name, 0)
    run.look()
    assert other.reads > 0


@pytest.mark.parametrize(
    ("task", "train"),
    [*((task, "all") for task in TASKS), *(("vqa", t) for t in ("freeze_routers", "freeze_experts", "experts_only"))],
)
def test_a_fine_tuning_step_stays_on_its_device_and_waits_for_nothing(
    task: str, train: str, other: OtherDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = task_recipe(task, sparse={"train": train}, data={"batch": 4})
    examples, words = open_split(plan, "train"), task_tokenizer(task)
    model = build_task(plan, examples.labels, words)
    model.freeze()
    data = TrainData(plan, examples, collate_of(plan, examples.labels, words))
    run = Launch(other, plan, model, data, tmp_path, monkeypatch)
    assert run.step() == 0
    run.look()


CPU_SCALAR = torch.tensor(2.0)
MISTAKES: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a tensor on the CPU": (lambda x: torch.zeros(()), "zeros makes a tensor on the CPU"),
    "a number sent over": (lambda x: torch.tensor(3, device=x.device), "sends them over"),
    "a CPU scalar in arithmetic": (lambda x: x * CPU_SCALAR, "mul takes a tensor from the CPU"),
    "a choice by mask": (lambda x: x[x > 0], "index waits for the device"),
    "a list of positions": (lambda x: x.nonzero(), "nonzero waits for the device"),
    "a tensor moved to the host": (lambda x: x.cpu(), "on the CPU"),
    "repeats of unknown number": (lambda x: x.flatten().repeat_interleave(x.flatten().long()), "waits"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(
    name: str, other: OtherDevice, words: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, message = MISTAKES[name]

    def plant(task: nn.Module) -> None:
        task.get_submodule("backbone.norm").register_forward_hook(
            lambda module, args, output: (act(output.detach()), None)[1]
        )

    run = launch(other, tmp_path, monkeypatch, words, change=plant)
    with pytest.raises(DeviceError, match=message):
        run.step()


@pytest.mark.parametrize("read", [lambda x: x.tolist(), lambda x: x.sum().item(), lambda x: int(x.sum()),
                                  lambda x: bool((x > 0).any()), lambda x: float(x.max())])  # fmt: skip
def test_a_value_read_in_a_step_is_counted(
    read: Any, other: OtherDevice, words: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant(task: nn.Module) -> None:
        task.get_submodule("backbone.norm").register_forward_hook(
            lambda module, args, output: (read(output.detach()), None)[1]
        )

    assert launch(other, tmp_path, monkeypatch, words, change=plant).step() == 3  # texts, images, pairs
