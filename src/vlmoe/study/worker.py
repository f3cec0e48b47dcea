"""One job of a study, in a process of its own with one thread.

Its folder holds job.json, {"kind": ..., ...}; the job leaves result.json there when it is complete. Kinds: tokenizers
(of a seed, shared by its runs), measure (time and memory of a step), duplicates (of held-out samples in training),
train (pre-train, then held-out scores), finetune.
Exit codes: 0 done, 1 failed (failed.json says why), 128 + signal stopped, to go on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmoe.config import Recipe, UserError, from_mapping, load_finetune, read_json
from vlmoe.data.batch import Batch
from vlmoe.data.duplicates import seen_in_training
from vlmoe.data.loader import held_out, held_out_size
from vlmoe.data.sources import held_out_splits
from vlmoe.data.workers import STOP_SIGNALS
from vlmoe.evaluate.downstream import evaluate_task
from vlmoe.evaluate.masked import losses, text_scores, words_right
from vlmoe.evaluate.names import asked_classes, name_scores
from vlmoe.model.device import pick_device
from vlmoe.study.measure import measure_step
from vlmoe.tasks.export import Pretrained, load_pretrained
from vlmoe.train.branch import began_at
from vlmoe.train.finetune import finetune
from vlmoe.train.pretrain import prepare_text_tokenizer, prepare_visual_tokenizer, pretrain
from vlmoe.train.runlog import EVENTS, METRICS, read_lines, replace_text

JOB, RESULT, FAILED, LOG = "job.json", "result.json", "failed.json", "log.txt"
SPLIT = "val"  # known things in known drawings, new scenes: recall
NEW = ("drawing", "font", "unseen")  # what training never shows: drawings of known things, things
WORD_VIEWS = ("seen", "blind")  # with the image and without


def do(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], int | None]:
    """Returns the result and the signal that stopped the job, or None when it is complete."""
    if job["kind"] == "finetune":
        return _finetune(job, folder)
    recipe = from_mapping(job["recipe"], origin=str(folder / JOB))
    if job["kind"] == "train":
        return _train(recipe, folder)
    if job["kind"] == "duplicates":
        return seen_in_training(recipe, splits_of(recipe), recipe.eval.samples, job["steps"]), None
    console = Console()
    device = pick_device(recipe.train.device)
    tokenizers = Path(job.get("tokenizers", folder))
    text = prepare_text_tokenizer(recipe, tokenizers, console)
    visual = prepare_visual_tokenizer(recipe, text, tokenizers, device, console)
    if job["kind"] == "tokenizers":
        return {"text": text.size}, None
    return asdict(measure_step(recipe, text, visual, job["steps"])), None


def _train(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], int | None]:
    done = pretrain(recipe)
    if done.stopped_by is not None:
        return {}, done.stopped_by
    records = read_lines(folder / METRICS)
    # After a roll-back the steps since the checkpoint are done once more, on other data; they cost all the same.
    repeated = sum(e["step"] - e["to"] for e in read_lines(folder / EVENTS) if e["event"] == "rolled back")
    began = time.perf_counter()
    scores = held_out_scores(load_pretrained(folder, pick_device(recipe.train.device)), recipe)
    return {
        "evaluation_seconds": time.perf_counter() - began,
        "seconds": records[-1]["seconds"],
        "launch_seconds": done.seconds,
        "began_at": began_at(folder),
        "wait_share": sum(r["wait_share"] for r in records) / len(records),
        "repeated": repeated,
        **scores,
    }, None


def _finetune(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], int | None]:
    start = load_pretrained(job["init"])
    recipe = load_finetune(
        job["task"], job["recipe"], start.recipe, job["init"], [*job["overrides"], f"run.dir={folder}"]
    )
    done = finetune(recipe)
    if done.stopped_by is not None:
        return {}, done.stopped_by
    report = evaluate_task(folder)
    main, first = report["main"], next(iter(report["splits"].values()))
    return {"task": job["task"], "metric": main, "score": first["scores"][main]["value"]}, None


def held_out_scores(trained: Pretrained, recipe: Recipe) -> dict[str, float]:
    """loss (hidden words + hidden patches, nats), each of them, accuracy on hidden words with and without the image, in
    all and by word class where the data knows it ("seen:name", "blind:name"); of pairs, or else of the kind that the
    run trains on. Where it trains on texts beside pairs: loss_texts, of their hidden words, and "text:name". Of pairs
    in every split of `splits_of`: "drawing:loss", and where names are known the share of whole ones told rightly with
    the image and without ("drawing:names", "drawing:names_blind")."""
    kind = next(k for k in ("pair", "image", "text") if getattr(recipe.data.batch, k))
    device = pick_device(recipe.train.device)

    def batches(kind: str = kind, factors: bool = False, split: str = SPLIT) -> Iterable[Batch]:
        count = min(recipe.eval.samples, held_out_size(recipe, split, kind))
        for start in range(0, count, recipe.eval.batch):
            size = min(recipe.eval.batch, count - start)
            yield held_out(recipe, trained.text_tokenizer, split, kind, start, size, factors).to(device)

    found = losses(trained.model, batches())
    scores = {"loss": found["sum"]}
    scores |= {name: found[key] for key, name in (("mlm", "loss_words"), ("mim", "loss_patches")) if key in found}
    if kind == "pair":
        text = text_scores(trained.model, batches(factors=True))
        scores |= {"accuracy_words": text["seen"]["accuracy"], "accuracy_blind": text["blind"]["accuracy"]}
        scores |= {f"{view}:{word}": by[view] for view in WORD_VIEWS for word, by in text["by_word_class"].items()}
        asked = asked_classes(recipe.data.masking)
        for split in splits_of(recipe):
            apart = list(batches("pair", True, split))
            scores[f"{split}:loss"] = scores["loss"] if split == SPLIT else losses(trained.model, apart)["sum"]
            if names := name_scores(trained.model, apart, trained.text_tokenizer.mask_id, asked):
                scores[f"{split}:names"] = names["seen"]["accuracy"]
                scores[f"{split}:names_blind"] = names["blind"]["accuracy"]
        if recipe.data.batch.text:
            texts = list(batches("text", factors=True))
            scores["loss_texts"] = losses(trained.model, texts)["mlm"]
            known = words_right(trained.model, texts)
            scores |= {f"text:{word}": share for word, share in known.items()}
    return scores


def splits_of(recipe: Recipe) -> list[str]:
    """Those in which a run is scored: `SPLIT` and, of `NEW`, what its data offers."""
    offered = held_out_splits(recipe, "pair")
    return [split for split in (SPLIT, *NEW) if split in offered]


def main(folder: Path) -> None:
    """Do the folder's job; output goes to its log. Ends the process."""
    began = time.perf_counter()
    os.setsid()  # Ctrl-C reaches the study alone, which tells its jobs
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # held in the server it was forked from
    with (folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["COLUMNS"] = "160"
    torch.set_num_threads(1)
    try:
        result, stopped_by = do(read_json(folder / JOB, nan=True), folder)
    except Exception as error:  # a failed run is a result of the study, whatever it died of
        traceback.print_exc()
        text = str(error).splitlines()[0] if str(error) else ""
        text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        replace_text(folder / FAILED, json.dumps({"error": text}))
        sys.exit(1)
    if stopped_by is not None:
        sys.exit(128 + stopped_by)
    result |= {"process_seconds": time.perf_counter() - began, "resident_bytes": resident()}
    replace_text(folder / RESULT, json.dumps(result, indent=1))


def resident() -> int:
    """Largest resident set of this process so far, bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
