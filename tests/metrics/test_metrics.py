"""Bootstrap, NLVR2 consistency, recall with ties, BLEU and CIDEr: against values by hand or of the official code."""

import math

import pytest
import torch

from vlmoe.metrics import bleu4, cider_d, consistency, mean_score, ranks, recall, sentence_id
from vlmoe.metrics.caption import tokenize


# ----------------------------------------------------------------------------------------------------------- intervals
def test_the_interval_of_a_share_is_that_of_theory_and_the_same_each_time() -> None:
    values = [i % 2 for i in range(400)]
    score = mean_score(values)
    assert (score.value, score.n) == (0.5, 400)
    assert score.interval is not None
    low, high = score.interval
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 400), rel=0.1)
    assert mean_score(values) == score


def test_examples_that_belong_together_are_resampled_together() -> None:
    values = [float(i // 4 % 2) for i in range(400)]  # all four of a group alike: a hundred independent values
    alone, grouped = mean_score(values), mean_score(values, [str(i // 4) for i in range(400)])
    assert alone.interval and grouped.interval
    width = [high - low for low, high in (alone.interval, grouped.interval)]
    assert width[1] / width[0] == pytest.approx(2, rel=0.15)
    assert grouped.value == alone.value


def test_nothing_to_score_is_nan_without_interval() -> None:
    score = mean_score([])
    assert math.isnan(score.value)
    assert (score.interval, score.n) == (None, 0)


# --------------------------------------------------------------------------------------------------------------- nlvr2
def test_a_sentence_is_consistent_when_all_its_examples_are_right() -> None:
    identifiers = ["dev-1-0-0", "dev-1-1-0", "dev-1-2-0", "dev-1-0-1", "dev-1-1-1", "dev-2-0-0"]
    groups = [sentence_id(i) for i in identifiers]
    assert groups == ["dev-1-0", "dev-1-0", "dev-1-0", "dev-1-1", "dev-1-1", "dev-2-0"]
    score = consistency([True, True, False, True, True, True], groups)
    assert score.value == pytest.approx(2 / 3)
    assert score.n == 3
    with pytest.raises(ValueError, match="'dev-1-0': expected"):
        sentence_id("dev-1-0")


# ----------------------------------------------------------------------------------------------------------- retrieval
def test_ranks_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gallery = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.8, 0.9], [0.1, 0.2]])
    assert ranks(query, gallery, [[1], [0, 3]]).tolist() == [2, 2]
    assert ranks(query, gallery, [[0, 2], [2]]).tolist() == [0, 0]  # the best of several counts
    assert ranks(query, gallery, [[], [1]]).tolist() == [4, 1]


def test_ties_count_against_the_query() -> None:
    same = torch.ones(6, 3)
    rank_N = ranks(same, same, [[i] for i in range(6)])
    assert rank_N.tolist() == [5] * 6
    assert recall(rank_N)["R@1"].value == recall(rank_N)["R@5"].value == 0


def test_ranks_do_not_depend_on_the_chunk() -> None:
    torch.manual_seed(0)
    query, gallery = torch.randn(50, 8), torch.randn(80, 8)
    positives = [[i, i + 30] for i in range(50)]
    whole = ranks(query, gallery, positives)
    for chunk in (1, 7, 50):
        assert torch.equal(ranks(query, gallery, positives, chunk=chunk), whole)
    for n, found in enumerate(positives):
        scores = (gallery.double() @ query[n].double()).tolist()
        best = max(scores[p] for p in found)
        assert whole[n] == sum(s > best for m, s in enumerate(scores) if m not in found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["queries", "gallery items"])
def test_embeddings_that_are_no_numbers_are_refused(side: str, value: float) -> None:
    query, gallery = torch.eye(3), torch.eye(3)
    (query if side == "queries" else gallery)[1, 2] = value
    with pytest.raises(ValueError, match=f"1 of 3 {side} have embeddings that are no numbers"):
        ranks(query, gallery, [[0], [1], [2]])


def test_a_wrong_item_within_rounding_of_the_right_one_stands_before_it() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.0], [1.0 - 5e-6, 0.0], [1.0 - 5e-5, 0.0]])
    assert [int(ranks(query, gallery, [[i]])[0]) for i in range(3)] == [1, 1, 2]


def test_recall_counts_the_first_k() -> None:
    scores = recall(torch.tensor([0, 4, 5, 9, 10]))
    assert [scores[k].value for k in ("R@1", "R@5", "R@10")] == [0.2, 0.4, 0.8]


# ------------------------------------------------------------------------------------------------------------ captions
HYPOTHESES = [
    "a man riding a wave on a surfboard",
    "two dogs play in the snow",
    "a plate of food on a table with a fork",
    "a red bus",
    "a a a a cat",
]
REFERENCES = [
    ["a man rides a wave on his surfboard", "a surfer riding a large wave in the ocean",
     "man on a surfboard riding a wave"],
    ["two dogs are playing in the snow", "dogs play in snow"],
    ["a plate of food with a fork on a wooden table", "a table with a plate of food",
     "food on a plate beside a fork and a knife"],
    ["a red double decker bus driving down the street", "a big red bus on a city street"],
    ["a cat sits on a mat", "the cat is on the mat"],
]  # fmt: skip


def test_bleu_and_cider_agree_with_cocos_evaluation() -> None:
    """The numbers are those of pycocoevalcap 1.2's BleuScorer and CiderScorer on these texts."""
    assert bleu4(HYPOTHESES, REFERENCES).value == pytest.approx(37.0927365149499, rel=1e-12)
    assert cider_d(HYPOTHESES, REFERENCES).value == pytest.approx(287.6890535332815, rel=1e-12)
    alone = [312.7973216130334, 383.742893397659, 454.0604362733177, 141.15150789955942, 146.69310848283814]
    assert cider_d(HYPOTHESES, REFERENCES).value == pytest.approx(sum(alone) / 5)


def test_a_caption_equal_to_its_only_reference_scores_the_most() -> None:
    texts = ["a red digit seven in the centre", "two blue letters at the top left"]
    references = [[t] for t in texts]
    assert bleu4(texts, references).value == pytest.approx(100)
    assert cider_d(texts, references).value == pytest.approx(1000)


def test_a_short_caption_is_penalised_and_an_empty_one_scores_nothing() -> None:
    references = [["a red digit seven in the centre"], ["two blue letters at the top left"]]
    cut = bleu4(["a red digit seven", "two blue letters at"], references).value
    assert cut == pytest.approx(100 * math.exp(1 - 14 / 8), rel=1e-6)
    assert bleu4(["", ""], references).value == pytest.approx(0, abs=1e-6)
    assert cider_d(["", ""], references).value == 0
    long = ["a red digit seven in the centre a red digit seven in the centre", references[1][0]]
    assert cider_d(long, references).value < 1000 - 100


def test_no_matching_run_of_four_words_is_next_to_nothing() -> None:
    assert bleu4(["a red big digit"], [["a red digit seven in"]]).value < 0.1


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="1 for 2 captions"):
        bleu4(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="at least one reference"):
        cider_d(["a"], [[]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's hat, (red).", ["a", "man", "'s", "hat", "red"]),
        ("don't stop!", ["do", "n't", "stop"]),
        ("one object: a t-shirt", ["one", "object", "a", "t-shirt"]),
        ("2.5 metres; 3:4", ["2.5", "metres", "3", "4"]),
    ],
)
def test_words_are_split_as_the_penn_treebank_does(text: str, words: list[str]) -> None:
    assert tokenize(text) == words
