"""From YAML and overrides to a recipe, strictly."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmoe.config import finetune, schema
from vlmoe.config.finetune import TASKS, FinetuneRecipe
from vlmoe.config.parsing import home, read_yaml, refuse_interpolation
from vlmoe.config.schema import Recipe, RecipeError, UserError
from vlmoe.config.validation import validate

AnyRecipe = TypeVar("AnyRecipe", Recipe, FinetuneRecipe)
GROUPS = vars(schema) | vars(finetune)  # name -> dataclass of every group of keys
PATHS = ("dir", "init", "branch_from", "path", "file", "annotations", "images")  # names of the keys that hold a path
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
    "data.world.held_out_scenes": 0.0,
    "data.masking.words": [],
}
_ITEM = re.compile(r"\[\d+\]")  # in a dotted key


def recipe_names(folder: str = "") -> list[str]:
    """Names of the packaged recipes; folder: "finetune" for those of fine-tuning."""
    packaged = resources.files("vlmoe.recipes") / folder
    return sorted(p.name.removesuffix(".yaml") for p in packaged.iterdir() if p.name.endswith(".yaml"))


def load_recipe(recipe: str, overrides: list[str] | None = None) -> Recipe:
    """Read a packaged recipe by name or a YAML file by path, then apply `key=value` overrides.

    Raises:
        RecipeError: no such recipe, unreadable YAML, unknown key, wrong type or impossible value.
    """
    given, name = _given(recipe, "")
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
    given, name = _given(recipe, "finetune")
    by_task = given.pop("tasks", None)
    if by_task is not None:
        if not isinstance(by_task, DictConfig) or set(by_task) - set(TASKS):
            raise RecipeError(f"recipe {recipe}: key 'tasks' got {list(by_task)}, wanted some of {', '.join(TASKS)}")
        if task not in by_task:
            raise RecipeError(f"recipe {recipe}: no settings for {task}; it has {', '.join(map(str, by_task))}")
        given = _merge(given, by_task[task] or {})
    if given.get("task", task) != task:  # a finished run's own recipe
        raise RecipeError(f"recipe {recipe}: is for the task {given.get('task')}, not {task}")
    _override(given, overrides)
    changes: dict[str, Any] = OmegaConf.to_container(given)  # type: ignore[assignment]
    _check_keys(changes, FinetuneRecipe, "", recipe)
    given = _merge({"model": to_mapping(pretrained)["model"], "task": task, "init": init}, given)
    world = to_mapping(pretrained)["data"]["world"] | {"image_size": given.model.image_size}
    given = _merge({"data": {"world": world}}, given)
    return from_mapping(
        OmegaConf.to_container(given),  # type: ignore[arg-type]
        origin=recipe, name=f"{Path(init).name}-{task}" if init else f"{name}-{task}", schema=FinetuneRecipe,
    )  # fmt: skip


def init_of(recipe: str, overrides: list[str] | None) -> str:
    """The run that a fine-tuning recipe starts from. Raises RecipeError when it names none."""
    given, _ = _given(recipe, "finetune")
    _override(given, [o for o in overrides or [] if o.startswith("init=")])
    if not given.get("init"):
        raise RecipeError(f"recipe {recipe}: names no run to start from: give --init RUN, a pre-trained run's folder")
    return str(given.init)


def _merge(below: Any, above: Any) -> DictConfig:
    return OmegaConf.merge(below, above)  # type: ignore[return-value]


def _given(recipe: str, folder: str) -> tuple[DictConfig, str]:
    """A recipe as written, and its name."""
    text, name = _read(recipe, folder)
    given = read_yaml(text, f"recipe {recipe}", RecipeError)
    if not isinstance(given, DictConfig):
        raise RecipeError(f"recipe {recipe}: expected a mapping of keys at the top, got {type(given).__name__}")
    return given, name


def _override(given: DictConfig, overrides: list[str] | None) -> None:
    for word in overrides or []:
        key, sep, _ = word.partition("=")
        if not sep or not key:
            raise RecipeError(f"override '{word}': expected key=value, for example train.steps=100")
        read = override_value(word, RecipeError)
        try:
            OmegaConf.update(given, key, read, merge=True)
        except Exception as error:
            raise RecipeError(f"override '{word}': {_first_line(error)}") from None


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
    _check_keys(given, schema, "", origin)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        recipe: AnyRecipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_explain(error, given, schema)}") from None
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
    return OmegaConf.to_container(OmegaConf.structured(recipe))  # type: ignore[return-value]


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
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read(recipe: str, folder: str) -> tuple[str, str]:
    packaged = resources.files("vlmoe.recipes") / folder / f"{recipe}.yaml"
    if "/" not in recipe and packaged.is_file():
        return packaged.read_text(encoding="utf-8"), recipe
    path = Path(home(recipe))
    if path.is_dir() and (path / "recipe.yaml").is_file():  # a run's folder stands for the recipe it was made with
        path = path / "recipe.yaml"
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except FileNotFoundError:
            raise RecipeError(f"recipe {recipe}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {recipe}: cannot be read: {error}") from None
    names = recipe_names(folder)
    close = difflib.get_close_matches(recipe, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise RecipeError(
        f"no recipe '{recipe}': {hint}packaged recipes are {', '.join(names)}; or give a .yaml file's path"
    )


def _check_keys(given: Any, schema: type, prefix: str, origin: str, root: type | None = None) -> None:
    """Refuse unknown keys with the nearest known one; OmegaConf would only say that the key is not in the struct."""
    if not isinstance(given, dict):
        raise RecipeError(
            f"{origin}: key '{prefix.rstrip('.')}' got {given!r}, wanted a group of keys: "
            + ", ".join(f.name for f in fields(schema))
        )
    root = root or schema
    known = {f.name: _schema_of(f) for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            everywhere = {path.rsplit(".", 1)[-1]: path for path in known_keys(root)}
            close = difflib.get_close_matches(str(key), known, n=1)
            elsewhere = everywhere.get(str(key))
            if close:
                hint = f"did you mean '{prefix}{close[0]}'?"
            elif elsewhere:
                hint = f"did you mean '{elsewhere}'?"
            else:
                hint = f"known here: {', '.join(known)}"
            raise RecipeError(f"{origin}: unknown key '{prefix}{key}': {hint}")
        inner = known[key]
        if inner is not None and isinstance(value, list):
            for i, item in enumerate(value):
                _check_keys(item, inner, f"{prefix}{key}[{i}].", origin, root)
                _check_item(item, inner, f"{prefix}{key}[{i}].", origin, root)
        elif inner is not None:
            _check_keys(value, inner, f"{prefix}{key}.", origin, root)


def _check_item(item: dict[str, Any], schema: type, prefix: str, origin: str, root: type) -> None:
    """Types of one element of a list of groups: OmegaConf's own error would not say which element."""
    try:
        OmegaConf.merge(OmegaConf.structured(schema), item)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_explain(error, item, root, prefix)}") from None


