"""A recording fed back: the same outputs bit for bit, and clear words when it cannot be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.interpret.test_own import finetuned
from tests.interpret.world import Toy, batch_of, tiny
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.recorder import record
from vlmoe.interpret.recording import diff
from vlmoe.interpret.replay import ReplayError, replay

ROUTERS = {
    "two of four": (),
    "one of four": ("router.k=1", "router.renormalize=false"),
    "sigmoid": ("router.type=sigmoid",),
    "capacity, by gate": ("router.capacity_factor_eval=0.5",),
    "capacity, by arrival": ("router.capacity_factor_eval=0.5", "router.priority=arrival"),
    "expert choice": ("router.type=expert_choice",),
    "hash": ("router.type=hash",),
    "shared and fine": ("granularity=2", "shared_experts=1"),
}


def changed(*changes: str) -> list[str]:
    return [f"model.{side}.{change}" for side in ("vision", "text") for change in changes]


def scrambled(subject: OwnSubject) -> None:
    """Other routers, so that nothing but the recording can give the old choices."""
    with torch.no_grad():
        for layer in subject.trained.model.backbone.routed_layers().values():
            layer.router.weight.copy_(layer.router.weight.flip(0))


@pytest.mark.parametrize("name", ROUTERS)
def test_outputs_are_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    trained = tiny(*changed(*ROUTERS[name]))
    subject = OwnSubject(trained)
    batches = [batch_of(trained, kind) for kind in ("pair", "image", "text")]
    recording = record(subject, batches, tmp_path / "r")
    wanted = [(subject.run(b)[0].x_BTD, subject.losses(b)) for b in batches]
    scrambled(subject)
    assert not torch.equal(subject.run(batches[0])[0].x_BTD, wanted[0][0])
    with replay(subject, recording):
        for batch, (x_BTD, loss_R) in zip(batches, wanted, strict=True):
            found = subject.run(batch)[0].x_BTD
            valid = torch.from_numpy(subject.tokens(batch).valid_R).view(found.shape[:2])
            assert torch.equal(found[valid], x_BTD[valid])
            assert (subject.losses(batch) == loss_R)[loss_R == loss_R].all()
    assert not torch.equal(subject.run(batches[0])[0].x_BTD, wanted[0][0])
    assert "run" not in vars(subject)


def test_experts_common_to_both_modalities(tmp_path: Path) -> None:
    trained = tiny("model.common_experts=2")
    subject, batch = OwnSubject(trained), batch_of(trained)
    recording = record(subject, [batch], tmp_path / "r")
    wanted = subject.run(batch)[0].x_BTD
    scrambled(subject)
    with replay(subject, recording):
        valid = torch.from_numpy(subject.tokens(batch).valid_R).view(wanted.shape[:2])
        assert torch.equal(subject.run(batch)[0].x_BTD[valid], wanted[valid])


def test_a_replay_recorded_is_the_recording(tmp_path: Path) -> None:
    trained = tiny()
    subject, batches = OwnSubject(trained), [batch_of(trained), batch_of(trained, "text")]
    first = record(subject, batches, tmp_path / "a")
    scrambled(subject)
    with replay(subject, first):
        again = record(subject, batches, tmp_path / "b")
    assert all(d.first == d.any == 0 for d in diff(first, again).values() if d.tokens)
    assert (again.at("1/text").gate_NK == first.at("1/text").gate_NK).all()


def test_batches_may_be_cut_otherwise(tmp_path: Path) -> None:
    trained = tiny()
    subject = OwnSubject(trained)
    recording = record(subject, [batch_of(trained, n=8)], tmp_path / "r")
    scrambled(subject)
    with replay(subject, recording):
        again = record(subject, [batch_of(trained, start=s, n=2) for s in (6, 0, 4, 2)], tmp_path / "b")
    assert all(d.any == 0 for d in diff(recording, again).values() if d.tokens)


def test_two_passes(tmp_path: Path) -> None:
    subject, data = finetuned("nlvr2")
    recording = record(subject, [data[0]], tmp_path / "r")
    wanted = [o.x_BTD for o in subject.run(data[0])]
    scrambled(subject)
    with replay(subject, recording):
        found = [o.x_BTD for o in subject.run(data[0])]
    valid = [b.valid_BT for b in data[0].batches.values()]
    for a, b, v in zip(wanted, found, valid, strict=True):
        assert v is not None
        keep = torch.cat([torch.ones(len(v), a.shape[1] - v.shape[1], dtype=torch.bool), v], dim=1)
        assert torch.equal(a[keep], b[keep])


def test_what_is_not_in_the_recording(tmp_path: Path) -> None:
    trained = tiny()
    subject = OwnSubject(trained)
    recording = record(subject, [batch_of(trained)], tmp_path / "r", layers=[1])
    with (
        pytest.raises(ReplayError, match=r"site 3/vision: not in .*; it holds 1/vision, 1/text"),
        replay(subject, recording),
    ):
        pass
    with replay(subject, recording, sites=["1/text"]):
        subject.run(batch_of(trained))
        with pytest.raises(ReplayError, match="site 1/text: sample 'world/val/text/0/0', text 0, is not in"):
            subject.run(batch_of(trained, "text"))
    few = record(subject, [batch_of(trained)], tmp_path / "few", rate=0.3)
    with replay(subject, few), pytest.raises(ReplayError, match="which holds 30% of the samples"):
        subject.run(batch_of(trained))
    other = OwnSubject(tiny("model.text.experts=8"))
    with (
        pytest.raises(ReplayError, match=r"site 1/text: has 8 experts, .* has 4"),
        replay(other, recording, ["1/text"]),
    ):
        pass


def test_a_sample_recorded_twice(tmp_path: Path) -> None:
    toy = Toy()
    batch = {"samples": ["a"], "expert": [[0, 1]], "right": [[0, 0]]}
    recording = record(toy, [batch, batch], tmp_path / "r")
    with pytest.raises(ReplayError, match="sample 'a' was recorded twice"), replay(toy, recording):
        pass


def test_what_was_dropped_stays_dropped_where_there_is_room(tmp_path: Path) -> None:
    trained = tiny(*changed("router.capacity_factor_eval=0.5"))
    subject, batch = OwnSubject(trained), batch_of(trained)
    recording = record(subject, [batch], tmp_path / "r")
    wanted = subject.run(batch)[0].x_BTD
    for layer in trained.model.backbone.routed_layers().values():
        layer.capacity_factor_eval = None
    assert not torch.equal(subject.run(batch)[0].x_BTD, wanted)
    with replay(subject, recording):
        valid = torch.from_numpy(subject.tokens(batch).valid_R).view(wanted.shape[:2])
        assert torch.equal(subject.run(batch)[0].x_BTD[valid], wanted[valid])


def test_experts_without_the_room_they_had(tmp_path: Path) -> None:
    trained = tiny(*changed("router.capacity_factor_eval=1.0"))
    subject, batch = OwnSubject(trained), batch_of(trained, "text", n=16)
    recording = record(subject, [batch], tmp_path / "r")
    for layer in trained.model.backbone.routed_layers().values():
        layer.capacity_factor_eval = 0.25
    with (
        replay(subject, recording),
        pytest.raises(ReplayError, match=r"has no room for sample .* run the same batches"),
    ):
        subject.run(batch)


def test_toy_replays_what_it_chose(tmp_path: Path) -> None:
    toy = Toy()
    batch = {"samples": ["a", "b"], "expert": [[0, 1], [2, 0]], "right": [[0, 0], [2, 2]]}
    recording = record(toy, [batch], tmp_path / "r")
    with replay(toy, recording):
        choice = toy.run(batch | {"expert": [[2, 2], [1, 1]]})
    assert choice.expert_NK[:, 0].tolist() == [0, 1, 2, 0]
    assert torch.equal(choice.gate_NK, torch.full((4, 1), 0.5))
    assert replace(choice) == choice
