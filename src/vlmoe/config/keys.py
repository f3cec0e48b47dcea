"""Type, default and meaning of each key of a recipe, from the dataclasses and the comments beside their fields."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import io
import re
import textwrap
import tokenize
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from vlmoe.config import finetune, schema
from vlmoe.config.schema import Recipe, RecipeError

GROUPS = vars(schema) | vars(finetune)  # name -> dataclass of every group of keys
WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text",
    "list[str]": "a list of texts", "list[int]": "a list of whole numbers",
    "dict[str, float]": "a group of numbers by name",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """name: dotted; "[]" stands behind a list of groups. default: as YAML."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """Keys that stand side by side. name: dotted, "" at the top. keys: but for groups of keys below it."""

    name: str
    about: str
    schema: type
    keys: list[Key]


def schema_of(f: Field[Any]) -> type | None:
    """The dataclass below a field (a group, or a list of groups), or None for a plain value."""
    inner = GROUPS.get(str(f.type).removeprefix("list[").removesuffix("]"))
    return inner if is_dataclass(inner) and isinstance(inner, type) else None


def known_keys(schema: type = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted; a list of groups is one."""
    return [key.name for group in groups(schema, prefix) if "[]" not in group.name for key in group.keys]


def groups(schema: type = Recipe, prefix: str = "") -> list[Group]:
    """Every group of a recipe's keys, in the order of the dataclasses, each before those below it."""
    keys: list[Key] = []
    below: list[Group] = []
    said = meanings(schema)
    for f in fields(schema):
        inner, many = schema_of(f), str(f.type).startswith("list[")
        if inner is None or many:
            words = words_of(str(f.type)).removeprefix("a ")
            keys.append(Key(prefix + f.name, words, _default(f), said.get(f.name, "")))
        if inner is not None:
            below += groups(inner, f"{prefix}{f.name}{'[]' if many else ''}.")
    return [Group(prefix.removesuffix("."), _about(schema), schema, keys), *below]


def select(found: list[Group], prefix: str) -> list[Group]:
    """The groups and keys whose name is `prefix` or lies below it.

    Raises RecipeError, with the nearest names there are, where there is none.
    """
    wanted = re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "[]", prefix.strip(".")).removesuffix("[]")

    def within(name: str) -> bool:
        return name == wanted or name.startswith((f"{wanted}.", f"{wanted}[]")) or not wanted

    chosen = [Group(g.name, g.about, g.schema, [k for k in g.keys if within(k.name)]) for g in found]
    chosen = [group for group in chosen if group.keys]
    if chosen:
        return chosen
    names = [name for g in found for name in (g.name, *(k.name for k in g.keys)) if name and not name.endswith("[]")]
    last = wanted.rpartition(".")[2]
    close = [name for name in names if name.rpartition(".")[2] == last] or difflib.get_close_matches(wanted, names)
    top = [name for name in names if "." not in name]
    hint = f"did you mean {' or '.join(close)}?" if close else f"at the top there are {', '.join(top)}"
    raise RecipeError(f"no key or group of keys '{prefix}': {hint}")


@functools.cache
def meanings(schema: type) -> dict[str, str]:
    """Field -> its meaning: the comment beside it and on the lines below, up to the next field. Inherited ones too."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            found |= _comments(base)
    return found


def _comments(schema: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    ends = [node.lineno for node in tree.body[1:]] + [source.count("\n") + 2]
    found = {}
    for node, end in zip(tree.body, ends, strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = " ".join(comments[n] for n in range(node.lineno, end) if n in comments)
    return found


def words_of(declared: str) -> str:
    """A declared type in words."""
    base = declared.removesuffix(" | None")
    listed = base.startswith("list[") and base not in WORDS
    return ("a list of groups" if listed else WORDS.get(base, base)) + (" or null" if base != declared else "")


def _default(f: Field[Any]) -> str:
    value = f.default if f.default_factory is MISSING else f.default_factory()
    if isinstance(value, list):
        groups_in_it = value and is_dataclass(value[0])
        return f"{len(value)} groups" if groups_in_it else f"[{', '.join(map(str, value))}]"
    named: dict[Any, str] = {None: "null", True: "true", False: "false", "": '""'}
    return named[value] if isinstance(value, bool | None) or value == "" else str(value)


def _about(schema: type) -> str:
    return " ".join((inspect.getdoc(schema) or "").split())


# ------------------------------------------------------------------------------------------------------- for people
def as_text(found: list[Group]) -> str:
    """One line for each key, below its group's name."""
    lines = []
    for group in found:
        widths = [max(len(getattr(key, part)) for key in group.keys) for part in ("name", "type", "default")]
        lines += [f"{group.name or 'recipe'}: {group.about}"]
        for key in group.keys:
            cells = (key.name, key.type, key.default)
            lines.append("  " + "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)) + f"  {key.meaning}")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def as_page() -> str:
    """docs/recipe-keys.md, whole. A group that was described before is not described again."""
    lines = [
        "# Keys of a recipe", "",
        "Written by `vlmoe recipe keys --markdown > docs/recipe-keys.md` from `src/vlmoe/config/schema.py` and",
        "`finetune.py`; change it there. `vlmoe recipe keys train.guard` prints a part of it, `--finetune` the keys of",
        "fine-tuning. How a recipe is written, and what `like` at its top does:",
        "[training.md](training.md#which-recipes-are-read).", "",
    ]  # fmt: skip
    seen: dict[type, str] = {}
    for title, root in (("Pre-training", Recipe), ("Fine-tuning", finetune.FinetuneRecipe)):
        lines += [f"## {title}", ""]
        for group in groups(root):
            base = next((b for b in group.schema.__mro__[1:] if b in seen), None)
            keys = [key for key in group.keys if not base or key.name.rpartition(".")[2] in _comments(group.schema)]
            lines += [f"### `{group.name}`" if group.name else f"### The top of a {title.lower()} recipe", ""]
            if group.schema in seen:
                lines += [f"The keys of {seen[group.schema]}, see there.", ""]
                continue
            seen[group.schema] = f"`{group.name}`" + (" in pre-training" if root is Recipe else "")
            lines += [f"{textwrap.fill(group.about, 120)}" if group.about else "", ""]
            lines += ["| key | type | default | meaning |", "|-|-|-|-|"]
            for key in keys:
                cells = (f"`{key.name.rpartition('.')[2]}`", key.type, f"`{key.default}`", key.meaning)
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
            lines.append("")
    return "\n".join(lines)
