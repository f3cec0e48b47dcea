from collections import Counter

import pytest

from tests.data.fakes import FakeSource
from vlmoe.config import UserError
from vlmoe.data.mixture import TRIES, Mixture, Schedule
from vlmoe.data.sample import Sample


def keys(mixture: Mixture, start: int, stop: int) -> list[str]:
    return [mixture.draw(p, lambda sample: sample, []).key for p in range(start, stop)]


def test_weights_are_exact_and_evenly_spread() -> None:
    schedule = Schedule([0.5, 0.3, 0.2])
    assert schedule.length == 10
    counts = Counter(schedule.locate(p)[0] for p in range(1000))
    assert counts == {0: 500, 1: 300, 2: 200}
    for start in range(0, 1000, 37):  # any stretch of ten is within one draw of its share
        stretch = Counter(schedule.locate(p)[0] for p in range(start, start + 10))
        assert abs(stretch[0] - 5) <= 1
        assert abs(stretch[2] - 2) <= 1


def test_draws_are_counted_without_history() -> None:
    schedule, seen = Schedule([3, 1, 7]), Counter[int]()
    for p in range(200):
        source, draws = schedule.locate(p)
        assert draws == seen[source]
        seen[source] += 1


def test_odd_weights_keep_every_source() -> None:
    schedule = Schedule([1.0, 3.14159265, 1e-9])
    counts = [int(c) for c in schedule.counts]
    assert sum(counts) == schedule.length
    assert counts[2] == 1
    assert abs(counts[1] / counts[0] - 3.14159265) < 0.01


def test_epochs_are_exact_and_differ() -> None:
    mixture = Mixture([(FakeSource("text", 23, "a"), 2.0), (FakeSource("text", 10, "b"), 1.0)], seed=4)
    drawn = keys(mixture, 0, 23 * 3 * 2)
    a = [key for key in drawn if key.startswith("a/")]
    epochs = [a[i : i + 23] for i in range(0, len(a) - 22, 23)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"a/{i}" for i in range(23))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_same_for_the_same_seed_only() -> None:
    sources = [(FakeSource("text", 50), 1.0)]
    assert keys(Mixture(sources, 1), 0, 50) == keys(Mixture(sources, 1), 0, 50)
    assert keys(Mixture(sources, 1), 0, 50) != keys(Mixture(sources, 2), 0, 50)


def test_endless_and_held_out_sources_come_in_order() -> None:
    assert keys(Mixture([(FakeSource("text", 2**62), 1.0)], 1), 5, 8) == ["fake/5", "fake/6", "fake/7"]
    assert keys(Mixture([(FakeSource("text", 9), 1.0)], 1, shuffle=False), 5, 8) == ["fake/5", "fake/6", "fake/7"]


def test_a_bad_sample_is_recorded_and_replaced_by_the_position_alone() -> None:
    mixture = Mixture([(FakeSource("text", 20, broken=frozenset({3, 4})), 1.0)], 0)
    bad: list[tuple[str, str]] = []
    first = [mixture.draw(p, lambda s: s.key, bad) for p in range(20)]
    assert {key for key, _ in bad} == {"fake/3", "fake/4"}
    assert {reason for _, reason in bad} == {"broken on purpose"}
    assert not {"fake/3", "fake/4"} & set(first)
    assert [mixture.draw(p, lambda s: s.key, []) for p in reversed(range(20))] == first[::-1]


def test_hopeless_data_is_an_error_that_names_the_last_key() -> None:
    mixture = Mixture([(FakeSource("text", 5, "dir", broken=frozenset(range(5))), 1.0)], 0)
    bad: list[tuple[str, str]] = []

    def use(sample: Sample) -> Sample:
        return sample

    with pytest.raises(UserError, match=r"dir: 16 samples in a row are bad; the last, dir/\d: broken on purpose"):
        mixture.draw(0, use, bad)
    assert len(bad) == TRIES


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(UserError, match="nothing holds no text samples"):
        Mixture([(FakeSource("text", 0, "nothing"), 1.0)], 0)
