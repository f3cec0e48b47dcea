"""JSON that knows whether it, and the files that belong to it, are as they were written.

A sealed document holds "sha256", of its own remaining content, and may hold "files": name -> size and SHA-256 of files
in the same folder. White space and the order of keys do not count. This finds what disks, copies and hands do to files;
it is no protection against someone who writes a new digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmoe.config.json_reading import read_json
from vlmoe.config.schema import UserError

SEAL, FILES = "sha256", "files"


class AlteredError(UserError):
    """A file that is not as it was written; the message names it."""


def write_sealed(path: Path, document: dict[str, Any], files: Iterable[str] | None = None) -> None:
    """Write a document as JSON, with its digest and those of `files` beside it; it appears whole or not at all, and
    is on the disk when this returns."""
    document = {key: value for key, value in document.items() if key != SEAL}
    if files is not None:
        document[FILES] = {name: describe(path.with_name(name)) for name in sorted(files)}
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document | {SEAL: _content_digest(document)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_sealed(path: Path, remedy: str | None = None, older: int | None = None) -> dict[str, Any]:
    """The document without its digest, which fits it.

    remedy: what errors say can be done; None: `vlmoe seal`. older: the "format" of documents written before they had a
    digest (None: they had no format); those are taken as they are.

    Raises AlteredError: it is no JSON object, has no digest or does not fit it. OSError: it cannot be read.
    """
    remedy = remedy or _remedy(path)
    try:
        document = read_json(path, nan=True)
    except UserError as error:
        raise AlteredError(f"{error}. {remedy}") from None
    seal = document.pop(SEAL, None)
    if seal is None and document.get("format") == older and (older is not None or FILES not in document):
        return document
    if seal is None:
        raise AlteredError(f"{path}: has no {SEAL} of its content. {remedy}")
    if seal != _content_digest(document):
        raise AlteredError(f"{path}: its content does not fit the {SEAL} in it: altered. {remedy}")
    return document


def check_files(path: Path, document: dict[str, Any], needed: Iterable[str], remedy: str | None = None) -> None:
    """Compare the files that a document at `path` lists with what they are. needed: names that it must list. remedy: as
    of `read_sealed`.

    Raises AlteredError naming the first file that is missing, not listed, or of another size or content.
    """
    remedy = remedy or _remedy(path)
    listed = document.get(FILES)
    listed = listed if isinstance(listed, dict) else {}
    for name in needed:
        if name not in listed:
            raise AlteredError(f"{path}: lists no {name}. {remedy}")
    for name, expected in listed.items():
        file = path.with_name(name)
        try:
            if file.stat().st_size != expected["bytes"]:
                size = file.stat().st_size
                raise AlteredError(f"{file}: has {size} bytes, {path.name} says {expected['bytes']}. {remedy}")
            if file_digest(file) != expected[SEAL]:
                raise AlteredError(f"{file}: its SHA-256 is not the one in {path.name}: altered. {remedy}")
        except FileNotFoundError:
            raise AlteredError(f"{file}: missing. {remedy}") from None
        except OSError as error:
            raise AlteredError(f"{file}: cannot be read ({error.strerror or error}). {remedy}") from None


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as documents list it."""
    return {"bytes": path.stat().st_size, SEAL: file_digest(path)}


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _remedy(path: Path) -> str:
    return f"Restore it from a copy; or, if it was changed on purpose, take it as it is: vlmoe seal {path.parent}"
