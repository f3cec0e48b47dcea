"""Pre-training from a recipe: tokenizers first, then the loop, then the weights as plain files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from vlmoe.config import Recipe
from vlmoe.data.loader import StepData
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer, load_text_tokenizer
from vlmoe.data.visual_tokenizer import StoredCodes, VisualTokenizer, VQTokenizer, train_vq
from vlmoe.model.sizes import describe
from vlmoe.tasks.export import export
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.loop import TrainResult, pick_device, train

TOKENIZERS = "tokenizers"


def pretrain(recipe: Recipe) -> TrainResult:
    """Run a recipe to its end, or on from its last checkpoint.

    Writes into run.dir: tokenizers/, checkpoints/, logs, plots and, at the end, model/ (see `vlmoe.load`).
    """
    console = Console()
    run_dir = Path(recipe.run.dir)
    console.print(describe(recipe.name, recipe.model), highlight=False)
    text_tokenizer = prepare_text_tokenizer(recipe, run_dir / TOKENIZERS, console)
    visual_tokenizer = prepare_visual_tokenizer(recipe, run_dir / TOKENIZERS, console)
    torch.manual_seed(recipe.seed)
    task = MaskedDataModelling(recipe.model, visual_tokenizer)
    data = StepData(recipe, text_tokenizer)
    result = train(recipe, task, data, run_dir)
    if result.stopped_by is None:
        export(task, recipe, run_dir / TOKENIZERS, run_dir / "model")
    return result


def prepare_text_tokenizer(recipe: Recipe, folder: Path, console: Console) -> TextTokenizer:
    """The run's text tokenizer: the one it already has, or the recipe's, made once and kept with the run."""
    ...


def prepare_visual_tokenizer(recipe: Recipe, folder: Path, console: Console) -> VisualTokenizer:
    """The run's visual tokenizer, trained on its own images where the recipe says so; made once and kept."""
    ...


def _images(recipe: Recipe) -> Iterator[Tensor]: ...
