import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe.data.counter import stream
from vlmoe.data.masking import count_of, mask_patches, mask_tokens


@given(total=st.integers(1, 200), ratio=st.sampled_from([0.15, 0.5, 0.4]))
def test_tokens_exact_count_among_the_maskable(total: int, ratio: float) -> None:
    maskable = stream(1, total).random(total) < 0.7
    hidden = mask_tokens(maskable, ratio, stream(0, total))
    n = int(maskable.sum())
    assert not (hidden & ~maskable).any()
    assert hidden.sum() == (min(n, max(1, int(ratio * n + 0.5))) if n else 0)


@pytest.mark.parametrize(
    ("ratio", "total", "count"), [(0.15, 1, 1), (0.15, 10, 2), (0.15, 9, 1), (0.5, 5, 3), (0.4, 36, 14)]
)
def test_count_rounds_half_up_and_hides_at_least_one(ratio: float, total: int, count: int) -> None:
    assert count_of(ratio, total) == count


def test_tokens_are_hidden_evenly() -> None:
    share = np.mean([mask_tokens(np.ones(10, dtype=bool), 0.5, stream(0, i)) for i in range(2000)], axis=0)
    assert (np.abs(share - 0.5) < 0.05).all()


@pytest.mark.parametrize("side", [2, 6, 14])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.9])
def test_patches_exact_count(side: int, ratio: float) -> None:
    for i in range(50):
        assert mask_patches(side, ratio, 2, stream(3, i)).sum() == count_of(ratio, side * side)


def test_patches_come_in_blocks_everywhere() -> None:
    """Hidden patches have far more hidden neighbours than scattered ones would (0.4), and no place is left out."""
    side, neighbours, share = 14, [], np.zeros((14, 14))
    for i in range(300):
        hidden = mask_patches(side, 0.4, 16, stream(9, i)).reshape(side, side)
        share += hidden / 300
        right = hidden[:, :-1] & hidden[:, 1:]
        neighbours.append(right.sum() / hidden[:, :-1].sum())
    assert np.mean(neighbours) > 0.75
    assert share.min() > 0.01  # a block fits in a corner in one way only, as in BEiT
    assert share.max() < 0.8


def test_masks_depend_on_the_stream_alone() -> None:
    assert (mask_patches(6, 0.4, 2, stream(1, 5)) == mask_patches(6, 0.4, 2, stream(1, 5))).all()
    assert len({mask_patches(6, 0.4, 2, stream(1, i)).tobytes() for i in range(100)}) > 95
