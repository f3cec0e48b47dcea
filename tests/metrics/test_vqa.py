"""VQAv2's accuracy on made-up answers: values of the official evaluation (vqaEval.py of 2021), or by hand."""

import pytest

from vlmoe.metrics import normalize_answer, soft_scores, vqa_accuracy

# Answer, what the annotators said, and the accuracy that the official code gives (rounded).
OFFICIAL = [
    # all agree: nothing is normalised
    ("two", ["two"] * 10, 1.0),
    ("2", ["two"] * 10, 0.0),
    ("the dog", ["the dog"] * 10, 1.0),
    ("dog", ["the dog"] * 10, 0.0),
    ("red, blue", ["red, blue"] * 10, 1.0),
    ("Red", ["red"] * 10, 0.0),
    ("dont know", ["don't know"] * 10, 0.0),
    ("12:30", ["12:30"] * 10, 1.0),
    ("on the\tleft ", ["on the left"] * 10, 1.0),
    ("left", [" left\n"] * 10, 1.0),
    ("red", ["red"], 0.0),
    # digits
    ("two", ["2"] * 9 + ["3"], 1.0),
    ("2", ["two"] * 2 + ["TWO"] * 2 + ["four"] * 6, 1.0),
    ("none", ["0"] * 5 + ["no"] * 5, 1.0),
    ("eleven", ["11"] * 9 + ["12"], 0.0),
    # articles
    ("the dog", ["dog"] * 9 + ["cat"], 1.0),
    ("dog", ["the dog"] * 2 + ["A dog"] + ["cat"] * 7, 0.9),
    ("letter a", ["letter"] * 9 + ["letter b"], 1.0),
    # contractions
    ("dont know", ["don't know"] * 3 + ["yes"] * 7, 0.9),
    ("don't know", ["dont know"] * 2 + ["yes"] * 8, 0.6),
    ("somebody'd", ["somebodyd"] * 9 + ["x"], 1.0),
    ("I'm", ["im"] * 9 + ["x"], 0.0),
    ("shouldntve", ["shouldn't've"] * 9 + ["x"], 0.0),
    ("yall'll", ["y'all'll"] * 9 + ["x"], 1.0),
    # punctuation
    ("t-shirt", ["t shirt"] * 9 + ["shirt"], 1.0),
    ("t -shirt", ["tshirt"] * 9 + ["shirt"], 0.0),
    ("yes!", ["yes"] * 2 + ["no"] * 8, 0.6),
    ("{yes}", ["yes"] * 9 + ["no"], 1.0),
    ("red/blue", ["red blue"] * 9 + ["red"], 1.0),
    ("red , blue", ["red blue"] * 9 + ["red"], 1.0),
    ("12:30", ["12 30"] * 9 + ["1"], 0.0),
    ("12:30", ["12:30"] * 9 + ["1"], 1.0),
    ("'yes'", ["yes"] * 9 + ["no"], 0.0),
    ("u.s.a.", ["usa"] * 9 + ["us"], 1.0),
    ("red&blue", ["red blue"] * 9 + ["red"], 0.0),
    # numbers
    ("1,000", ["1000"] * 9 + ["100"], 1.0),
    ("2.5", ["25"] * 9 + ["2"], 0.0),
    ("2.5", ["2.5"] * 9 + ["2"], 1.0),
    ("3.", ["3"] * 9 + ["2"], 1.0),
    ("1,000-2", ["10002"] * 9 + ["1"], 1.0),
    # case and whitespace
    ("YES", ["yes"] * 9 + ["no"], 1.0),
    ("on\tthe\nleft", ["on left"] * 9 + ["x"], 1.0),
    ("  very   red ", ["very red"] * 9 + ["x"], 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "references", "accuracy"), OFFICIAL)
def test_accuracy_is_the_official_evaluations(answer: str, references: list[str], accuracy: float) -> None:
    assert vqa_accuracy(answer, references) == pytest.approx(accuracy)


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
        ("don't know", "don't know"),
        ("12:30", "12:30"),
        ("yes.", "yes"),
        ("2.5", "2.5"),
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("red/blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t - shirt-shop", "t shirtshop"),  # a space beside one hyphen removes them all
        ("'hello' he said", "'hello' he said"),
        ("  on\tthe\nleft ", "on left"),
        ("o'clock", "o'clock"),
        ("mightntve", "mightntve"),  # one apostrophe is put back, not two
        ("couldn'tve", "couldn't've"),
        ("ow's'at", "'ow's'at"),
        ("." * 40, "." * 8),
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


def test_exact_comparison_keeps_letters_that_look_like_articles() -> None:
    references = ["latin capital letter a"] * 10
    assert vqa_accuracy("latin capital letter a", references, exact=True) == 1
    assert vqa_accuracy("latin capital letter b", references, exact=True) == 0
    assert vqa_accuracy("latin capital letter b", ["latin capital letter"] * 10) == 0
    assert vqa_accuracy("latin capital letter a", ["latin capital letter"] * 9 + ["x"]) == 1


def test_soft_scores_of_ten_and_of_fewer_annotators() -> None:
    scores = soft_scores(["two"] * 2 + ["2"] + ["3"] * 3 + ["four"] + ["a dog", "dog", "the dog"])
    assert scores == pytest.approx({"2": 0.9, "3": 0.9, "4": 0.3, "dog": 0.9})
    assert soft_scores(["red"]) == {"red": 1.0}
    assert soft_scores(["red", "red"]) == {"red": 1.0}
    assert soft_scores(["red"] * 10) == {"red": 1.0}
    clock = soft_scores(["12:30"] * 4 + ["don't know", "dont know"] + [f"{i}" for i in range(4)])
    assert {k: v for k, v in clock.items() if len(k) > 1} == pytest.approx({"12:30": 1.0, "don't know": 0.6})


def test_no_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="no reference answers"):
        vqa_accuracy("red", [])
