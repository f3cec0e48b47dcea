"""JSON from files that anybody may have written: the one reader of the project.

Strict where Python's own is not: UTF-8 only, numbers finite and of at most 100 digits, no key twice, no lone surrogates
(which no tokenizer, terminal or file takes), nesting of at most 64 levels. Lines end at "\\n" alone: U+2028 and U+0085
are ordinary characters inside a JSON text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmoe.config.schema import UserError

MAX_BYTES = 1 << 32  # of a file; the largest annotations in use have 1 GB
MAX_LINE = 1 << 26  # bytes of a line
MAX_DEPTH = 64
MAX_DIGITS = 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, where: str, nan: bool = False) -> Any:
    """The value of a JSON text. where: what errors call it. A byte order mark is passed over. nan: take NaN and
    Infinity, which our own results may hold.

    Raises UserError saying what is wrong.
    """
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not JSON: is not UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        value = (_LENIENT if nan else _STRICT).decode(text)
        _check_depth(value)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{where}: not JSON that is read here: nested more than {MAX_DEPTH} levels deep") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: not JSON that is read here: half of a surrogate pair in a text") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    return value


def read_json(path: str | Path, kind: type = dict, nan: bool = False) -> Any:
    """The value in a JSON file, of a type. Raises UserError; FileNotFoundError where there is no such file."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: more than {MAX_BYTES} bytes")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    value = parse_json(raw, str(path), nan)
    if not isinstance(value, kind):
        raise UserError(f"{path}: JSON is a {type(value).__name__}, expected {kind.__name__}")
    return value


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", object) for each line of JSON; blank lines are passed over. Raises UserError with the line."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise UserError(f"{where}: longer than {MAX_LINE} bytes")
        value = parse_json(line, where)
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(value).__name__}")
        yield where, value


def _lines(path: str | Path) -> Iterator[bytes]:
    try:
        with Path(path).open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise RecursionError


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return found


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_no_key_twice, parse_int=_int, parse_float=_float, parse_constant=_constant
)
_LENIENT = json.JSONDecoder(object_pairs_hook=_no_key_twice, parse_int=_int)
