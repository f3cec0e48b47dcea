"""VQAv2's accuracy by hand, with the awkward answers."""

import pytest

from vlmoe.metrics import normalize_answer, soft_scores, vqa_accuracy


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("two", "2"),
        ("Two", "2"),
        ("none", "0"),
        ("the red bus", "red bus"),
        ("A man", "man"),
        ("a", ""),
        ("dont know", "don't know"),
        ("don't know", "don t know"),  # the apostrophe is punctuation, and no space stands beside one here
        ("yes.", "yes"),
        ("2.5", "2.5"),
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("red/blue", "red blue"),
        ("t-shirt", "t-shirt"),  # a hyphen is none of its marks
        ("'hello' he said", "hello he said"),
        ("  on\tthe\nleft ", "on left"),
        ("o'clock", "o clock"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
    ],
)
def test_normalised_answers(given: str, normal: str) -> None:
    assert normalize_answer(given) == normal


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_is_the_mean_over_leaving_one_out(agree: int, accuracy: float) -> None:
    """With one of ten agreeing, nine subsets hold it: 9 / 10 * 1 / 3."""
    references = ["red"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_accuracy("red", references) == pytest.approx(accuracy)


def test_the_answer_is_normalised_and_the_references_only_lose_punctuation() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 1
    assert vqa_accuracy("2", ["two"] * 10) == 0  # the official code leaves annotators' words as they are
    assert vqa_accuracy("the dog", ["dog"] * 10) == 1
    assert vqa_accuracy("dog", ["the dog"] * 10) == 0


def test_references_keep_their_punctuation_when_all_agree() -> None:
    assert vqa_accuracy("red, blue", ["red, blue"] * 10) == 0
    assert vqa_accuracy("red, blue", ["red, blue"] * 9 + ["red"]) == 1


def test_exact_comparison_keeps_letters_that_look_like_articles() -> None:
    references = ["latin capital letter a"] * 10
    assert vqa_accuracy("latin capital letter a", references, exact=True) == 1
    assert vqa_accuracy("latin capital letter b", references, exact=True) == 0
    assert vqa_accuracy("latin capital letter b", ["latin capital letter"] * 10) == 0
    assert vqa_accuracy("latin capital letter a", ["latin capital letter"] * 10) == 1


def test_soft_scores_of_ten_and_of_fewer_annotators() -> None:
    scores = soft_scores(["two"] * 2 + ["2"] + ["3"] * 3 + ["four"] + ["a dog", "dog", "the dog"])
    assert scores == pytest.approx({"2": 0.9, "3": 0.9, "4": 0.3, "dog": 0.9})
    assert soft_scores(["red"]) == {"red": 1.0}
    assert soft_scores(["red", "red"]) == {"red": 1.0}
    assert soft_scores(["red"] * 10) == {"red": 1.0}


def test_no_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="no reference answers"):
        vqa_accuracy("red", [])
