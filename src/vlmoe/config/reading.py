"""From YAML and overrides to a recipe, strictly."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from vlmoe.config.finetune import TASKS, FinetuneRecipe
from vlmoe.config.layers import FINETUNE, LIKE, leave_out, read_layers, source_kinds, stack
from vlmoe.config.parsing import home, read_yaml, refuse_interpolation
from vlmoe.config.schema import Recipe, RecipeError, UserError
from vlmoe.config.strict import typed
from vlmoe.config.validation import validate

AnyRecipe = TypeVar("AnyRecipe", Recipe, FinetuneRecipe)
PATHS = ("dir", "init", "branch_from", "path", "file", "annotations", "images", "cache")  # keys that hold a path
# what recipes did that were written before these keys were there
BEFORE = {
    "init": "",
    "init_allow_inexact": False,
    "branch_from": "",
    "model.patch_stem": "linear",
    "model.stem_channels": 32,
    "train.patch_lr": 1.0,
    "train.schedule": "cosine",
    "train.decay_steps": 0,
    "train.keep_at": [],
    "data.world.icons": 0,
    "data.world.facts": 0,
    "data.world.grid": 3,
    "data.world.captions": "sentences",
    "eval.every": 0,
    "data.sources[].held_out": 0.01,
    "data.sources[].images": "",
    "data.sources[].turns": "answer",
    "data.sources[].read": "random",
    "data.sources[].shard_weights": {},
    "data.world.held_out_scenes": 0.0,
    "data.stream.readers": 8,
    "data.stream.buffer": 20_000,
    "data.stream.cache": "",
    "data.stream.cache_gb": 50.0,
    "data.stream.attempts": 5,
    "data.masking.words": [],
    "data.augment.crop": None,
    "data.augment.ratio": 4 / 3,
    "data.augment.brightness": 0.0,
    "data.augment.contrast": 0.0,
    "data.augment.saturation": 0.0,
    "data.augment.hue": 0.0,
    "data.augment.flip": 0.0,
    "data.text_tokenizer.byte_fallback": False,
}
_ITEM = re.compile(r"\[\d+\]")  # in a dotted key


def load_recipe(recipe: str, overrides: list[str] | None = None) -> Recipe:
    """Read a packaged recipe by name or a YAML file by path, then apply `key=value` overrides.

    With `like: OTHER`, keys that the file leaves out are those of the recipe OTHER, see `vlmoe.config.layers`.

    Raises:
        RecipeError: no such recipe, unreadable YAML, unknown key, wrong type or impossible value.
    """
    layers, name = read_layers(recipe)
    given = stack(layers)
    _override(given, overrides)
    return from_mapping(OmegaConf.to_container(given), origin=recipe, name=name)  # type: ignore[arg-type]


def override(recipe: dict[str, Any], overrides: Sequence[str], origin: str) -> Recipe:
    """A recipe of plain nested dicts with `key=value` overrides. origin: what errors call it."""
    refuse_interpolation(recipe, origin, RecipeError)
    given = OmegaConf.create(recipe)
    _override(given, list(overrides))
    return from_mapping(OmegaConf.to_container(given), origin=origin)  # type: ignore[arg-type]


def load_finetune(
    task: str, recipe: str, pretrained: Recipe | FinetuneRecipe, init: str, overrides: list[str] | None = None
) -> FinetuneRecipe:
    """Read a fine-tuning recipe for one task.

    A recipe may hold a section `tasks.NAME` for each task, which goes before its common keys. What it says of the model
    and the world are changes to `pretrained`, the recipe of the run `init`.

    Raises:
        RecipeError: as `load_recipe`, or the recipe has no settings for the task.
    """
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise RecipeError(f"no task '{task}': {hint}tasks are {', '.join(TASKS)}")
    refuse_interpolation({"init": init}, f"recipe {recipe}", RecipeError)
    layers, name = read_layers(recipe, FINETUNE)
    sections = [layer.pop("tasks", None) or {} for layer in layers]
    there = sorted({str(name) for by_task in sections for name in by_task})
    if there and task not in there:
        raise RecipeError(f"recipe {recipe}: no settings for {task}; it has {', '.join(there)}")
    given = stack([_merge(layer, by_task.get(task) or {}) for layer, by_task in zip(layers, sections, strict=True)])
    if given.get("task", task) != task:  # a finished run's own recipe
        raise RecipeError(f"recipe {recipe}: is for the task {given.get('task')}, not {task}")
    _override(given, overrides)
    typed(OmegaConf.to_container(given), FinetuneRecipe, recipe)
    given = _merge({"model": to_mapping(pretrained)["model"], "task": task, "init": init}, given)
    world = to_mapping(pretrained)["data"]["world"] | {"image_size": given.model.image_size}
    given = _merge({"data": {"world": world}}, given)
    return from_mapping(
        OmegaConf.to_container(given),  # type: ignore[arg-type]
        origin=recipe, name=f"{Path(init).name}-{task}" if init else f"{name}-{task}", schema=FinetuneRecipe,
    )  # fmt: skip


def init_of(recipe: str, overrides: list[str] | None) -> str:
    """The run that a fine-tuning recipe starts from. Raises RecipeError when it names none."""
    given = stack(read_layers(recipe, FINETUNE)[0])
    _override(given, [o for o in overrides or [] if o.startswith("init=")])
    if not given.get("init"):
        raise RecipeError(f"recipe {recipe}: names no run to start from: give --init RUN, a pre-trained run's folder")
    return str(given.init)


def _merge(below: Any, above: Any) -> DictConfig:
    return OmegaConf.merge(below, above)  # type: ignore[return-value]


def _override(given: DictConfig, overrides: list[str] | None) -> None:
    kinds, said = source_kinds(given), OmegaConf.create({})
    for word in overrides or []:
        key, sep, _ = word.partition("=")
        if not sep or not key:
            raise RecipeError(f"override '{word}': expected key=value, for example train.steps=100")
        if key == LIKE:
            raise RecipeError(f"override '{word}': '{LIKE}' is a key of a recipe's file, at its top")
        read = override_value(word, RecipeError)
        try:
            OmegaConf.update(given, key, read, merge=True)
            if key.startswith("data"):
                OmegaConf.update(said, key, read, merge=True)
        except Exception as error:
            raise RecipeError(f"override '{word}': {_first_line(error)}") from None
    if source_kinds(given) != kinds:
        leave_out(given, said)


def override_value(word: str, error: type[UserError]) -> Any:
    """What `key=value` sets the key to, read as YAML. Raises `error`."""
    value = word.partition("=")[2]
    if "${" in word:
        refuse_interpolation(word, "override", error, word.partition("=")[0])
    return read_yaml(f"v: {value}", f"override '{word}'", error).v if value else ""


def from_mapping(
    given: dict[str, Any],
    origin: str = "recipe",
    name: str = "",
    schema: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """Build a recipe from plain nested dicts (YAML or JSON), as strictly as `load_recipe`. Paths that begin with ~ are
    those of the home folder."""
    refuse_interpolation(given, origin, RecipeError)
    merged = typed(given, schema, origin)
    if "sources" in given.get("data", {}):
        leave_out(merged, given)
    recipe: AnyRecipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
    recipe.name = recipe.name or name
    recipe.run.dir = recipe.run.dir or f"runs/{recipe.name or 'run'}"
    _go_home(recipe, origin)
    validate(recipe, origin)
    return recipe


def _go_home(group: Any, origin: str, prefix: str = "") -> None:
    """Put the home folder for ~ in every path of a group of keys, in place."""
    for f in fields(group):
        value, key = getattr(group, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            _go_home(value, origin, f"{key}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if is_dataclass(item):
                    _go_home(item, origin, f"{key}[{i}].")
        elif f.name in PATHS and isinstance(value, str):
            try:
                setattr(group, f.name, home(value))
            except UserError as error:
                raise RecipeError(f"{origin}: key '{key}': {error}") from None


def to_mapping(recipe: Recipe | FinetuneRecipe) -> dict[str, Any]:
    """The recipe as plain nested dicts, fit for JSON."""
    return asdict(recipe)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}.").items()}


def with_later_keys(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`then`, flat and perhaps written before some keys were there, with what it did for those of them `now` has. Lists
    may be flat, too ("data.sources[0].type"), or values.

    prefix: of both's keys."""
    before = {prefix + k: v for k, v in BEFORE.items()}
    known = {key: before[_ITEM.sub("[]", key)] for key in now if _ITEM.sub("[]", key) in before}
    for key, value in then.items():
        of_items = {k.removeprefix(f"{key}[]."): v for k, v in before.items() if k.startswith(f"{key}[].")}
        if of_items and isinstance(value, list):
            then = then | {key: [of_items | item for item in value]}
    return known | then


def to_yaml(recipe: Recipe | FinetuneRecipe) -> str:
    """The recipe as YAML, every key written out."""
    return OmegaConf.to_yaml(OmegaConf.create(to_mapping(recipe)))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
