"""Tables of rows: which columns hold image, text and codes, in which of the usual forms, and what a row says.

The forms are those of Hugging Face data sets, and what plainer writers do. Such data sets say in the schema's metadata
what a column is meant to be (an image, a class with names); where they do not, the column's type tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmoe.config import UserError, parse_json
from vlmoe.data.conversations import LAYOUTS_IN_WORDS, layout_of
from vlmoe.data.files import FileOptions, Parts
from vlmoe.data.sample import BadSample

METADATA = b"huggingface"  # key of the schema's metadata
# What columns are often called. A recipe's default name that is not there is looked for under these.
USUAL = {
    "image": ("image", "images", "img", "picture", "jpg", "png", "webp", "photo"),
    "text": ("text", "caption", "captions", "conversations", "messages", "conversation", "texts", "sentences",
             "description", "txt"),
}  # fmt: skip
MOST_IMAGE_BYTES = 1 << 28  # of a file that a row names

_IMAGES = "encoded bytes, the path of a file, a struct {bytes, path}, or a list of these"
_TEXTS = f"a text, a list of texts, a class with names, or a conversation: a list of {LAYOUTS_IN_WORDS}"


@dataclass(frozen=True)
class Column:
    """form: of an image bytes, path or struct; of a text text, class or conversation; codes. many: a list of those.
    names: of a class's numbers."""

    name: str
    form: str
    many: bool = False
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = {
            "bytes": "encoded bytes", "path": "a file's path", "struct": "{bytes, path}", "text": "a text",
            "class": f"the name of one of {len(self.names)} classes", "codes": "numbers",
            "conversation": "a conversation",
        }[self.form]  # fmt: skip
        return f"column '{self.name}', {'a list, each ' if self.many else ''}{what}"


class Columns:
    """The columns of a source's tables. `found`: part (image, text, codes) -> column.

    where: what errors call the file. Raises UserError: a column is missing (the message lists those there are), or its
    type is none of those that are read, or the folder of images is missing.
    """

    def __init__(self, schema: pa.Schema, options: FileOptions, where: str) -> None:
        self.options = options
        self.schema = schema
        features = _features(schema)
        self.found: dict[str, Column] = {}
        if options.images and not Path(options.images).is_dir():
            raise UserError(f"{where}: images {options.images}: no such folder")
        wanted = {"image": options.image_column} if options.kind != "text" else {}
        if options.kind != "image":
            wanted["text"] = options.text_column
        for part, name in wanted.items():
            name = _named(part, name, schema, features, where)
            kind, feature = schema.field(name).type, features.get(name)
            column = _image_column(name, kind) if part == "image" else _text_column(name, kind, feature)
            if column is None:
                expected = _IMAGES if part == "image" else _TEXTS
                raise UserError(f"{where}: column '{name}' is {_in_words(kind)}; as {part} is expected {expected}")
            self.found[part] = column
        if options.patches and options.kind != "text":
            if "codes" not in schema.names:
                raise UserError(f"{where}: no column 'codes'; there are {_listing(schema)}")
            self.found["codes"] = Column("codes", "codes", many=True)

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.found.values()]

    def check_same(self, schema: pa.Schema, where: str) -> None:
        """Raises UserError where another file of the source lacks a column, has it in a form that is not read, or means
        other classes by its numbers."""
        for part, column in Columns(schema, self._as_found(), where).found.items():
            if "class" in (column.form, self.found[part].form) and column != self.found[part]:
                raise UserError(
                    f"{where}: {column} here, and {self.found[part]} in the first file, or the names differ: give each "
                    "a source of its own"
                )

    def _as_found(self) -> FileOptions:
        image, text = (self.found[part].name if part in self.found else "" for part in ("image", "text"))
        return replace(self.options, image_column=image, text_column=text)

    def understood(self) -> list[str]:
        """A sentence for each part: its column, what it holds, and what of it is taken."""
        said = []
        for part, column in self.found.items():
            words = f"{part}: {column}"
            if part == "image" and column.many:
                words += "; of several the first is taken"
            if column.form == "conversation":
                which = "its first answer is" if self.options.turns == "answer" else "all its turns are"
                words += f"; {which} taken"
            if column.form in {"path", "struct"}:
                words += f"; a path is one from {self.options.images or 'the folder of the file'}"
            said.append(words)
        unused = [name for name in self.schema.names if name not in self.names]
        return [*said, *([f"not read: {', '.join(unused)}"] if unused else [])]

    def parts(self, row: dict[str, pa.Scalar], key: str, roots: Sequence[Path], image: bool) -> Parts:
        """A row's parts. row: column -> its scalar. roots: folders that a path may be relative to, tried in turn.

        Raises BadSample.
        """
        parts = Parts()
        if image and "image" in self.found:
            raw, several = _image_value(row[self.found["image"].name])
            parts.image = _image_bytes(raw, key, roots)
            parts.taken = ("the first of several images",) if several else ()
        if "text" in self.found:
            column = self.found["text"]
            parts.captions = row[column.name].as_py()
            if column.form == "class":
                parts.captions = _class_name(parts.captions, column, key)
        if image and "codes" in self.found:
            parts.codes = row["codes"].as_py()
        return parts


