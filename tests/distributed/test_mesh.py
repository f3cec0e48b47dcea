"""Which grids of processes there can be."""

import pytest

from vlmoe.config import UserError
from vlmoe.distributed.mesh import check_mesh


@pytest.mark.parametrize(
    ("world", "dp", "ep", "experts", "cut"),
    [(1, 1, 1, [], 1), (8, 1, 1, [7], 8), (8, 2, 2, [4, 6], 2), (8, 2, 4, [8], 1), (6, 1, 3, [9, 6], 2)],
)
def test_what_divides_fits(world: int, dp: int, ep: int, experts: list[int], cut: int) -> None:
    assert check_mesh(world, dp, ep, experts) == cut


@pytest.mark.parametrize(
    ("world", "dp", "ep", "experts", "message"),
    [
        (8, 3, 1, [], r"dp: got 3 copies of the model over 8 processes, .*: 1, 2, 4 or 8"),
        (8, 0, 1, [], r"dp: got 0"),
        (8, 1, 3, [12], r"ep: .* over 3 processes, .* the 8 processes .* experts of each layer \(12\): 1, 2 or 4"),
        (8, 2, 8, [8], r"the 4 processes of a copy .*: 1, 2 or 4"),
        (8, 1, 4, [6, 9], r"\(6, 9\): 1$"),
        (5, 1, 2, [], r"the 5 processes of a copy of the model: 1 or 5"),
    ],
)
def test_what_does_not_is_told_what_would(world: int, dp: int, ep: int, experts: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_mesh(world, dp, ep, experts)
