"""Statistics against values computed by hand and by scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from tests.interpret.world import Toy, batch_of, tiny
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.recorder import record
from vlmoe.interpret.recording import Recording, Routed, SiteInfo, Words
from vlmoe.interpret.statistics import (
    Information,
    contingency,
    information,
    mutual_bits,
    paths,
    restrict,
    sharing,
    taking,
    top_patches,
    top_tokens,
    top_values,
    use,
    use_by,
    use_by_task,
    weights,
)


def routed_of(expert: list[list[int]], experts: int, gate: list[list[float]] | None = None) -> Routed:
    """Tokens in order; -1 for no expert; gates 1 where none are given."""
    expert_NK = np.array(expert, dtype=np.int16)
    gate_NK = np.where(expert_NK >= 0, 1.0, 0.0) if gate is None else np.array(gate)
    N, K = expert_NK.shape
    site = SiteInfo("0", 0, "", experts, K)
    return Routed(site, np.arange(N), expert_NK, gate_NK, gate_NK > 0, np.full(N, 0.5))


def words_of(values: list[str]) -> Words:
    known = sorted(set(values))
    return Words(np.array([known.index(v) for v in values]), known)


FIRST = routed_of([[0], [0], [0], [1], [1], [2], [2], [2], [2], [-1]], 4)
SHAPE = words_of(["round", "round", "square", "round", "square", "square", "square", "square", "", "round"])


def test_use_by_hand() -> None:
    found = use(FIRST)
    assert found.share_E.tolist() == pytest.approx([3 / 9, 2 / 9, 4 / 9, 0])
    assert (found.tokens, found.idle, found.dropped) == (10, 1, 0.0)
    assert found.entropy == 0.5
    assert found.max_over_mean == pytest.approx(4 / (9 / 4))


def test_dropped_is_of_the_choices_and_still_a_choice() -> None:
    routed = routed_of([[0, 1], [1, 0], [1, -1]], 2, [[0.9, 0.1], [0.6, 0.4], [0.5, 0.0]])
    routed.kept_NK[0, 0] = False
    found = use(routed)
    assert found.dropped == pytest.approx(1 / 5)
    assert found.share_E.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert use(routed, "all").share_E.tolist() == pytest.approx([0.4 / 3, 2.6 / 3])


def test_use_by_value() -> None:
    found = use_by(FIRST, SHAPE)
    assert found["round"].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert found["square"].tolist() == pytest.approx([1 / 5, 1 / 5, 3 / 5, 0])
    assert "" not in found


def test_purity_coverage_and_lift_by_hand() -> None:
    t = taking(FIRST, SHAPE)
    assert t.values == ["round", "square"]
    assert t.count_EV.tolist() == [[2, 1], [1, 1], [0, 3], [0, 0]]
    assert t.purity_EV[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert t.coverage_EV[:, 1].tolist() == pytest.approx([1 / 5, 1 / 5, 3 / 5, 0])
    assert t.lift_EV[0, 0] == pytest.approx((2 / 3) / (3 / 8))
    assert t.lift_EV[3].tolist() == [0, 0]
    rows = top_values({"shape": t}, 0)
    assert rows == [
        {"factor": "shape", "value": "round", "purity": pytest.approx(2 / 3), "coverage": pytest.approx(2 / 3),
         "lift": pytest.approx(16 / 9), "tokens": 2}
    ]  # fmt: skip


def test_choices_weighted_by_their_gates() -> None:
    routed = routed_of([[0, 1], [1, 0]], 2, [[0.6, 0.2], [0.5, 0.5]])
    assert weights(routed, "all").tolist() == [pytest.approx([0.75, 0.25]), pytest.approx([0.5, 0.5])]
    table = contingency(routed, words_of(["a", "b"]), "all")
    assert table.count_EV.tolist() == [pytest.approx([0.75, 0.5]), pytest.approx([0.25, 0.5])]
    with pytest.raises(ValueError, match="choices: expected first or all, got 'best'"):
        use(routed, "best")


def test_mutual_information_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    expert = rng.integers(6, size=500)
    value = [f"v{(e + rng.integers(3)) % 6}" if rng.random() < 0.7 else "" for e in expert]
    known = [i for i, v in enumerate(value) if v]
    found = information(routed_of([[int(e)] for e in expert], 6), words_of(value), permutations=50)
    wanted = mutual_info_score([expert[i] for i in known], [value[i] for i in known]) / np.log(2)
    assert found.bits == pytest.approx(wanted)
    share = np.unique([value[i] for i in known], return_counts=True)[1] / len(known)
    assert found.factor_bits == pytest.approx(-(share * np.log2(share)).sum())
    assert found.tokens == len(known)
    assert found.share == pytest.approx((found.bits - found.chance) / found.factor_bits)


@pytest.mark.parametrize("choices", ["first", "all"])
def test_chance_is_what_permuted_labels_give(choices: str) -> None:
    rng = np.random.default_rng(1)
    expert, value = rng.integers(8, size=300), rng.integers(5, size=300)
    routed, words = routed_of([[int(e)] for e in expert], 8), words_of([f"v{v}" for v in value])
    found = information(routed, words, choices, permutations=400)
    by_hand = []
    for _ in range(400):
        table = np.zeros((8, 5))
        np.add.at(table, (expert, rng.permutation(value)), 1)
        by_hand.append(float(mutual_bits(table)))
    assert found.chance == pytest.approx(np.mean(by_hand), rel=0.04)
    assert found.chance_high == pytest.approx(np.quantile(by_hand, 0.975), rel=0.08)
    assert found.chance > 0.05  # a finite table never shows nothing
    assert found.bits < found.chance_high  # drawn apart from each other
    assert found == information(routed, words, choices, permutations=400)


def test_what_determines_the_expert_has_all_bits() -> None:
    routed, words = routed_of([[0], [1], [2], [3]] * 50, 4), words_of(["a", "b", "c", "d"] * 50)
    found = information(routed, words)
    assert found.bits == pytest.approx(2.0)
    assert found.share > 0.97
    assert information(routed, words_of(["a"] * 200)).factor_bits == 0
    assert information(routed, words_of([""] * 200)).tokens == 0


def captions(rng: np.random.Generator, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """sample_N, place_N of captions of 6 to 24 tokens."""
    length = rng.integers(6, 25, count)
    return np.repeat(np.arange(count), length), np.concatenate([np.arange(n) for n in length])


def by_sample(expert_N: np.ndarray, value_N: np.ndarray, sample_N: np.ndarray, choices: str) -> Information:
    """Of eight experts; a negative value is not known."""
    words = words_of([f"v{v}" if v >= 0 else "" for v in value_N])
    return information(routed_of([[int(e)] for e in expert_N], 8), words, choices, sample_T=sample_N)


@pytest.mark.parametrize("choices", ["first", "all"])
def test_what_a_captions_tokens_share_is_chance_by_sample(choices: str) -> None:
    """Experts go by the place, or by a word that fills the caption; the factor is constant in a caption. The second is
    nothing but forty observations, which look like six hundred."""
    shares = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sample_N, place_N = captions(rng)
        value_N, word_N = (rng.integers(n, size=40)[sample_N] for n in (3, 8))
        by_place = by_sample(place_N % 8, value_N, sample_N, choices)
        by_word = by_sample(word_N, value_N, sample_N, choices)
        assert by_word.bits > 4 * by_word.chance_high  # by token it looks certain
        for found in (by_place, by_word):
            assert found.bits < max(found.chance_high, found.sample_chance_high)  # what is claimed is above both
        assert abs(by_place.share) < 0.03
        shares.append(by_word.share)
    assert abs(np.mean(shares)) < 0.06


@pytest.mark.parametrize("choices", ["first", "all"])
def test_what_experts_do_go_by_is_above_chance_by_sample(choices: str) -> None:
    rng = np.random.default_rng(0)
    sample_N, place_N = captions(rng)
    value_N = rng.integers(3, size=40)[sample_N]
    noisy_N = np.where(rng.random(len(value_N)) < 0.3, rng.integers(3, size=len(value_N)), value_N)
    own_N = rng.integers(3, size=len(value_N))  # each token has a value of its own
    known_N = np.where(place_N % 2, value_N, -1)  # known for half of the tokens
    for expert_N, label_N in ((noisy_N, value_N), (own_N, own_N), (place_N % 8, place_N % 8), (noisy_N, known_N)):
        found = by_sample(expert_N, label_N, sample_N, choices)
        assert found.bits > found.sample_chance_high
        assert found.share > 0.2
        assert found == by_sample(expert_N, label_N, sample_N, choices)


def test_chance_by_sample_of_a_constant_factor_is_that_of_exchanged_samples() -> None:
    """By hand: captions of one length, so that only whole captions' values change places."""
    rng = np.random.default_rng(2)
    expert_SP, value_S = rng.integers(4, size=(30, 10)), rng.integers(3, size=30)
    expert_SP[:, 5:] = expert_SP[:, 4:5]
    sample_N = np.repeat(np.arange(30), 10)
    found = information(
        routed_of([[int(e)] for e in expert_SP.ravel()], 4), words_of([f"v{v}" for v in value_S[sample_N]]),
        permutations=400, sample_T=sample_N,
    )  # fmt: skip
    by_hand = []
    for _ in range(400):
        table = np.zeros((4, 3))
        np.add.at(table, (expert_SP.ravel(), rng.permutation(value_S)[sample_N]), 1)
        by_hand.append(float(mutual_bits(table)))
    assert found.sample_chance == pytest.approx(np.mean(by_hand), rel=0.08)
    assert found.sample_chance_high == pytest.approx(np.quantile(by_hand, 0.975), rel=0.12)
    assert found.sample_chance > 2 * found.chance


