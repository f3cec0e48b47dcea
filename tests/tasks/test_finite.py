"""Outputs that are no numbers are refused, by every task, and never count as right or wrong."""

import math
from typing import Any

import pytest
import torch

from tests.tasks.world import ask, built, recipe
from vlmoe.config import TASKS
from vlmoe.tasks.downstream import Classifier
from vlmoe.tasks.finite import NotFinite, first_choice


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", TASKS)
def test_answers_of_nan_or_infinity_are_counted_and_refused(name: str, value: float) -> None:
    plan = recipe(name, caption={"max_length": 4})
    task, words = built(plan)
    heads = {n: p for n, p in task.named_parameters() if not n.startswith("backbone.")}
    name_of = {"retrieval": "text_head.weight", "caption": "text_bias"}
    broken = heads[name_of.get(name, list(heads)[-1])]
    with torch.no_grad():
        broken.view(-1)[-1] = value
    with pytest.raises(NotFinite, match="7 of 7 answers are no numbers"):
        ask(task, plan, words, "val", 7, batch=3)


def test_one_bad_example_among_good_ones_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit that is not among the best, too: that of a class may be nan where others are numbers."""
    plan = recipe("nlvr2")
    task, words = built(plan)
    assert isinstance(task, Classifier)
    logits = task.logits

    def broken(batches: Any) -> Any:
        found_BL, outputs = logits(batches)
        found_BL[0, 1] = -math.inf
        return found_BL, outputs

    monkeypatch.setattr(task, "logits", broken)
    with pytest.raises(NotFinite, match="3 of 7 answers are no numbers"):
        ask(task, plan, words, "val", 7, batch=3)


def test_the_first_choice_of_rows() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert first_choice(logits, "words").tolist() == [1, 0]
    logits[1, 2] = math.nan
    with pytest.raises(NotFinite, match="1 of 2 words are no numbers"):
        first_choice(logits, "words")
