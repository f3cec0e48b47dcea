"""A trained model as plain files, and back: weights as safetensors, the recipe as JSON, the tokenizers beside.

A pre-trained and a fine-tuned model are kept alike; of the latter, config.json also holds the labels it answers with.
config.json lists size and SHA-256 of every other file of the folder and has a digest of itself; `load` checks them all.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlmoe.config import (
    AlteredError,
    FinetuneRecipe,
    Recipe,
    RecipeError,
    UserError,
    check_files,
    from_mapping,
    home,
    read_json,
    read_sealed,
    to_mapping,
    write_sealed,
)
from vlmoe.data.tensors import save_tensors
from vlmoe.data.text_tokenizer import DESCRIPTION, FILES, TextTokenizer, load_text_tokenizer
from vlmoe.data.visual_tokenizer import StoredCodes, VisualTokenizer, VQTokenizer
from vlmoe.tasks.base import Task
from vlmoe.tasks.downstream import Downstream
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.tasks.registry import build_task

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT, UNSEALED = 2, 1


class ModelFileError(UserError):
    """A model folder that cannot be loaded; the message names the file and what was expected."""


@dataclass
class Pretrained:
    """What `vlmoe.load` returns of a pre-trained run: the model in evaluation mode, its tokenizers and its recipe.

    visual_tokenizer: None where the run saw no images. The text tokenizer of a run that saw no texts, and was given
    none, knows special tokens alone."""

    model: MaskedDataModelling
    text_tokenizer: TextTokenizer
    visual_tokenizer: VisualTokenizer | None
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
        save_tensors(weights, temporary / WEIGHTS)
        about = {"format": FORMAT, "recipe": to_mapping(recipe)}
        if isinstance(recipe, FinetuneRecipe):
            about |= {"task": recipe.task, "labels": list(labels)}
        write_sealed(temporary / CONFIG, about, [p.name for p in temporary.iterdir()])
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | Path, device: str | torch.device = "cpu") -> Pretrained | Finetuned:
    """Restore a model from a run's folder or from the model folder inside it.

    Raises ModelFileError naming the file that is missing, altered, unreadable or does not fit its config.json.
    """
    folder = model_folder(Path(home(str(path))))
    config = folder / CONFIG
    try:
        about = read_sealed(config, older=UNSEALED)
        if about["format"] not in (FORMAT, UNSEALED):
            raise ModelFileError(f"{config}: format {about['format']!r}, this version reads {FORMAT}")
        if about["format"] == FORMAT:
            check_files(config, about, [WEIGHTS, DESCRIPTION])
        if "task" in about:
            recipe = from_mapping(about["recipe"], origin=str(config), schema=FinetuneRecipe)
            return _load_finetuned(folder, recipe, tuple(map(str, about["labels"])), torch.device(device))
        return _load_pretrained(folder, from_mapping(about["recipe"], origin=str(config)), torch.device(device))
    except (OSError, KeyError, TypeError) as error:
        raise ModelFileError(f"{config}: not a model's config.json ({error!r})") from None
    except (AlteredError, RecipeError) as error:
        raise ModelFileError(str(error)) from None


def seal(path: str | Path) -> list[Path]:
    """Take the model and the tokenizers in a folder (a run's, a model's, or one of tokenizers) as they are: write their
    digests anew. Returns the files written. Raises ModelFileError: there are none, or one is no JSON object."""
    top, done = Path(home(str(path))), []
    if not top.exists():
        raise ModelFileError(f"{top}: no such folder")
    for folder in (top, top / "tokenizers", top / "model"):
        for name in (DESCRIPTION, "visual.json", CONFIG):  # the last one lists the others
            file = folder / name
            if not file.is_file():
                continue
            try:
                about = read_json(file, nan=True)
                if name == CONFIG:
                    about["format"] = FORMAT
                    files = [p.name for p in folder.iterdir() if p.name != CONFIG and p.is_file()]
                else:
                    files = ["visual.safetensors"] if name == "visual.json" else [FILES[about["type"]]]
                write_sealed(file, about, files)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelFileError(f"{file}: cannot be sealed ({error!r})") from None
            done.append(file)
    if not done:
        raise ModelFileError(f"{path}: no model and no tokenizer here, expected a run's folder or its model folder")
    return done


def is_finetuned(path: str | Path) -> bool:
    """Whether a run's folder, or a model folder, holds a fine-tuned model. Raises ModelFileError: there is none."""
    config = model_folder(Path(home(str(path)))) / CONFIG
    try:
        return "task" in read_sealed(config, older=UNSEALED)
    except (AlteredError, OSError) as error:
        raise ModelFileError(str(error)) from None


def model_folder(path: Path) -> Path:
    """The folder itself or the one named model in it. Raises ModelFileError: neither has a config.json."""
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    if not path.exists():
        raise ModelFileError(f"{path}: no such folder")
    raise ModelFileError(f"{path}: no {CONFIG} here nor in {path / 'model'}: is the run finished?")


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


def load_visual_tokenizer(folder: Path, recipe: Recipe) -> VisualTokenizer | None:
    """The tokenizer that a recipe names, its files (if it has any) read from `folder`; None where it predicts
    no patches."""
    if not recipe.predicts_patches:
        return None
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
