"""Processes that share a model's experts and weights against one process alone."""

import pytest
import torch
from torch import Tensor

from tests.distributed.work import CASES, MESHES, Found, Net, gradients, spawn


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    return spawn(2, tmp_path_factory.mktemp("two"))


def close(found: Tensor, expected: Tensor, name: str) -> None:
    """Up to 1e-12 of the largest entry, or of 1: sums may be taken in another order."""
    largest = max(1.0, expected.double().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * largest, msg=lambda text: f"{name}: {text}")


def test_rows_go_where_they_are_sent_and_gradients_the_way_back(two: list[dict[str, Found]]) -> None:
    first, second = (found["rows"] for found in two)
    assert first["y"].tolist() == [0, 10, 11, 12] and second["y"].tolist() == [13, 14]
    assert first["x"].tolist() == [1] and second["x"].tolist() == [2, 3, 4, 2, 4]


@pytest.mark.parametrize("name", CASES)
def test_dealt_experts_equal_whole_ones(name: str, two: list[dict[str, Found]]) -> None:
    """Outputs, statistics and gradients of tokens on each process; of weights, those of experts on the process that has
    them are already the sums over all tokens, all others are each process's part."""
    case, alone = CASES[name], CASES[name].build()
    for rank, found in enumerate(two):
        for key, value in case.run(alone, rank).items():
            close(found[name][key], value, f"process {rank}, {key}")
    expected = gradients(alone)
    for key, value in expected.items():
        parts = [found[name][key] for found in two]
        dealt = key.startswith(("0.experts.", "1."))
        close(parts[0] if dealt else parts[0] + parts[1], value, key)
    assert expected.keys() <= two[0][name].keys()


@pytest.mark.parametrize("world", [2, 4])
def test_a_cut_model_equals_a_whole_one(
    world: int, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every gradient, summed over processes: blocks and experts cut, copied and dealt out in several ways."""
    results = request.getfixturevalue("two") if world == 2 else spawn(4, tmp_path_factory.mktemp("four"))
    alone = Net()
    losses = [alone.run(rank)["loss"] for rank in range(world)]
    expected = gradients(alone)
    assert any("experts" in key for key in expected) and any("log_scale" in key for key in expected)
    for dp, ep in MESHES[world]:
        for rank, found in enumerate(results):
            got = found[f"{dp}, {ep}"]
            assert got.keys() == {"loss", *expected}
            for key, value in {**expected, "loss": losses[rank]}.items():
                close(got[key], value, f"copies {dp}, experts over {ep}, process {rank}: {key}")
