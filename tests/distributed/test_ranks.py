"""Where several processes cannot be had, people are told what is missing."""

import pytest
import torch

from vlmoe.config import UserError
from vlmoe.distributed import Ranks, is_first, joined


def test_one_process_agrees_with_itself() -> None:
    with joined(torch.device("cpu")) as ranks:
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert list(ranks.mine(3)) == [0, 1, 2]
    assert ranks.count({"a": 2}) == {"a": 2} and ranks.most(15) == 15
    module = torch.nn.Linear(2, 2)
    assert ranks.join(module) is module


def test_a_world_without_a_meeting_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not is_first()
    lacks = r"WORLD_SIZE=2 and lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT: .*torchrun"
    with pytest.raises(UserError, match=lacks), joined(torch.device("cpu")):
        pass


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    few = r"process 3 of this machine has no CUDA device: there are 2"
    with pytest.raises(UserError, match=few), joined(torch.device("cuda")):
        pass


def test_each_micro_batch_is_taken_once() -> None:
    ranks = Ranks()
    ranks.world = 3
    taken: list[int] = []
    for ranks.rank in range(3):
        taken += ranks.mine(6)
    assert sorted(taken) == list(range(6))
