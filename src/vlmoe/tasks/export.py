"""A trained model as plain files, and back: weights as safetensors, the recipe as JSON, the tokenizers beside."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlmoe.config import Recipe, RecipeError, UserError, from_mapping, to_mapping
from vlmoe.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from vlmoe.data.visual_tokenizer import StoredCodes, VisualTokenizer, VQTokenizer
from vlmoe.tasks.pretrain import MaskedDataModelling

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class ModelFileError(UserError):
    """A model folder that cannot be loaded; the message names the file and what was expected."""


@dataclass
class Pretrained:
    """What `vlmoe.load` returns: the model in evaluation mode, its tokenizers and the recipe that made it."""

    model: MaskedDataModelling
    text_tokenizer: TextTokenizer
    visual_tokenizer: VisualTokenizer
    recipe: Recipe
    path: Path


def export(model: MaskedDataModelling, recipe: Recipe, tokenizers: Path, folder: Path) -> None:
    """Write a model folder: weights, config.json, a copy of the tokenizers' files. It appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(tokenizers, temporary)
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps({"format": 1, "recipe": to_mapping(recipe)}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | Path, device: str | torch.device = "cpu") -> Pretrained:
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
        recipe = from_mapping(json.loads(config.read_text())["recipe"], origin=str(config))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelFileError(f"{config}: not a model's config.json ({error!r})") from None
    except RecipeError as error:
        raise ModelFileError(str(error)) from None
    visual = load_visual_tokenizer(folder, recipe)
    model = MaskedDataModelling(recipe.model, visual)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        raise ModelFileError(f"{folder / WEIGHTS}: missing") from None
    except (SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {error}") from None
    target = torch.device(device)
    model.to(target).eval()
    model.prepare(target)
    return Pretrained(model, load_text_tokenizer(folder), visual, recipe, folder)


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