# ------------------------------------------------------------------------------------------------------------- columns
def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says of the columns; nothing where there is none that can be read."""
    try:
        about = parse_json((schema.metadata or {}).get(METADATA, b"{}"), "metadata")
        features = about["info"]["features"]
    except (UserError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _named(part: str, name: str, schema: pa.Schema, features: dict[str, Any], where: str) -> str:
    """The column for a part. A name that a recipe gives must be there; the default one may be called otherwise."""
    if name in schema.names:
        return name
    candidates: list[str] = []
    if name == USUAL[part][0]:
        if part == "image":
            candidates = [n for n in schema.names if "Image" in str(features.get(n))]
            candidates = candidates or [n for n in schema.names if _is_image(schema.field(n).type)]
        candidates = candidates or [n for n in USUAL[part] if n in schema.names]
        if len(candidates) == 1:
            return candidates[0]
    several = f"; it could be {' or '.join(candidates)}: set {part}_column" if candidates else ""
    raise UserError(f"{where}: no column '{name}'; there are {_listing(schema)}{several}")


def _listing(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "none"


def _in_words(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 120 else text[:117] + "..."


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that is stored."""
    while isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(
        t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)
        or t.is_list_view(kind) or t.is_large_list_view(kind)
    )  # fmt: skip


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(
        t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind) or t.is_binary_view(kind)
    )  # fmt: skip


def _fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    return {kind.field(i).name: _plain(kind.field(i).type) for i in range(kind.num_fields)}


def _is_image(kind: pa.DataType) -> bool:
    """Whether a type can be nothing else than images."""
    kind = _plain(kind)
    kind = _plain(kind.value_type) if _is_list(kind) else kind
    return bool(pa.types.is_struct(kind)) and set(_fields(kind)) == {"bytes", "path"}


def _image_column(name: str, kind: pa.DataType) -> Column | None:
    kind = _plain(kind)
    many = _is_list(kind)
    kind = _plain(kind.value_type) if many else kind
    if pa.types.is_struct(kind):
        fields = _fields(kind)
        usable = {n: _is_bytes(t) or _is_text(t) or pa.types.is_null(t) for n, t in fields.items()}
        return Column(name, "struct", many) if usable.get("bytes") or usable.get("path") else None
    if _is_text(kind):
        return Column(name, "path", many)
    return Column(name, "bytes", many) if _is_bytes(kind) or pa.types.is_null(kind) else None


def _text_column(name: str, kind: pa.DataType, feature: Any) -> Column | None:
    kind = _plain(kind)
    names = feature.get("names") if isinstance(feature, dict) else None
    if pa.types.is_integer(kind):
        named = isinstance(names, list) and all(isinstance(n, str) for n in names)
        return Column(name, "class", names=tuple(names)) if named and names else None
    if pa.types.is_struct(kind):  # of lists: how a list of objects is stored by some
        lists = {n for n, t in _fields(kind).items() if _is_list(t)}
        return Column(name, "conversation") if layout_of(lists) else None
    many = _is_list(kind)
    kind = _plain(kind.value_type) if many else kind
    if pa.types.is_struct(kind):
        return Column(name, "conversation") if many and layout_of(_fields(kind)) else None
    return Column(name, "text", many) if _is_text(kind) or pa.types.is_null(kind) else None


# -------------------------------------------------------------------------------------------------------------- values
def _image_value(scalar: pa.Scalar) -> tuple[Any, bool]:
    """What a row holds as image, the first of a list; and whether there are more."""
    if not scalar.is_valid or not isinstance(scalar, pa.ListScalar):
        return scalar.as_py(), False
    values = scalar.values
    return (values[0].as_py() if len(values) else None), len(values) > 1


def _image_bytes(value: Any, key: str, roots: Sequence[Path]) -> bytes | None:
    path: Any = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        value, path = None, value
    if isinstance(value, bytes):
        return value
    return _read_path(path, key, roots) if path else None


def _read_path(path: Any, key: str, roots: Sequence[Path]) -> bytes:
    """The file that a row names. It must lie below one of the roots: a table from elsewhere must not read the rest of
    the disk."""
    text = str(path)
    if "://" in text:
        raise BadSample(key, f"image is a link: {text}, and no bytes are stored with it")
    below = [root for root in roots if not Path(text).is_absolute() or Path(text).is_relative_to(root.absolute())]
    if not below or ".." in Path(text).parts or "\0" in text:
        where = f"is not below {' or '.join(map(str, roots))}" if roots else "and the table is not of this machine"
        raise BadSample(key, f"image's path leads elsewhere: {text} {where}; set `images` to its folder")
    tried = [root / text for root in below]
    file = next((p for p in tried if p.is_file()), tried[0])
    try:
        if file.stat().st_size > MOST_IMAGE_BYTES:
            raise BadSample(key, f"image of more than {MOST_IMAGE_BYTES} bytes: {file}")
        return file.read_bytes()
    except OSError as error:
        raise BadSample(key, f"image cannot be read: {file}: {error.strerror or error}") from None


def _class_name(value: Any, column: Column, key: str) -> str | None:
    if value is None or value == -1:  # Hugging Face's number for a class that is not told
        return None
    if not 0 <= value < len(column.names):
        raise BadSample(key, f"class without a name: {value}, and column '{column.name}' names {len(column.names)}")
    return column.names[value]
