"""What a recipe names by its path is looked for before the run's folder is made: a slip leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

from vlmoe.config import FilesConfig, Recipe, TaskDataConfig, UserError
from vlmoe.data.sources import check_paths
from vlmoe.data.tokenizer_files import find_tokenizer
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.tasks.export import model_folder
from vlmoe.train.branch import kept_checkpoint


def check_given(recipe: Recipe, folder: Path) -> None:
    """Raises UserError where a file or folder that a pre-training names is not there: of a source, a tokenizer, the run
    to start from, the checkpoint to branch off from. folder: the run's; once it is there it may hold what was named."""
    if folder.exists():
        return
    if recipe.init:
        model_folder(Path(recipe.init))
    if recipe.branch_from:
        kept_checkpoint(recipe.branch_from)
    text, visual = recipe.data.text_tokenizer, recipe.data.visual_tokenizer
    if text.type != "corpus":
        find_tokenizer(text.type, text.path)
    if visual.path and recipe.predicts_patches:
        VQTokenizer.load(Path(visual.path))
    check_paths(recipe.data)


def check_given_files(data: TaskDataConfig) -> None:
    """Likewise for a task's files, those of splits that are opened only in the end among them."""
    for files in (data.train, *data.eval) if data.type == "files" else ():
        _check_files(files)


def _check_files(files: FilesConfig) -> None:
    for path in filter(None, (files.file, files.annotations, files.images)):
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder")