def _schema_of(f: Any) -> type | None:
    """The dataclass below a field (a group, or a list of groups), or None for a plain value."""
    name = str(f.type)
    inner = GROUPS.get(name.removeprefix("list[").removesuffix("]"))
    return inner if is_dataclass(inner) and isinstance(inner, type) else None


def known_keys(schema: type = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    keys: list[str] = []
    for f in fields(schema):
        inner = _schema_of(f)
        if inner is None or str(f.type).startswith("list["):
            keys.append(prefix + f.name)
        else:
            keys += known_keys(inner, f"{prefix}{f.name}.")
    return keys


def _explain(error: OmegaConfBaseException, given: dict[str, Any], root: type, prefix: str = "") -> str:
    key = str(error.full_key or error.key or "?")
    wanted = getattr(error.ref_type, "__name__", None) or str(error.ref_type or "another type")
    found = OmegaConf.select(OmegaConf.create(given), key, default=None) if key != "?" else None
    return f"key '{prefix}{key}' got {found!r}, wanted {_wanted(prefix + key, root) or wanted}"


def _wanted(key: str, root: type) -> str | None:
    """The declared type of a dotted key, in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    schema: type | None = root
    declared = ""
    for part in key.replace("[", ".[").split("."):
        if part.startswith("[") or schema is None:
            continue
        match = next((f for f in fields(schema) if f.name == part), None)
        if match is None:
            return None
        declared, schema = str(match.type), _schema_of(match)
    base = declared.removesuffix(" | None")
    return words.get(base, base) + (" or null" if base != declared else "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
