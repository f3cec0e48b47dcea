"""The autopilot: what it holds back, revives, raises and rolls back, and that a healthy run does not feel it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train.toy import VOCABULARY, ToyData, ToyTask, toy_recipe
from vlmoe.data.batch import Batch
from vlmoe.moe import MoELayer
from vlmoe.tasks.base import StepOutput, Summed
from vlmoe.tasks.pretrain import first_choices, summarise_routing
from vlmoe.train.checkpoint import steps_in
from vlmoe.train.loop import NonFiniteError, train
from vlmoe.train.runlog import EVENTS, METRICS, ROUTING, read_lines
from vlmoe.train.watch import Watch

pytestmark = pytest.mark.usefixtures("no_plots")
Fault = Callable[["SparseToy", int], None]


class SparseToy(ToyTask):
    """The toy with one sparse layer. fault(task, call) may break something before each micro-step; `blow` is added to
    the loss of that step."""

    def __init__(self, fault: Fault | None = None, experts: int = 4, **options: Any) -> None:
        super().__init__(width=8, dropout=0.1)
        self.moe = MoELayer(8, 16, experts, noise=0.0, **options)
        for p in self.moe.experts.parameters():
            nn.init.normal_(p, std=0.2)
        self.fault, self.calls, self.blow = fault, 0, 0.0

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        if self.training:
            self.blow = 0.0
            if self.fault is not None:
                self.fault(self, self.calls)
            self.calls += 1
        text_BT, target_B = self._read(batches)
        x_BTD = self.embed(text_BT)
        y_BTD, stats = self.moe(x_BTD)
        x_BD = self.drop(torch.tanh(self.hidden((x_BTD + y_BTD).flatten(1))))
        routing = summarise_routing([("0/text", stats)])
        loss = nn.functional.cross_entropy(self.head(x_BD), target_B, reduction="sum") + self.blow * len(target_B)
        losses = {"mlm": Summed(loss, len(target_B))} | routing.losses
        metrics = {"text/mlm": losses["mlm"].mean.detach()} | routing.metrics
        return StepOutput(losses, metrics, routing.load, routing.layers, routing.spans)

    def routed_layers(self) -> dict[str, MoELayer]:
        return {"0/text": self.moe}

    def choices(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        return first_choices([("0/text", self.moe(self.embed(self._read(batches)[0]))[1])])


def go(
    tmp_path: Path, fault: Fault | None = None, steps: int = 120, **options: Any
) -> tuple[SparseToy, list[dict[str, Any]]]:
    """A run of the sparse toy; returns it with its events. train: keys of the recipe."""
    settings = {"steps": steps, "lr": 0.01, "checkpoint_every": 20, "log_every": 10, **options.pop("train", {})}
    torch.manual_seed(0)
    task = SparseToy(fault, **options)
    train(toy_recipe(tmp_path, **settings), task, ToyData(batch=16), tmp_path)
    return task, read_lines(tmp_path / EVENTS)


def kinds(events: list[dict[str, Any]]) -> set[str]:
    return {e["event"] for e in events} - {"launch", "checkpoint", "warning"}


def weights(task: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.parameters()])


def once(step: int, act: Callable[[SparseToy], None]) -> Fault:
    return lambda task, call: act(task) if call == step else None


def scale(parameter: Tensor, factor: float) -> None:
    with torch.no_grad():
        parameter.mul_(factor)


# -------------------------------------------------------------------------------------------------------------- healthy
def test_a_healthy_run_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    on, events = go(tmp_path / "on")
    off, _ = go(tmp_path / "off", train={"guard": {"on": False}})
    blind, _ = go(tmp_path / "blind", train={"watch_every": 0})
    assert kinds(events) == set()
    assert torch.equal(weights(on), weights(off))
    assert torch.equal(weights(on), weights(blind))
    a, b = ([r["loss"] for r in read_lines(tmp_path / name / METRICS)] for name in ("on", "off"))
    assert a == b


# ------------------------------------------------------------------------------------------------------------ held back
def test_an_update_from_nan_is_held_back_and_logged(tmp_path: Path) -> None:
    task, events = go(tmp_path, once(35, lambda t: setattr(t, "blow", math.nan)), steps=60)
    (event,) = [e for e in events if e["event"] == "update held back"]
    assert (event["step"], event["cause"], event["loss"]) == (36, "the loss is no number", "nan")
    assert torch.isfinite(weights(task)).all()
    assert read_lines(tmp_path / METRICS)[-1]["step"] == 60


def test_holding_back_leaves_weights_and_optimizer_as_they_were(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def fault(task: SparseToy, call: int) -> None:
        task.blow = math.inf if call == 35 else 0.0
        if call in (35, 36):
            seen.append(weights(task))

    go(tmp_path, fault, steps=40)
    assert torch.equal(seen[0], seen[1])


def test_a_jump_of_the_loss_is_held_back(tmp_path: Path) -> None:
    _, events = go(tmp_path, once(90, lambda t: setattr(t, "blow", 30.0)))
    (event,) = [e for e in events if e["event"] == "update held back"]
    assert event["step"] == 91
    assert "jumped above the median" in event["cause"]


def test_off_means_the_old_end(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 36: loss or gradient is not finite"):
        go(tmp_path, once(35, lambda t: setattr(t, "blow", math.nan)), train={"guard": {"on": False}})


# ------------------------------------------------------------------------------------------------------------ roll-back
def test_a_run_that_stays_broken_goes_back_and_leaves_the_data_out(tmp_path: Path) -> None:
    def broken_data(task: SparseToy, call: int) -> None:
        task.blow = math.nan if 85 <= call < 115 else 0.0

    task, events = go(tmp_path, broken_data, train={"guard": {"patience": 10}})
    back = [e for e in events if e["event"] == "rolled back"]
    assert back
    assert all(e["to"] == 80 for e in back)  # the checkpoint of 100 was not taken: the run was not healthy
    assert "updates in a row were held back" in back[0]["cause"]
    assert torch.isfinite(weights(task)).all()
    assert steps_in(tmp_path / "checkpoints")[-1] == 120
    lines = [r["step"] for r in read_lines(tmp_path / METRICS)]
    assert lines == sorted(set(lines))
    assert task.calls > 120


def test_a_loss_that_rises_and_stays_is_undone(tmp_path: Path) -> None:
    """By little each step, so that no update is a jump."""

    def rising(task: SparseToy, call: int) -> None:
        task.blow = 0.03 * (call - 100) if 100 <= call < 150 else 0.0

    _, events = go(tmp_path, rising, steps=160, train={"guard": {"spike": 1e9}, "lr": 0.001})
    back = next(e for e in events if e["event"] == "rolled back")
    assert "the loss has risen from" in back["cause"]


def test_a_run_that_cannot_be_saved_says_so(tmp_path: Path) -> None:
    def always(task: SparseToy, call: int) -> None:
        task.blow = math.nan if call >= 45 else 0.0

    with pytest.raises(NonFiniteError, match=r"also after 2 roll-backs(.|\n)*step-40"):
        go(tmp_path, always, train={"guard": {"patience": 5, "max_roll_backs": 2}})
    assert read_lines(tmp_path / EVENTS)[-1]["event"] == "given up"
    assert steps_in(tmp_path / "checkpoints")[-1] == 40


# -------------------------------------------------------------------------------------------------------------- experts
def test_an_expert_of_zeros_is_revived(tmp_path: Path) -> None:
    def zero(task: SparseToy) -> None:
        for p in task.moe.experts.parameters():
            scale(p[1], 0.0)

    task, events = go(tmp_path, once(0, zero))  # later, Adam's momentum would lead out of it
    (event,) = [e for e in events if e["event"] == "expert revived"]
    assert (event["layer"], event["expert"], event["step"]) == ("0/text", 1, 10)
    assert "withered" in event["cause"]
    assert task.moe.experts.w1[1].norm() > 0.1 * task.moe.experts.w1[0].norm()


def test_an_expert_of_infinities_is_revived(tmp_path: Path) -> None:
    def burst(task: SparseToy) -> None:
        with torch.no_grad():
            task.moe.experts.w1[2] = math.inf

    task, events = go(tmp_path, once(35, burst), steps=60)
    assert {"expert revived", "update held back"} <= kinds(events)
    assert torch.isfinite(weights(task)).all()
    assert next(e for e in events if e["event"] == "expert revived")["expert"] == 2


def test_an_expert_nobody_chooses_is_revived_and_chosen(tmp_path: Path) -> None:
    def shun(task: SparseToy) -> None:
        with torch.no_grad():  # the embedding gets a large common part, to which expert 3 is averse
            task.embed.weight[:, 0] = 3.0
            task.moe.router.weight[:, 0] = torch.tensor([1.0, 1.0, 1.0, -5.0])

    task, events = go(tmp_path, once(0, shun), steps=100, balance=0.0, train={"guard": {"dead_after": 40}, "lr": 0.001})
    revived = [e for e in events if e["event"] == "expert revived"]
    assert revived[0]["expert"] == 3
    assert "no token chose it for 40 steps" in revived[0]["cause"]
    with torch.no_grad():
        load_E = task.eval().moe(task.embed(torch.arange(VOCABULARY)))[1].load_E
    assert load_E[3] > 0


# -------------------------------------------------------------------------------------------------------------- balance
@pytest.mark.parametrize(
    "steering", [{"balance": 0.05}, {"balance": 0.0, "z": 0.0, "router": "sigmoid", "bias_rate": 0.002}]
)
def test_pressure_rises_on_collapse_and_falls_when_it_is_over(tmp_path: Path, steering: dict[str, Any]) -> None:
    def collapse(task: SparseToy) -> None:
        with torch.no_grad():
            task.embed.weight[:, 0] = 2.0
            task.moe.router.weight[:, 0] = torch.tensor([8.0, 0.0, 0.0, 0.0])

    task, events = go(tmp_path, once(0, collapse), steps=400, train={"guard": {"dead_after": 1000}}, **steering)
    raised = [e for e in events if e["event"] == "pressure raised"]
    assert raised[0]["layer"] == "0/text"
    assert "of the tokens" in raised[0]["cause"]
    assert max(e["pressure"] for e in raised) <= 16
    assert any(e["event"] == "pressure lowered" for e in events)
    assert task.moe.pressure < max(e["pressure"] for e in raised)


# --------------------------------------------------------------------------------------------------------------- resume
def test_what_the_guard_knows_survives_a_restart(tmp_path: Path) -> None:
    fault = once(55, lambda t: setattr(t, "blow", math.nan))
    whole, _ = go(tmp_path / "whole", fault)
    torch.manual_seed(0)
    recipe = toy_recipe(tmp_path / "parts", steps=120, lr=0.01, checkpoint_every=20, log_every=10)

    class StopError(Exception):
        pass

    def interrupted(task: SparseToy, call: int) -> None:
        fault(task, call)
        if call == 70:
            raise StopError

    with pytest.raises(StopError):
        train(recipe, SparseToy(interrupted), ToyData(batch=16), tmp_path / "parts")
    torch.manual_seed(0)
    again = SparseToy(None)
    assert train(recipe, again, ToyData(batch=16), tmp_path / "parts").resumed_from == 60
    assert torch.equal(weights(whole), weights(again))


# ---------------------------------------------------------------------------------------------------------- instruments
def test_the_routers_are_watched(tmp_path: Path) -> None:
    go(tmp_path, steps=100)
    looks = [r["layers"]["0/text"] for r in read_lines(tmp_path / ROUTING) if "layers" in r]
    assert len(looks) == 2
    assert {
        "entropy",
        "max_load",
        "idle",
        "dropped",
        "unserved",
        "logits",
        "router_gradient",
        "expert_gradient",
    } <= set(looks[0])
    assert "churn" not in looks[0]
    assert 0 <= looks[1]["churn"] <= 1
    assert looks[1]["router_gradient"] > 0


def test_a_warning_says_what_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shun(task: SparseToy) -> None:
        with torch.no_grad():
            task.embed.weight[:, 0] = 3.0
            task.moe.router.weight[:, 0] = torch.tensor([5.0, -5.0, -5.0, -5.0])

    train_options = {"watch_every": 20, "lr": 1e-5, "guard": {"on": False}}
    _, events = go(tmp_path, once(0, shun), steps=60, balance=0.0, z=0.0, train=train_options)
    texts = [e["text"] for e in events if e["event"] == "warning"]
    assert "layer 0 text: 3 of 4 experts idle for 20 steps" in texts
    assert "layer 0 text: 3 of 4 experts idle for 40 steps" in texts
    assert "layer 0 text: one expert serves 100% of the tokens" in texts
    assert "step 40: layer 0 text: 3 of 4 experts idle" in capsys.readouterr().out


def test_experts_are_idle_only_when_no_step_used_them() -> None:
    task = SparseToy()
    batches = ToyData(batch=16)[0].batches
    watch = Watch(task, 2, torch.device("cpu"), {})
    for loads, said in (
        ([[9, 9, 0, 0], [9, 0, 9, 0]], ["1 of 4 experts idle for 2 steps"]),
        ([[9, 0, 9, 0], [9, 0, 9, 0]], ["2 of 4 experts idle for 2 steps"]),
        ([[9, 0, 9, 0], [9, 9, 9, 0]], ["1 of 4 experts idle for 6 steps"]),
        ([[1, 1, 1, 0], [0, 0, 0, 1]], []),
    ):
        for load in loads:
            watch.count({"0/text": torch.tensor(load)})
        values = watch.look([task(batches)])
        assert values["0/text"]["idle"] == len([x for x in torch.tensor(loads).sum(dim=0) if x == 0]) / 4
        assert [text.partition(": ")[2] for text in watch.warnings(values) if "idle" in text] == said


# ---------------------------------------------------------------------------------------------- balance over the step
def test_the_balance_loss_can_span_the_accumulated_step(tmp_path: Path) -> None:
    """Two micro-batches that are each collapsed, to different experts, are balanced together."""
    from vlmoe.tasks.base import Span
    from vlmoe.tasks.pretrain import balance_beyond_passes

    probability = torch.tensor([8.0, 0.0])
    first = Span(torch.tensor([8, 0]), probability, torch.tensor(8), 1.0, "step")
    assert float(balance_beyond_passes({"0/text": first}, {})) == 2.0
    assert float(balance_beyond_passes({"0/text": first}, {"0/text": torch.tensor([0, 8])})) == 1.0
    alone = Span(torch.tensor([8, 0]), probability, torch.tensor(8), 1.0, "micro")
    assert float(balance_beyond_passes({"0/text": alone}, {"0/text": torch.tensor([0, 8])})) == 2.0
    everywhere = Span(torch.tensor([8, 0]), probability, torch.tensor(8), 1.0, "global")
    assert float(balance_beyond_passes({"0/text": everywhere}, {}, lambda load_E: load_E + load_E.flip(0))) == 1.0


@pytest.mark.parametrize("scope", ["micro", "step", "global"])
def test_wider_spans_train(tmp_path: Path, scope: str) -> None:
    task, _ = go(tmp_path / scope, steps=20, balance_over=scope, train={"accumulate": 2})
    plain, _ = go(tmp_path / "pass", steps=20, train={"accumulate": 2})
    same = torch.equal(weights(task), weights(plain))
    assert same == (scope == "micro")  # the toy has one pass a micro-batch


def test_the_selection_bias_moves_once_a_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"router": "sigmoid", "bias_rate": 0.01, "balance": 0.0}
    task, _ = go(tmp_path, steps=10, train={"accumulate": 2}, **options)
    steps = task.moe.router.bias_E / 0.01
    torch.testing.assert_close(steps, steps.round())
    assert 0 < steps.abs().max() <= 10


def test_what_is_said_of_routing_does_not_depend_on_where_a_run_was_interrupted(tmp_path: Path) -> None:
    """Steps 4 and 8 are looked at; the interruption at 6 falls between, with choices counted and a probe chosen."""

    class InterruptionError(Exception):
        pass

    def stop(trainer: Any, n: int) -> None:
        if n == 6:
            raise InterruptionError

    records = []
    for name, disturb in (("whole", None), ("cut", stop)):
        recipe = toy_recipe(tmp_path / name, steps=9, watch_every=4, checkpoint_every=3)
        torch.manual_seed(0)
        if disturb is not None:
            with pytest.raises(InterruptionError):
                train(recipe, SparseToy(), ToyData(), tmp_path / name, disturb=disturb)
            torch.manual_seed(0)
            assert train(recipe, SparseToy(), ToyData(), tmp_path / name).resumed_from == 6
        else:
            train(recipe, SparseToy(), ToyData(), tmp_path / name)
        records.append(read_lines(tmp_path / name / ROUTING))
    assert records[0] == records[1]
    assert any("churn" in found for r in records[0] for found in r.get("layers", {}).values())
