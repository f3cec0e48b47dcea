"""Held-out losses while a pre-training run trains: by sample, with intervals, without a trace in the run."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.train.toy import ToyData, toy_recipe, toy_task
from vlmoe.config import Recipe, from_mapping
from vlmoe.data.loader import StepData, held_out
from vlmoe.data.text_tokenizer import build_text_tokenizer
from vlmoe.data.visual_tokenizer import StoredCodes
from vlmoe.metrics import Score
from vlmoe.tasks.base import Task
from vlmoe.tasks.held_out import held_out_losses, too_wide
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.judge import Judged, Validation
from vlmoe.train.loop import train
from vlmoe.train.pretrain import pretrain
from vlmoe.train.runlog import EVENTS, read_lines

pytestmark = pytest.mark.usefixtures("no_plots")
SMALL = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch": 8, "max_text": 12, "vocabulary": 128,
         "codes": 8, "vl_ffn": 0}  # fmt: skip


def texts(folder: Path, validation: int, **more: Any) -> Recipe:
    for name, count in (("train", 60), ("val", validation)):
        words = ("red", "blue", "small", "large")
        lines = [f"a {words[i % 4]} {name} {words[(i // 4) % 4]}" for i in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    sources = [
        {"type": "folder", "kind": "text", "path": str(folder / f"{name}.txt"), "held_out": share}
        for name, share in (("train", 0), ("val", 1))
    ]
    return from_mapping(
        {
            "model": SMALL,
            "data": {"sources": sources, "batch": {"image": 0, "text": 4, "pair": 0}, "workers": 0},
            "train": {"steps": 3, "warmup": 1, "device": "cpu", "checkpoint_every": 10},
            **more,
        }
    )


def test_losses_by_sample_add_up_to_the_batch(tmp_path: Path) -> None:
    recipe = from_mapping(
        {
            "model": {**SMALL, "vocabulary": 2048},
            "data": {
                "world": {"image_size": 16, "grid": 1, "max_objects": 1},
                "batch": {"image": 0, "text": 0, "pair": 5},
                "text_tokenizer": {"samples": 20},
            },
        }
    )
    tokenizer = build_text_tokenizer(recipe)
    batch = held_out(recipe, tokenizer, "val", "pair", 0, 5)
    batch.codes_BP = torch.zeros(5, 4, dtype=torch.int64)
    task = MaskedDataModelling(recipe.model, StoredCodes(8)).eval()
    whole, by_sample = task.losses(batch), task.losses_by_sample(batch)
    assert set(whole) == set(by_sample) == {"mlm", "mim"}
    for name, (total_B, count_B) in by_sample.items():
        assert total_B.shape == count_B.shape == (5,)
        assert int(count_B.sum()) == whole[name].count
        torch.testing.assert_close(total_B.sum(), whole[name].total)
    alone = held_out(recipe, tokenizer, "val", "pair", 0, 1)
    alone.codes_BP = torch.zeros(1, 4, dtype=torch.int64)
    first = task.losses_by_sample(alone)["mlm"]
    torch.testing.assert_close(first[0][0], by_sample["mlm"][0][0], rtol=1e-4, atol=1e-4)
    scores = held_out_losses(task, [("pair", batch)])
    assert set(scores) == {"pair/mlm", "pair/mim"}
    score = scores["pair/mlm"]
    assert score.interval is not None
    assert score.interval[0] <= score.value <= score.interval[1]
    assert score.value == pytest.approx(whole["mlm"].mean.item(), rel=1e-5)


def test_what_is_too_wide() -> None:
    assert too_wide(Score(2.0, (1.99, 2.01), 29))
    assert too_wide(Score(2.0, (1.8, 2.2), 400))
    assert not too_wide(Score(2.0, (1.95, 2.05), 400))
    assert too_wide(Score(2.0, None, 400))


def test_a_run_is_scored_and_ends_as_if_it_were_not(tmp_path: Path) -> None:
    weights = []
    for every in (2, 0):
        folder = tmp_path / f"every-{every}"
        out = io.StringIO()
        recipe = texts(tmp_path, 4, run={"dir": str(folder)}, eval={"every": every, "samples": 8})
        pretrain(recipe, Console(file=out, width=200))
        weights.append((folder / "model" / "model.safetensors").read_bytes())
        events = [e for e in read_lines(folder / EVENTS) if e["event"] == "validation"]
        if not every:
            assert not events
            continue
        assert [e["step"] for e in events] == [2, 3]
        score = events[0]["parts"]["text/mlm"]
        assert score["n"] == 4  # the samples of its own file, all of them
        assert score["interval"][0] < score["value"] < score["interval"][1]
        warnings = [e["text"] for e in read_lines(folder / EVENTS) if e["event"] == "warning"]
        assert ["text/mlm on 4 samples" in w for w in warnings if "too few held-out samples" in w] == [True]
        assert not (folder / "best").exists()
    assert weights[0] == weights[1]


def test_training_reads_nothing_of_a_source_for_validation(tmp_path: Path) -> None:
    recipe = texts(tmp_path, 4)
    tokenizer = build_text_tokenizer(recipe)
    data = StepData(recipe, tokenizer)
    keys = [key for n in range(40) for key in data[n].batches["text"].keys]
    assert all(key.startswith("train.txt") for key in keys)
    assert len(set(keys)) == 60
    assert all(key.startswith("val.txt") for key in held_out(recipe, tokenizer, "val", "text", 0, 4).keys)


def test_a_validation_that_chooses_nothing_keeps_the_last_weights(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def score(task: Task) -> Judged:
        seen.append(task.hidden.weight.detach().clone())  # type: ignore[union-attr, operator]
        return Judged(-float(len(seen)), {"pair/mlm": Score(1.0, (0.5, 1.5), 3)}, "words", "too few")

    task = toy_task()
    train(toy_recipe(tmp_path), task, ToyData(), tmp_path, Validation(score, every=1, keep_best=False))
    assert torch.equal(task.hidden.weight, seen[-1])
    assert not (tmp_path / "best").exists()
    texts_of = [e["text"] for e in read_lines(tmp_path / EVENTS) if e["event"] == "warning"]
    assert texts_of.count("too few") == 1
