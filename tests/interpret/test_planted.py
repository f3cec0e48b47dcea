"""Known experts own known factors: all of them must be found, and nothing else."""

import numpy as np
import pytest

from vlmoe.interpret.planted import build, validate


@pytest.mark.parametrize(("mode", "k"), [("reroute", 1), ("silence", 1), ("reroute", 2)])
def test_all_planted_causes_are_found_and_nothing_else(mode: str, k: int) -> None:
    report = validate(seeds=(0, 1), mode=mode, k=k)
    assert report["planted"] == 18 and report["comparisons"] > 500
    assert report["recovered"] == report["planted"], report["missed"]
    assert not report["missed"] and not report["extra"]
    assert report["decoys_found"] == report["decoys"] == 6
    assert report["unseen_found"] == report["unseen"] == 2


def test_the_planted_model_answers_by_its_experts() -> None:
    planted = build(3, samples=32)
    subject, batch = planted.subject, planted.batches[0]
    table, loss_R = subject.tokens(batch), subject.losses(batch)
    assert np.nanmean(loss_R) < 0.3
    layer = subject.trained.model.backbone.routed_layers()["1/text"]
    owner = next(e for site, e, _, value in planted.causes if (site, value) == ("1/text", "class 0"))
    layer.experts.w2.data[owner] = 0
    after_R = subject.losses(batch)
    mine_R = (table.factors["class"] == "class 0") & np.isfinite(loss_R)
    assert (after_R - loss_R)[mine_R].min() > 1
    np.testing.assert_array_equal(after_R[~mine_R], loss_R[~mine_R])


def test_seeds_plant_differently() -> None:
    assert build(0, samples=32).causes != build(1, samples=32).causes
    assert build(0, samples=32).causes == build(0, samples=32).causes


def test_without_samples_enough_nothing_is_claimed() -> None:
    report = validate(seeds=(0,), samples=8)
    assert report["recovered"] == 0 and not report["extra"]
