"""Files named by path or URL: what they are called, which a pattern stands for, and what has another attempt."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
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
_VERSION = (  # what tells a file's states apart, as file systems call it, surest first
    "ETag", "etag", "generation", "blob_id", "sha", "LastModified", "Last-Modified", "last_modified", "mtime", "modify",
    "modificationTime", "created",
)  # fmt: skip
_HELD: list[list[Any]] = []  # file systems that were there at a fork

T = TypeVar("T")


@dataclass(frozen=True)
class FetchOptions:
    """folder: "" is vlmoe/files in the user's cache folder. limit: bytes kept there. attempts: of one file."""

    folder: str = ""
    limit: int = 50_000_000_000
    attempts: int = 5


@dataclass(frozen=True)
class Stat:
    """size: bytes; None where the place does not say. version: tells a file from later states of itself."""

    size: int | None
    version: str


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


def expand_url(
    name: str, suffix: str, attempts: int = FetchOptions.attempts, listed: dict[str, Stat] | None = None
) -> list[str]:
    """The URLs that one with wildcards, or a folder's, stands for, in order; any other stands for itself.

    suffix: of the files wanted from a folder. listed: gets what the listing says of them, so that nobody need ask
    again.

    Raises UserError when the place cannot be listed, or the library that it needs is missing.
    """
    http = name.startswith(("http://", "https://"))
    wild = "*" in name if http else glob.has_magic(name)
    if name.startswith(PIPE):
        return [name]
    _load_library(name)
    if not wild and (http or name.lower().endswith(suffix)):
        return [name]

    def found() -> list[str]:
        files, path = filesystem(name)
        if wild:
            there = files.glob(path, detail=True)
            if not there:
                files.ls(re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0])  # raises where that is missing
        elif files.isdir(path):
            there = {f: about for f, about in files.find(path, detail=True).items() if f.lower().endswith(suffix)}
        else:
            return [name]
        urls = {files.unstrip_protocol(f): _stat(about) for f, about in there.items()}
        if listed is not None:
            listed.update({url: stat for url, stat in urls.items() if stat is not None and stat.size is not None})
        return sorted(urls)

    try:
        with credentials_of(name):
            return persist(found, attempts, gone(name))
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


def look_up(url: str) -> Stat:
    """What the place says of a file, which is asked once. Raises whatever the protocol does."""
    files, path = filesystem(url)
    about = files.info(path)
    return _stat(about) or Stat(about.get("size"), str(files.ukey(path)))


def _stat(about: Mapping[str, Any]) -> Stat | None:
    """None where nothing of it would change with the file."""
    name = next((name for name in _VERSION if about.get(name)), None)
    if name is None:
        return None
    value = about[name]
    version = value.timestamp() if isinstance(value, datetime) else value  # which of the two may differ in a listing
    return Stat(about.get("size"), f"{name} {version}")


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises UserError where its library is missing."""
    options: dict[str, Any] = {}
    with _library_of(url):
        if url.startswith(("http://", "https://")):
            import aiohttp

            # its default ends every transfer after five minutes, however well it goes
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_QUIET)}
        files, path = fsspec.core.url_to_fs(url, **options)
    return files, path


def _hold() -> None:
    classes = [fsspec.AbstractFileSystem]
    for each in classes:
        classes += each.__subclasses__()
    _HELD.append([files for each in classes for files in list(each._cache.values())])


# A forked process cannot use the file systems made before, whoever made them, and fsspec lets go of them there: then
# each session waits a second for the thread that served it, which did not come along. So a fork keeps them for good.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=lambda: _HELD.pop())


def _load_library(url: str) -> None:
    """Import what reads a URL and nothing more, so that processes forked from this one have it at hand: some take
    longer to import than to bring a file. Raises UserError where it is missing."""
    with _library_of(url):
        fsspec.get_filesystem_class(url.partition("://")[0])


@contextmanager
def _library_of(url: str) -> Iterator[None]:
    if "::" in url:
        raise UserError(f"{without_query(url)}: chained URLs are not read; name the files themselves")
    try:
        yield
    except ImportError as error:
        raise UserError(f"{without_query(url)}: {error}; pip install 'vlmoe[cloud]' has what is needed") from None
    except ValueError as error:  # no such protocol
        raise UserError(f"{without_query(url)}: {error}") from None
