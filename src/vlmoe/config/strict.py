"""Keys that are not there and values of the wrong type, refused with the key and what was expected."""

from __future__ import annotations

import difflib
import functools
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmoe.config.keys import known_keys, schema_of, words_of
from vlmoe.config.schema import RecipeError


def typed(given: Any, schema: type, origin: str, prefix: str = "") -> DictConfig:
    """Plain nested dicts as the typed container of a schema, defaults filled in. prefix: of the keys, in errors.

    Raises RecipeError: an unknown key, with the nearest known one, or a value of another type.
    """
    _check_keys(given, schema, prefix, origin, schema)
    try:
        return OmegaConf.merge(_defaults(schema), given)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_explain(error, given, schema, prefix)}") from None


@functools.cache  # making it takes longer than all else in reading a recipe; what is merged into is a copy
def _defaults(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


@functools.cache
def _known(schema: type) -> dict[str, type | None]:
    """Key -> the schema below it, None for a plain value."""
    return {f.name: schema_of(f) for f in fields(schema)}


def _check_keys(given: Any, schema: type, prefix: str, origin: str, root: type) -> None:
    """Refuse unknown keys with the nearest known one; OmegaConf would only say that the key is not in the struct."""
    if not isinstance(given, dict):
        raise RecipeError(
            f"{origin}: key '{prefix.rstrip('.')}' got {given!r}, wanted a group of keys: "
            + ", ".join(f.name for f in fields(schema))
        )
    known = _known(schema)
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
        OmegaConf.merge(_defaults(schema), item)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_explain(error, item, root, prefix)}") from None


def _explain(error: OmegaConfBaseException, given: dict[str, Any], root: type, prefix: str = "") -> str:
    key = str(error.full_key or error.key or "?")
    wanted = getattr(error.ref_type, "__name__", None) or str(error.ref_type or "another type")
    found = OmegaConf.select(OmegaConf.create(given), key, default=None) if key != "?" else None
    return f"key '{prefix}{key}' got {found!r}, wanted {_wanted(prefix + key, root) or wanted}"


def _wanted(key: str, root: type) -> str | None:
    """The declared type of a dotted key, in words."""
    schema: type | None = root
    declared = ""
    for part in key.replace("[", ".[").split("."):
        if part.startswith("[") or schema is None:
            continue
        match = next((f for f in fields(schema) if f.name == part), None)
        if match is None:
            return None
        declared, schema = str(match.type), schema_of(match)
    return words_of(declared)
