"""The six tasks: each can learn, nothing depends on how examples are batched, and what is frozen stays."""

import math
from typing import Any

import pytest
import torch

from tests.tasks.world import ask, built, learn, recipe, tokenizer
from vlmoe.config import TASKS, RecipeError
from vlmoe.data.downstream.loader import EvalData, open_split
from vlmoe.data.world.tasks.examples import CAPTIONS
from vlmoe.moe import Experts, Router
from vlmoe.tasks.caption import Caption, Written
from vlmoe.tasks.downstream import Guess
from vlmoe.tasks.registry import collate_of
from vlmoe.train.optim import make_optimizer

STEPS = {"vqa": 400, "nlvr2": 120, "retrieval": 200, "classify": 120, "nli": 120, "caption": 800}


@pytest.mark.parametrize("name", TASKS)
def test_64_examples_are_learned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head, label or loss that is wired wrongly cannot do this. A captioner learns one caption an image."""
    tokenizer(name)  # of all captions, as the other tests have it
    monkeypatch.setitem(CAPTIONS, "caption", 1)
    rates = {"patch_lr": 1.0} | ({"lr": 3e-3} if name == "caption" else {})  # by heart, and soon: details of few images
    plan = recipe(name, train=rates, data={"batch": 16 if name == "caption" else 32})
    task, words = learn(plan, STEPS[name])
    result = ask(task, plan, words, "train", 64)
    if name == "caption":
        right = [a.texts[0].replace(" ", "") in {r.replace(" ", "") for r in e.references}
                 for a, e in zip(result.answers, result.examples, strict=True)]  # fmt: skip
        assert sum(right) / len(right) >= 0.98
    elif name == "retrieval":
        scores = result.scores(task)
        assert min(scores["TR@1"].value, scores["IR@1"].value) >= 0.98
    else:
        assert result.scores(task)["accuracy"].value >= 0.98


@pytest.mark.parametrize("name", TASKS)
def test_scores_do_not_depend_on_batches_or_workers(name: str) -> None:
    plan = recipe(name, caption={"max_length": 6})
    task, words = built(plan)
    task.eval()
    wanted = ask(task, plan, words, "val", 13, batch=13).scores(task)
    assert wanted
    for batch, workers in ((1, 0), (5, 0), (5, 2)):
        found = ask(task, plan, words, "val", 13, batch=batch, workers=workers).scores(task)
        assert {k: v.as_dict() for k, v in found.items()} == {k: v.as_dict() for k, v in wanted.items()}


def test_another_examples_part_comes_from_half_the_split_away_whatever_the_batch() -> None:
    plan = recipe("vqa")
    task, words = built(plan)
    examples = open_split(plan, "val")
    for batch in (2, 5):
        data = EvalData(examples, collate_of(plan, task.labels, words), 5, batch, "image")
        found = torch.cat([data[n].batches["pair"].image_BCHW for n in range(len(data))])  # type: ignore[misc]
        wanted = [torch.from_numpy(examples[(i + 2) % 5].images[0]).permute(2, 0, 1) for i in range(5)]
        assert torch.equal(found, torch.stack(wanted))


# -------------------------------------------------------------------------------------------------------------- sparse
@pytest.mark.parametrize("policy", ["all", "freeze_routers", "freeze_experts", "experts_only"])
def test_what_a_policy_freezes_stays_and_the_rest_moves(policy: str) -> None:
    plan = recipe("nli", sparse={"train": policy})  # in the top block pairs go through the VL-FFN and meet no expert
    before, _ = built(plan)
    after, _ = learn(plan, 3)
    old = before.state_dict()
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}
    routers = {f"{n}.{p}" for n, m in after.named_modules() if isinstance(m, Router) for p, _ in m.named_parameters()}
    experts = {f"{n}.{p}" for n, m in after.named_modules() if isinstance(m, Experts) for p, _ in m.named_parameters()}
    heads = {n for n in old if not n.startswith("backbone.")}
    used = "backbone.blocks.1.attention.qkv.layer.weight"
    assert heads <= moved
    assert bool(moved & routers) == (policy in {"all", "freeze_experts"})
    assert bool(moved & experts) == (policy != "freeze_experts")
    assert (used in moved) == (policy != "experts_only")


def test_routing_losses_can_be_left_out() -> None:
    losses = []
    for keep in (True, False):
        plan = recipe("nli", sparse={"losses": keep})
        task, words = built(plan)
        task.eval()
        data = EvalData(open_split(plan, "val"), collate_of(plan, task.labels, words), 8, 8)
        output = task(data[0].batches)
        losses.append(float(output.loss.detach() - output.metrics["nli/loss"]))
    assert losses[0] > 1e-4
    assert losses[1] == 0


def test_learning_rates_fall_from_the_head_down() -> None:
    plan = recipe("vqa", train={"layer_decay": 0.5, "head_lr": 20.0, "weight_decay": 0.1})
    task, _ = built(plan)
    optimizer = make_optimizer(task, plan.train)
    scale = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in task.named_parameters() if p is parameter)
            scale[name] = (group["lr_scale"], group["weight_decay"])
    assert len(scale) == len(list(task.parameters()))
    assert scale["head.0.weight"] == (20.0, 0.1)
    assert scale["head.0.bias"] == (20.0, 0.0)
    assert scale["backbone.blocks.1.attention.qkv.layer.weight"] == (1.0, 0.1)
    assert scale["backbone.blocks.0.attention.qkv.layer.weight"] == (0.5, 0.1)
    assert scale["backbone.text.tokens.weight"] == (0.25, 0.1)
    assert scale["backbone.image.position"] == (0.25, 0.0)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("vqa", {"data": {"blind": "premise"}}, ["data.blind", "image or none or text"]),
        ("classify", {"data": {"blind": "image"}}, ["data.blind", "none for classify"]),
        ("nli", {"sparse": {"train": "routers"}}, ["sparse.train", "freeze_routers"]),
        ("caption", {"caption": {"max_length": 99}}, ["caption.max_length", "46"]),
        ("vqa", {"train": {"layer_decay": 1.5}}, ["train.layer_decay"]),
    ],
)
def test_impossible_values_are_named(name: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(name, **changes)
    assert all(word in str(error.value) for word in words)


# ------------------------------------------------------------------------------------------------------------ captions
class Scripted(Caption):
    """A captioner whose next-token probabilities are a table: tokens so far -> {token: probability}."""

    table: dict[tuple[int, ...], dict[int, float]]

    def _next(self, batch: Any, rows: list[tuple[int, float, list[int]]]) -> torch.Tensor:
        log_RV = torch.full((len(rows), 512), -math.inf)
        for r, (_, _, tokens) in enumerate(rows):
            for token, p in self.table[tuple(tokens)].items():
                log_RV[r, token] = math.log(p)
        return log_RV


def scripted(**caption: Any) -> tuple[Scripted, dict[str, int]]:
    plan = recipe("caption", caption=caption)
    _, words = built(plan)
    task = Scripted(plan, ())
    task.tokenizer = words
    ids = {w: words.encode(w)[0][0] for w in ("a", "red", "large", "digit")}
    return task, ids | {"end": words.end_id}


def written(task: Scripted) -> Written:
    from vlmoe.data.batch import Batch

    return task.predict({"image": Batch(keys=["x"])})[0]


def test_a_beam_finds_what_greedy_search_misses() -> None:
    """Greedy takes "a" (0.6) and ends at 0.6 * 0.4; "red" (0.4) goes on with certainty."""
    for beam, best, p in ((1, "a red", 0.24), (2, "red digit", 0.4)):
        task, w = scripted(beam=beam, length_penalty=0.0)
        task.table = {
            (): {w["a"]: 0.6, w["red"]: 0.4},
            (w["a"],): {w["red"]: 0.4, w["large"]: 0.3, w["digit"]: 0.3},
            (w["red"],): {w["digit"]: 1.0},
            **{(w["a"], w[x]): {w["end"]: 1.0} for x in ("red", "large", "digit")},
            (w["red"], w["digit"]): {w["end"]: 1.0},
        }
        found = written(task)
        assert found.texts[0] == best
        assert found.probabilities[0] == pytest.approx(p)


def test_the_length_penalty_and_the_limits() -> None:
    table = lambda w: {  # noqa: E731
        (): {w["end"]: 0.5, w["a"]: 0.5},
        (w["a"],): {w["end"]: 0.1, w["red"]: 0.9},
        (w["a"], w["red"]): {w["end"]: 1.0},
    }
    for options, best in (
        ({"min_length": 0, "length_penalty": 0.0}, ""),
        ({"min_length": 1, "length_penalty": 0.0}, "a red"),
        ({"min_length": 0, "length_penalty": 3.0}, "a red"),  # 0.45 at length 2 beats 0.5 at length 0
        ({"min_length": 1, "max_length": 1, "length_penalty": 0.0}, "a"),
    ):
        task, w = scripted(beam=2, **options)
        task.table = table(w)
        assert written(task).texts[0] == best, options


def test_only_what_stands_before_a_token_decides_it() -> None:
    """Changing a later token of a caption leaves the features of earlier ones, and of the image, as they are."""
    plan = recipe("caption")
    task, words = built(plan)
    task.eval()
    data = EvalData(open_split(plan, "val"), collate_of(plan, (), words), 2, 2)
    batch = data[0].batches["image"]
    ids = torch.randint(10, 30, (2, 8))
    other = ids.clone()
    other[:, 5:] = 40
    features = []
    for text_BT in (ids, other):
        batch.text_BT, batch.valid_BT = text_BT, torch.ones_like(text_BT, dtype=torch.bool)
        features.append(task.run(batch, causal="text"))
    a, b = features
    assert torch.allclose(a.features("text")[:, :5], b.features("text")[:, :5], atol=1e-5)
    assert torch.allclose(a.features("vision"), b.features("vision"), atol=1e-5)
    assert not torch.allclose(a.features("text")[:, 5:], b.features("text")[:, 5:], atol=1e-3)


def test_a_guess_is_shown_in_words() -> None:
    task, _ = built(recipe("nli"))
    shown = task.show(Guess([2, 0], [0.7, 0.2]))
    assert shown == [{"answer": "contradiction", "probability": 0.7}, {"answer": "entailment", "probability": 0.2}]
