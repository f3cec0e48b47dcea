"""Whole names by hand, on a model whose answers are known."""

from dataclasses import replace

from tests.evaluate.test_masked import MASK, batch, reader
from vlmoe.data.batch import IGNORE
from vlmoe.evaluate.names import hide_names, name_scores


def test_a_name_is_right_when_every_word_of_it_is() -> None:
    named = batch()
    named.token_factors[2] = {"word_class": ["", "kind", "name", ""]}  # "6 2", of which the model says "6 6"
    scores = name_scores(reader(), [named], MASK)
    assert scores is not None
    assert scores["seen"]["accuracy"] == 2 / 3
    assert scores["seen"]["predictions"] == 3
    assert scores["blind"]["accuracy"] == scores["swapped"]["accuracy"] == 0
    assert (scores["names"], scores["chance"]) == (3, 1 / 3)
    assert name_scores(reader(), [named, named], MASK)["names"] == 3  # type: ignore[index]


def test_the_name_of_the_first_thing_is_hidden_and_nothing_else() -> None:
    two = batch()
    for b in range(3):
        two.token_factors[b] = {"word_class": ["name", "colour", "kind", "name"], "object": ["2", "2", "1", "1"]}
    two.token_factors[1] = {"word_class": ["colour"] * 4}
    hidden = hide_names(two, MASK)
    assert hidden is not None and hidden.text_BT is not None and hidden.target_BT is not None
    assert hidden.keys == ["a", "c"]
    assert hidden.text_BT.tolist() == [[MASK, 4, 7, 7], [MASK, 6, 2, 7]]  # what was hidden in training is shown
    assert hidden.target_BT.tolist() == [[7, IGNORE, IGNORE, IGNORE]] * 2
    assert hidden.image_BCHW is not None and hidden.image_BCHW[:, 0, 0, 0].tolist() == [4, 6]


def test_data_that_does_not_know_its_names_has_no_score() -> None:
    unknown: tuple[list[dict[str, list[str]]], ...] = ([], [{}] * 3, [{"word_class": ["colour"] * 4}] * 3)
    for factors in unknown:
        assert name_scores(reader(), [replace(batch(), token_factors=factors)], MASK) is None
