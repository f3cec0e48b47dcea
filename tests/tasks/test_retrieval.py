"""Retrieval's scores where texts are equal, by hand, and the embedded world's ceiling."""

import pytest
import torch

from tests.tasks.world import built, recipe
from vlmoe.config import WorldConfig
from vlmoe.data.downstream.example import Example
from vlmoe.data.world.tasks.examples import WorldExamples
from vlmoe.tasks.retrieval import Embedded, Retrieval


@pytest.fixture(scope="module")
def task() -> Retrieval:
    found, _ = built(recipe("retrieval"))
    assert isinstance(found, Retrieval)
    return found


def oracle(examples: list[Example]) -> list[Embedded]:
    """Each text a direction of its own, each image the sum of its texts'."""
    number: dict[str, int] = {}
    for e in examples:
        for text in e.references:
            number.setdefault(" ".join(text.split()), len(number))
    answers = []
    for e in examples:
        text_CD = torch.eye(len(number))[[number[" ".join(text.split())] for text in e.references]]
        answers.append(Embedded(torch.nn.functional.normalize(text_CD.sum(0), dim=0), text_CD))
    return answers


def values(task: Retrieval, examples: list[Example], answers: list[Embedded] | None = None) -> dict[str, float]:
    return {k: s.value for k, s in task.score(answers or oracle(examples), examples).items()}


def test_two_images_with_one_caption_both_have_it_right(task: Retrieval) -> None:
    examples = [
        Example("a", references=("a red seven", "seven")),
        Example("b", references=("a  red\tseven ", "A red seven")),  # the first is equal once joined, the second is not
        Example("c", references=("a blue two",)),
    ]
    assert set(values(task, examples).values()) == {1.0}
    assert task.counts(examples) == {"captions": 5, "different texts": 4, "texts of more than one image": 1}
    scores = task.score(oracle(examples), examples)
    assert (scores["TR@1"].n, scores["IR@1"].n) == (3, 4)


def test_equal_texts_take_one_place_in_the_list(task: Retrieval) -> None:
    """Image x is nearest to "wrong", which five images have; its own text comes second, not sixth."""
    right, wrong = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    examples = [Example("x", references=("right",)), *(Example(f"{i}", references=("wrong",)) for i in range(5))]
    answers = [Embedded(wrong[0], right), *(Embedded(wrong[0], wrong) for _ in range(5))]
    found = values(task, examples, answers)
    assert found["TR@1"] == pytest.approx(5 / 6)
    assert found["TR@5"] == 1.0


def test_the_guess_is_a_random_orders(task: Retrieval) -> None:
    examples = [Example(f"{i}", references=("same", f"own {i}")) for i in range(4)]  # 5 texts, 2 right for each image
    guess = {k: s.value for k, s in task.guess(examples).items()}
    assert guess["TR@1"] == pytest.approx(2 / 5)
    assert guess["IR@1"] == pytest.approx((1 + 4 * 1 / 4) / 5)  # any image is right for "same"
    assert guess["TR@5"] == guess["IR@5"] == 1


def test_a_perfect_model_of_the_world_scores_all(task: Retrieval) -> None:
    """Of 400 images with two captions each some share one; an oracle that knows each image's texts is at 100%."""
    world = WorldExamples("retrieval", WorldConfig(concepts=20, max_objects=2, colours=6), "val")
    examples = [world.truth(i) for i in range(400)]
    assert task.counts(examples)["texts of more than one image"] > 0
    assert set(values(task, examples).values()) == {1.0}
