"""The model that a kept checkpoint holds, while its run trains or after."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmoe.config import FinetuneRecipe, UserError, from_mapping
from vlmoe.data.downstream.loader import open_split
from vlmoe.data.text_tokenizer import load_text_tokenizer
from vlmoe.tasks.export import Finetuned, Pretrained, load_visual_tokenizer
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.tasks.registry import build_task
from vlmoe.train import checkpoint
from vlmoe.train.pretrain import TOKENIZERS
from vlmoe.train.runlog import CHECKPOINTS


def load_step(run: Path, step: int, device: torch.device) -> Pretrained | Finetuned:
    """The model after `step` updates, in evaluation mode, as `vlmoe.load` gives the one at the end.

    Of a fine-tuned run these are that step's weights, not the best ones.

    Raises UserError: the run has no such checkpoint (the message lists those it has), or it is damaged.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    folder = run / CHECKPOINTS
    steps = checkpoint.steps_in(folder)
    if step not in steps:
        kept = f"kept are {', '.join(map(str, steps))}" if steps else "none are kept"
        raise UserError(f"{folder}: no checkpoint of step {step}: {kept}")
    path, tokenizers = folder / f"step-{step}", run / TOKENIZERS
    origin, mapping = str(path / checkpoint.STATE), checkpoint.read_state(path).recipe
    words = load_text_tokenizer(tokenizers)
    if "task" in mapping:
        recipe = from_mapping(mapping, origin=origin, schema=FinetuneRecipe)
        labels = open_split(recipe, "train").labels
        task = build_task(recipe, labels, words)
        checkpoint.load_model(path, task)
        return Finetuned(task.to(device).eval(), words, recipe, labels, path)
    plan = from_mapping(mapping, origin=origin)
    visual = load_visual_tokenizer(tokenizers, plan)
    model = MaskedDataModelling(plan.model, visual)
    checkpoint.load_model(path, model)
    model.to(device).eval().prepare(device)
    return Pretrained(model, words, visual, plan, path)