def test_tokens_that_are_telling() -> None:
    routed = routed_of([[0]] * 6 + [[1]] * 6, 2)
    taken = taking(routed, words_of(["a", "a", "a", "b", "c", "c", "c", "c", "b", "b", "d", "e"]))
    assert top_tokens(taken, 0) == [{"text": "a", "count": 3, "lift": pytest.approx(2.0)}]
    assert [row["text"] for row in top_tokens(taken, 1, least=1)] == ["d", "e", "b"]
    assert [row["text"] for row in top_tokens(taken, 1)] == ["b"]


def test_restrict_to_some_tokens() -> None:
    keep = np.array([True] * 3 + [False] * 7)
    assert use(restrict(FIRST, keep)).share_E.tolist() == [1, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------- of recordings
@pytest.fixture(scope="module")
def toy_recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    batch = {"samples": ["a", "b"], "expert": [[0, 1, 1], [1, 2, 2]], "right": [[0] * 3] * 2}
    return record(Toy(), [batch], tmp_path_factory.mktemp("toy") / "r")


def test_use_by_task(toy_recording: Recording) -> None:
    found = use_by_task({"x": toy_recording, "y": toy_recording})
    assert found["0"]["y"].tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])


def test_no_sharing_where_there_is_one_modality(toy_recording: Recording) -> None:
    assert sharing(toy_recording) == {}


