"""YAML from anyone, as recipes and studies have it: plain values, bounded, and nothing that is looked up elsewhere.

`${...}` is refused wherever it stands, in files, overrides and JSON: OmegaConf would put environment variables and
other keys in its place, and what a recipe says ends up in logs, checkpoints and exported models.
"""

from __future__ import annotations

import os
from typing import Any

import yaml
from omegaconf import OmegaConf

from vlmoe.config.schema import UserError

MOST_CHARACTERS = 1 << 20
MOST_VALUES = 100_000  # with every alias written out
MOST_NESTED = 50


def read_yaml(text: str, origin: str, error: type[UserError]) -> Any:
    """Text to an OmegaConf container. Anchors and aliases are read; tags (`!name`) and `${...}` are not.

    Raises `error`, which names origin and line or key.
    """
    if len(text) > MOST_CHARACTERS:
        raise error(f"{origin}: {len(text)} characters, wanted at most {MOST_CHARACTERS}")
    try:
        _check_events(text, origin, error)
        refuse_interpolation(yaml.load(text, Loader=yaml.SafeLoader), origin, error)
        return OmegaConf.create(text)
    except UserError:
        raise
    except Exception as problem:  # the YAML parser's own errors carry line and column
        raise error(f"{origin}: not valid YAML: {problem}") from None


def refuse_interpolation(value: Any, origin: str, error: type[UserError], key: str = "") -> None:
    """Raises `error` naming the key of the first text, in nested dicts and lists, that holds `${`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            refuse_interpolation(name, origin, error, f"{key}.{name}".lstrip("."))
            refuse_interpolation(inner, origin, error, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            refuse_interpolation(inner, origin, error, f"{key}[{i}]")
    elif isinstance(value, str) and "${" in value:
        raise error(f"{origin}: key '{key}' got {value!r}: '${{' is not read here, write out what it stands for")


def _check_events(text: str, origin: str, error: type[UserError]) -> None:
    """What would make a short text large or strange, found before it is built."""
    sizes: dict[str, int] = {}  # values below each finished anchor
    open_: list[tuple[str | None, int]] = []  # collections around the event: their anchor, values before them
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}"
        if getattr(event, "tag", None):
            raise error(f"{origin}: {line}: tag {event.tag!r} is not read here")
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = total - before
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise error(f"{origin}: {line}: alias '*{event.anchor}' stands for nothing that ends before it")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if total > MOST_VALUES or len(open_) > MOST_NESTED:
            what = f"{MOST_VALUES} values" if total > MOST_VALUES else f"{MOST_NESTED} levels"
            raise error(f"{origin}: {line}: more than {what}, aliases written out")


def home(path: str) -> str:
    """A path with a leading ~ or ~name put right. Raises UserError where there is no such home folder."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        name = path.split("/")[0]
        raise UserError(f"{path}: there is no home folder {name}; write ./{name} for a folder of that name")
    return found
