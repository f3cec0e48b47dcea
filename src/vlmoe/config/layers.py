"""Recipes as files, and one on top of another: `like: OTHER` at the top of a file takes what it leaves out from OTHER.

A layer is what one file, or all overrides together, say. Groups of keys are merged, lists are replaced.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from vlmoe.config.finetune import TASKS, FinetuneRecipe
from vlmoe.config.parsing import home, read_yaml
from vlmoe.config.schema import BatchConfig, Recipe, RecipeError, SourceConfig
from vlmoe.config.strict import typed

LIKE = "like"  # names the recipe whose keys count where this one has none
OWN = ("name", "about", "run")  # what a recipe never takes from another
FINETUNE = "finetune"  # folder of the packaged recipes for fine-tuning


@dataclass
class _File:
    """name: of the recipe. place: what tells the file from all others. folder: that paths in `like` start from."""

    text: str
    name: str
    place: str
    folder: Path | None


def recipe_names(folder: str = "") -> list[str]:
    """Names of the packaged recipes; folder: "finetune" for those of fine-tuning."""
    packaged = resources.files("vlmoe.recipes") / folder
    return sorted(p.name.removesuffix(".yaml") for p in packaged.iterdir() if p.name.endswith(".yaml"))


def read_layers(recipe: str, folder: str = "") -> tuple[list[DictConfig], str]:
    """A recipe as written, below it the ones it is like, lowest first; and its name. Where there are several, keys and
    types of each are checked. Sections for tasks are left as they are.

    Raises RecipeError naming the file: no such recipe, unreadable YAML, unknown key, wrong type, `like` in a circle.
    """
    layers: list[DictConfig] = []
    files: list[_File] = []
    named: Any = recipe
    origin = ""
    while named is not None:
        try:
            file = _read(named, folder, files[-1].folder if files else None)
        except RecipeError as error:
            raise RecipeError(f"{origin}: key '{LIKE}': {error}" if files else str(error)) from None
        files.append(file)
        if file.place in [f.place for f in files[:-1]]:
            way = " -> ".join(f.place for f in files)
            raise RecipeError(f"recipe {recipe}: key '{LIKE}' leads back to a recipe on the way: {way}")
        origin = f"recipe {named}"
        given = read_yaml(file.text, origin, RecipeError)
        if not isinstance(given, DictConfig):
            raise RecipeError(f"{origin}: expected a mapping of keys at the top, got {type(given).__name__}")
        named = given.pop(LIKE, None)
        if named is not None and (not isinstance(named, str) or not named):
            raise RecipeError(f"{origin}: key '{LIKE}' got {named!r}, wanted the name or file of another recipe")
        alone = not layers and named is None
        _check(given, FinetuneRecipe if folder == FINETUNE else Recipe, origin, alone)
        for key in OWN if layers else ():
            given.pop(key, None)
        layers.insert(0, given)
    return layers, files[0].name


def stack(layers: list[DictConfig]) -> DictConfig:
    """Layers as one, the last on top; see `leave_out` for sizes of batches."""
    found = OmegaConf.create({})
    for layer in layers:
        found = OmegaConf.merge(found, layer)  # type: ignore[assignment]
        if "sources" in _group(layer, "data"):
            leave_out(found, layer)
    return found


def leave_out(given: DictConfig, said: DictConfig | dict[str, Any]) -> None:
    """Where the layer `said` lists new sources: kinds that have none now are no part of the batch, unless that layer
    gives their number itself. Sizes from below were meant for other sources. Changes `given`, of any types."""
    kinds = source_kinds(given)
    batch = _group(_group(said, "data"), "batch")
    for kind in vars(BatchConfig()):
        if kinds is not None and kind not in kinds and kind not in batch:
            OmegaConf.update(given, f"data.batch.{kind}", 0)


def source_kinds(given: DictConfig) -> set[str] | None:
    """The kinds of samples that a recipe's sources yield; None where it has no list of sources."""
    sources = _group(given, "data").get("sources")
    if not isinstance(sources, ListConfig):
        return None
    return {str(source.get("kind", SourceConfig.kind)) for source in sources if isinstance(source, DictConfig)}


def _group(given: Any, key: str) -> Any:
    inner = given.get(key)
    return inner if isinstance(inner, DictConfig | dict) else {}


def _check(given: DictConfig, schema: type, origin: str, alone: bool) -> None:
    """One layer's keys and types, its sections for tasks among them. alone: only those sections' names, as the rest is
    checked with the overrides, where no other file can be at fault."""
    plain: Any = OmegaConf.to_container(given)
    by_task = (plain.pop("tasks", None) if schema is FinetuneRecipe else None) or {}
    if not isinstance(by_task, dict) or set(by_task) - set(TASKS):
        raise RecipeError(f"{origin}: key 'tasks' got {by_task!r}, wanted some of {', '.join(TASKS)}")
    for task, keys in by_task.items():
        if keys is not None and not isinstance(keys, dict):
            raise RecipeError(f"{origin}: key 'tasks.{task}' got {keys!r}, wanted a group of keys")
    if not alone:
        typed(plain, schema, origin)
        for task, keys in by_task.items():
            typed(keys or {}, schema, f"{origin}: tasks.{task}")


def _read(recipe: str, folder: str, near: Path | None) -> _File:
    """near: the folder that a path starts from; None: the working directory."""
    packaged = resources.files("vlmoe.recipes") / folder / f"{recipe}.yaml"
    if "/" not in recipe and packaged.is_file():
        return _File(packaged.read_text(encoding="utf-8"), recipe, recipe, None)
    path = Path(near or "", home(recipe))
    if path.is_dir() and (path / "recipe.yaml").is_file():  # a run's folder stands for the recipe it was made with
        path = path / "recipe.yaml"
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return _File(path.read_text(encoding="utf-8"), path.stem, str(path.resolve()), path.parent)
        except FileNotFoundError:
            raise RecipeError(f"recipe {path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path}: cannot be read: {error}") from None
    if "/" in recipe:
        what = "a folder without recipe.yaml" if path.is_dir() else "no such file or folder"
        raise RecipeError(f"recipe {path}: {what}; wanted a .yaml file, or the folder of a run")
    names = recipe_names(folder)
    close = difflib.get_close_matches(recipe, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise RecipeError(
        f"no recipe '{recipe}': {hint}packaged recipes are {', '.join(names)}; or give a .yaml file's path"
    )