def test_sharing_at_a_site_for_all_by_hand(tmp_path: Path) -> None:
    class Both(Toy):
        def tokens(self, batch):
            table = super().tokens(batch)
            table.modality_R = np.array(["vision", "vision", "text", "text"] * 2)
            return table

    batch = {"samples": ["a", "b"], "expert": [[0, 0, 1, 1], [0, 1, 1, 2]], "right": [[0] * 4] * 2}
    found = sharing(record(Both(), [batch], tmp_path / "r"))["0"]
    assert found["vision"] == [0.75, 0.25, 0.0] and found["text"] == [0.0, 0.75, 0.25]
    assert found["overlap"] == 0.25


def test_common_experts_are_shared(tmp_path: Path) -> None:
    trained = tiny("model.common_experts=2")
    recording = record(OwnSubject(trained), [batch_of(trained)], tmp_path / "r")
    found = sharing(recording)
    vision, text = (use(recording.at(f"1/{side}")).share_E for side in ("vision", "text"))
    assert found["1/vision"]["vision"] == pytest.approx(vision.tolist())
    assert found["1/vision"]["text"] == pytest.approx([0.0] * 4 + text[4:].tolist())
    assert found["1/text"]["vision"] == pytest.approx([0.0] * 4 + vision[4:].tolist())
    assert found["1/text"]["overlap"] == pytest.approx(np.minimum(vision[4:], text[4:]).sum())


def test_paths_and_top_patches_of_a_model(tmp_path: Path) -> None:
    trained = tiny()
    recording = record(OwnSubject(trained), [batch_of(trained, "image"), batch_of(trained, "text")], tmp_path / "r")
    found = paths(recording)
    assert found["vision"]["layers"] == ["1/vision", "3/vision"]
    one, three = recording.at("1/vision"), recording.at("3/vision")
    assert (one.token_N == three.token_N).all()
    for link in found["vision"]["links"]:
        a, b = one.first_N == link["from"][1], three.first_N == link["to"][1]
        assert link["count"] == (a & b).sum()
        assert link["lift"] == pytest.approx((a & b).sum() * len(a) / (a.sum() * b.sum()))
    assert sum(link["count"] for link in found["vision"]["links"]) == 8 * 17
    assert len(paths(recording, most=2)["text"]["links"]) == 2
    assert paths(recording, ["1/text"])["text"]["links"] == []
    for e, rows in enumerate(top_patches(recording, one, 5)):
        patches = one.first_N[np.isin(one.token_N, np.flatnonzero(recording.position_T >= 0))] == e
        assert len(rows) == min(5, patches.sum())
        place = {int(t): n for n, t in enumerate(one.token_N)}
        gates = [float(one.gate_NK[place[int(t)], 0]) for t in rows]
        assert gates == sorted(gates, reverse=True)
        assert all(one.first_N[place[int(t)]] == e and recording.position_T[t] >= 0 for t in rows)
