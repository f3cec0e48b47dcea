"""Completions as people read them."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from vlmoe.data.text_tokenizer import TextTokenizer, train_byte_pairs, train_wordpiece
from vlmoe.data.words import parts_of_words
from vlmoe.evaluate.completions import Completion, Word, draw, guess_of

TEXTS = ["walk walked walking talk talked"] * 3


def test_a_part_of_a_word_stands_beside_the_rest() -> None:
    image = np.zeros((1, 1, 3), np.uint8)
    words = [Word("red", False), Word("walk", True, "walk", "talk"), Word("ing", False, joined=True)]
    item = Completion("k", image, image, None, words)
    lines = [item.line(view) for view in ("shown", "truth", "seen", "blind")]
    assert lines == ["red ____ing", "red walking", "red [walk]ing", "red [talk]ing"]


def test_the_sheet_says_whose_samples_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: titles.append(figure.get_suptitle()))
    image = np.zeros((1, 1, 3), np.uint8)
    draw([Completion("k", image, image, None, [Word("red", False)])], tmp_path / "sheet.png", "mine")
    assert titles[0].startswith("mine: held-out samples")


@pytest.mark.parametrize("tokenizer", [train_wordpiece(TEXTS, 60), train_byte_pairs(TEXTS, 512)])
def test_a_guess_that_only_looks_right_is_told_apart(tokenizer: TextTokenizer) -> None:
    """A letter that begins a word and the same one within a word are different tokens."""
    begins, within = tokenizer.encode("walk")[0][0], tokenizer.encode("walkk")[0][-1]
    assert (tokenizer.continues(begins), tokenizer.continues(within)) == (False, True)
    for truth, guess in ((begins, within), (within, begins)):
        (part,) = parts_of_words(tokenizer, [truth], [True])
        assert guess_of(tokenizer, truth, part) == tokenizer.piece([truth])
        wrong = guess_of(tokenizer, guess, part)
        assert wrong == ("-" if guess == within else " ") + tokenizer.piece([guess])
