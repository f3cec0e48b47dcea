"""A trained model as plain files, and back: weights as safetensors, the recipe as JSON, the tokenizers beside.

A pre-trained and a fine-tuned model are kept alike; of the latter, config.json also holds the labels it answers with.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlmoe.config import FinetuneRecipe, Recipe, UserError, from_mapping, read_json, to_mapping
from vlmoe.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from vlmoe.data.visual_tokenizer import StoredCodes, VisualTokenizer, VQTokenizer
from vlmoe.tasks.base import Task
from vlmoe.tasks.downstream import Downstream
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.tasks.registry import build_task

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class ModelFileError(UserError):
    """A model folder that cannot be loaded; the message names the file and what was expected."""


@dataclass
class Pretrained:
    """What `vlmoe.load` returns of a pre-trained run: the model in evaluation mode, its tokenizers and its recipe."""

    model: MaskedDataModelling
    text_tokenizer: TextTokenizer
    visual_tokenizer: VisualTokenizer
    recipe: Recipe
    path: Path


@dataclass
class Finetuned:
    """What `vlmoe.load` returns of a fine-tuned run; labels: what the model answers with, empty where it has none."""

    model: Downstream
    text_tokenizer: TextTokenizer
    recipe: FinetuneRecipe
    labels: tuple[str, ...]
    path: Path


def export(
    model: Task, recipe: Recipe | FinetuneRecipe, tokenizers: Path, folder: Path, labels: tuple[str, ...] = ()
) -> None:
    """Write a model folder: weights, config.json, a copy of the tokenizers' files. It appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(tokenizers, temporary)
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        about = {"format": 1, "recipe": to_mapping(recipe)}
        if isinstance(recipe, FinetuneRecipe):
            about |= {"task": recipe.task, "labels": list(labels)}
        (temporary / CONFIG).write_text(json.dumps(about, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | Path, device: str | torch.device = "cpu") -> Pretrained | Finetuned:
    """Restore a model from a run's folder or from the model folder inside it.

    Raises ModelFileError naming the file that is missing, unreadable or does not fit its config.json.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
        folder = folder / "model"
    config = folder / CONFIG
    if not config.is_file():
        raise ModelFileError(f"{path}: no {CONFIG} here nor in {Path(path) / 'model'}: is the run finished?")
    try:
        about = read_json(config)
        if "task" in about:
            recipe = from_mapping(about["recipe"], origin=str(config), schema=FinetuneRecipe)
            return _load_finetuned(folder, recipe, tuple(map(str, about["labels"])), torch.device(device))
        return _load_pretrained(folder, from_mapping(about["recipe"], origin=str(config)), torch.device(device))
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{config}: not a model's config.json ({error!r})") from None
    except UserError as error:
        raise ModelFileError(str(error)) from None


def is_finetuned(path: str | Path) -> bool:
    """Whether a run's folder, or a model folder, holds a fine-tuned model; False where there is none."""
    for config in (Path(path) / CONFIG, Path(path) / "model" / CONFIG):
        if config.is_file():
            try:
                return "task" in read_json(config)
            except UserError:
                return False
    return False


def load_pretrained(path: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """`load`, for a pre-trained run. Raises ModelFileError for any other."""
    found = load(path, device)
    if not isinstance(found, Pretrained):
        raise ModelFileError(f"{path}: is fine-tuned for {found.recipe.task}, expected a pre-trained run")
    return found


def load_finetuned(path: str | Path, task: str | None, device: str | torch.device = "cpu") -> Finetuned:
    """`load`, for a run fine-tuned for `task` (None: any). Raises ModelFileError for any other."""
    found = load(path, device)
    if not isinstance(found, Finetuned):
        wanted = task or "TASK"
        raise ModelFileError(
            f"{path}: is pre-trained only, and answers no {task or 'task'} yet: "
            f"vlmoe finetune {wanted} RECIPE --init {path} makes a run that does"
        )
    if task is not None and found.recipe.task != task:
        raise ModelFileError(f"{path}: is fine-tuned for {found.recipe.task}, not for {task}")
    return found


def _load_pretrained(folder: Path, recipe: Recipe, device: torch.device) -> Pretrained:
    visual = load_visual_tokenizer(folder, recipe)
    model = MaskedDataModelling(recipe.model, visual)
    _load_weights(model, folder, device)
    model.prepare(device)
    return Pretrained(model, load_text_tokenizer(folder), visual, recipe, folder)


def _load_finetuned(folder: Path, recipe: FinetuneRecipe, labels: tuple[str, ...], device: torch.device) -> Finetuned:
    tokenizer = load_text_tokenizer(folder)
    model = build_task(recipe, labels, tokenizer)
    _load_weights(model, folder, device)
    return Finetuned(model, tokenizer, recipe, labels, folder)


def _load_weights(model: Task, folder: Path, device: torch.device) -> None:
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        raise ModelFileError(f"{folder / WEIGHTS}: missing") from None
    except (SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {error}") from None
    model.to(device).eval()


def load_visual_tokenizer(folder: Path, recipe: Recipe) -> VisualTokenizer:
    """The tokenizer that a recipe names, its files (if it has any) read from `folder`."""
    if recipe.data.visual_tokenizer.type == "codes":
        return StoredCodes(recipe.model.codes)
    tokenizer = VQTokenizer.load(folder)
    m = recipe.model
    got, wanted = (tokenizer.image_size, tokenizer.patch, tokenizer.codes), (m.image_size, m.patch, m.codes)
    if got != wanted:
        raise ModelFileError(
            f"visual tokenizer in {folder}: image size, patch and codes are {got}, the recipe's model has {wanted}"
        )
    return tokenizer
