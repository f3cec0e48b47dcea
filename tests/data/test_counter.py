import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe.data.counter import hash64, shuffled, stream


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(length: int, key: int) -> None:
    assert sorted(shuffled(i, length, key) for i in range(length)) == list(range(length))


def test_shuffled_moves_things_and_depends_on_the_key() -> None:
    one, two = ([shuffled(i, 1000, key) for i in range(1000)] for key in (1, 2))
    assert sum(a == b for a, b in zip(one, range(1000), strict=True)) < 20  # 1 expected of a random permutation
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 20
    neighbours = np.abs(np.diff(one))
    assert 280 < neighbours.mean() < 390  # a third of the length, as of a random permutation


def test_shuffled_refuses_positions_outside() -> None:
    for position in (-1, 10):
        with pytest.raises(IndexError):
            shuffled(position, 10, 0)


def test_streams_repeat_and_differ() -> None:
    assert (stream(5, 7).random(8) == stream(5, 7).random(8)).all()
    assert not np.isin(stream(5, 7).random(8), [*stream(5, 8).random(8), *stream(6, 7).random(8)]).any()


def test_hash_tells_numbers_from_words_and_stays_what_it_is() -> None:
    assert hash64(1, "a") != hash64("1", "a")
    assert hash64("order", 0, "pair", 0, 3) == 14338513088771057147  # runs that resume depend on it
