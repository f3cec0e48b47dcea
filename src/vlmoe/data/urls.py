"""Files named by path or URL: what they are called, which a pattern stands for, and what has another attempt."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from vlmoe.config import UserError
from vlmoe.data.accounts import short, shown_below

PIPE = "pipe:"
LONGEST_PAUSE = 60.0  # seconds between two attempts; the first pause takes one, each further one twice as long
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_GONE = {FileNotFoundError: "not found", PermissionError: "no permission"}  # another attempt finds the same
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}  # of botocore and google
_QUIET = 60  # seconds without a byte after which an HTTP connection has failed

T = TypeVar("T")


@dataclass(frozen=True)
class FetchOptions:
    """folder: "" is vlmoe/files in the user's cache folder. limit: bytes kept there. attempts: of one file."""

    folder: str = ""
    limit: int = 50_000_000_000
    attempts: int = 5


class FetchError(Exception):
    """Why a file cannot be had, in words."""


def is_url(name: str) -> bool:
    return name.startswith(PIPE) or _PROTOCOL.match(name) is not None


def local_path(name: str) -> str:
    """file:///a/b is /a/b; other names stay as they are."""
    return name.removeprefix("file://") if name.startswith("file://") else name


def file_name(name: str) -> str:
    """The last part of a path or URL, without a query; a pipe's whole command."""
    if name.startswith(PIPE):
        return name
    return posixpath.basename(without_query(name)) if is_url(name) else os.path.basename(name)


def without_query(name: str) -> str:
    """A URL as it may be shown: queries hold signatures and tokens, and what stands before "@" a password."""
    if not name.startswith(("http://", "https://")):
        return name
    return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", name, maxsplit=1)[0])


def shown_names(names: Sequence[str]) -> list[str]:
    """How files are called in keys: by their file's name, where two share one by more of it."""
    if not any(map(is_url, names)):
        return shown_below([Path(name) for name in names])
    files = [file_name(name) for name in names]
    if len(set(files)) < len(files):
        files = [without_query(name) for name in names]
    return [short(os.fsencode(name)) for name in files]


def expand_url(name: str, suffix: str, attempts: int = FetchOptions.attempts) -> list[str]:
    """The URLs that one with wildcards, or a folder's, stands for, in order; any other stands for itself.

    suffix: of the files wanted from a folder. Raises UserError when the place cannot be listed.
    """
    http = name.startswith(("http://", "https://"))
    wild = "*" in name if http else glob.has_magic(name)
    if name.startswith(PIPE) or (not wild and (http or name.lower().endswith(suffix))):
        return [name]

    def listed() -> list[str]:
        files, path = filesystem(name)
        if wild:
            found = files.glob(path)
            if not found:
                files.ls(re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0])  # raises where that is missing
        elif files.isdir(path):
            found = [f for f in files.find(path) if f.lower().endswith(suffix)]
        else:
            return [name]
        return sorted(files.unstrip_protocol(f) for f in found)

    try:
        with credentials_of(name):
            return persist(listed, attempts, gone(name))
    except FetchError as error:
        raise UserError(f"{without_query(name)}: cannot be listed: {error}") from None


def persist(attempt: Callable[[], T], attempts: int, sure: tuple[type[Exception], ...] = ()) -> T:
    """What `attempt` returns, after so many attempts at most, with growing pauses. sure: errors that another one would
    only repeat.

    Raises FetchError with the last one's words. A UserError passes.
    """
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # each protocol has its own
            last = error
            if isinstance(error, sure) or type(error).__name__ in _NO_CREDENTIALS:
                break
        if number < attempts:
            time.sleep(min(2.0 ** (number - 1), LONGEST_PAUSE))
    raise FetchError(_said(last) + (f" ({number} attempts)" if number > 1 else "")) from last


def _said(error: Exception) -> str:
    if words := getattr(error, "strerror", None):
        return str(words)
    text = re.sub(r"https?://\S+", lambda url: without_query(url[0]), " ".join(str(error).split()))
    kind = next((words for kind, words in _GONE.items() if isinstance(error, kind)), "")
    return ": ".join(part for part in (kind, text) if part) or type(error).__name__


def gone(name: str) -> tuple[type[Exception], ...]:
    """Errors that say for sure that a file cannot be had. Over HTTP any failure may look like a missing file."""
    return () if name.startswith(("http://", "https://", PIPE)) else tuple(_GONE)


@contextmanager
def credentials_of(url: str) -> Iterator[None]:
    """Turns a FetchError for want of credentials into a UserError: no other file could be had either."""
    try:
        yield
    except FetchError as error:
        if type(error.__cause__).__name__ in _NO_CREDENTIALS:
            place = url.partition("://")[0]
            raise UserError(
                f"{without_query(url)}: {error}: set them in the environment or in the file where other programs for "
                f"{place}:// look for them"
            ) from None
        raise


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises UserError where its library is missing."""
    if "::" in url:
        raise UserError(f"{without_query(url)}: chained URLs are not read; name the files themselves")
    options: dict[str, Any] = {}
    try:
        if url.startswith(("http://", "https://")):
            import aiohttp

            # its default ends every transfer after five minutes, however well it goes
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_QUIET)}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{without_query(url)}: {error}; pip install 'vlmoe[cloud]' has what is needed") from None
    except ValueError as error:  # no such protocol
        raise UserError(f"{without_query(url)}: {error}") from None
