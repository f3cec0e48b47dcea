"""Files named by path or URL: found by pattern, brought here whole, and kept in a folder of bounded size.

A file is complete before anything of it is read. So what can fail fails in one place, where it is tried again, and
what is read is a local file like any other. fsspec knows the protocols; its own caches have no bound in bytes, so the
folder is ours: the files used longest ago go first, and one that is being read stays readable until it is closed.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import os
import posixpath
import re
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from vlmoe.config import UserError
from vlmoe.data.accounts import short, shown_below

PIPE, ALLOW_PIPE = "pipe:", "VLMOE_ALLOW_PIPE"
LONGEST_PAUSE = 60.0  # seconds between two attempts; the first pause takes one, each further one twice as long
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_LEFT_BEHIND = 86_400  # seconds after which an unfinished download is nobody's any more
_SURE = (FileNotFoundError, PermissionError)  # of a local file
_OPEN = 128  # files kept open, of each list
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
        files, path = _filesystem(name)
        if wild:
            found = files.glob(path)
        elif files.isdir(path):
            found = [f for f in files.find(path) if f.lower().endswith(suffix)]
        else:
            return [name]
        return sorted(files.unstrip_protocol(f) for f in found)

    try:
        return persist(listed, attempts)
    except FetchError as error:
        raise UserError(f"{without_query(name)}: cannot be listed: {error}") from None


class OpenFile:
    """A file that is open for reading, closed when nothing refers to it any more. Data workers may share it: it is read
    by `os.pread`, which moves nothing."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def reader(self) -> io.RawIOBase:
        """What reads it by a position of its own."""
        return _Reading(self)

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Reading(io.RawIOBase):
    def __init__(self, file: OpenFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = os.preadv(self._file.descriptor, [buffer], self._at)
        self._at += found
        return found


class Files:
    """Opens files by path or URL."""

    def __init__(self, options: FetchOptions) -> None:
        self.options = options
        self.folder = Path(options.folder) if options.folder else cache_folder() / "files"

    def open(self, name: str) -> OpenFile:
        """A whole, local file of this name. Several attempts are made, with growing pauses.

        Raises FetchError after the last attempt, UserError for what no attempt can mend.
        """
        if not is_url(name):
            return persist(lambda: OpenFile(os.open(name, os.O_RDONLY)), self.options.attempts, _SURE)
        return persist(lambda: OpenFile(self._open(name)), self.options.attempts)

    def made_folder(self) -> Path:
        """The folder, which is there now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def _open(self, url: str) -> int:
        bring, identity = _piped(url) if url.startswith(PIPE) else _remote(url)
        digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        place = self.made_folder() / f"{digest}.file"
        with self._lock(digest[:2]):  # of several processes that want the same file one brings it
            with suppress(FileNotFoundError):
                descriptor = os.open(place, os.O_RDONLY)
                os.utime(place, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))  # used now
                return descriptor
            temporary = f"{place}.{os.getpid()}.{threading.get_ident()}.tmp"
            try:
                bring(temporary)
                descriptor = os.open(temporary, os.O_RDONLY)
                os.replace(temporary, place)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
        self._trim()
        return descriptor

    def _trim(self) -> None:
        """Keep within the limit. Files that someone has open keep their content until they are closed."""
        with self._lock("trim"):
            kept: list[tuple[int, int, str]] = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    about = entry.stat()
                    if entry.name.endswith(".tmp") and about.st_mtime < time.time() - _LEFT_BEHIND:
                        os.unlink(entry.path)
                    elif entry.name.endswith(".file"):
                        kept.append((about.st_atime_ns, about.st_size, entry.path))
            total = sum(size for _, size, _ in kept)
            for _, size, path in sorted(kept):
                if total <= self.options.limit:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.folder / f"{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class FileList:
    """Files of a list, by their numbers; those used last stay open. what: what errors call one of them."""

    def __init__(self, names: Sequence[str], options: FetchOptions, what: str) -> None:
        self.names, self.files, self.what = names, Files(options), what
        self._open: OrderedDict[int, OpenFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> OpenFile:
        """Raises FetchError, UserError."""
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = self.files.open(self.names[number])
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return self._open[number]

    def bring(self, bounded: bool = True) -> Iterator[OpenFile]:
        """All of them, one after the other, so that they are at hand. bounded: those of URLs must fit the limit.

        Raises UserError.
        """
        size, limit = 0, self.files.options.limit
        for number, name in enumerate(self.names):
            try:
                file = self[number]
            except FetchError as error:
                raise UserError(f"{self.what} {without_query(name)}: cannot be read: {error}") from None
            size += file.size if is_url(name) else 0
            if bounded and size > limit:
                raise UserError(
                    f"{self.what} {without_query(name)}: {number + 1} of {len(self)} have {size / 1e9:.3g} GB already, "
                    f"more than data.stream.cache_gb = {limit / 1e9:g}, and random access needs all of them: read "
                    "them with `read: stream`, or set it higher"
                )
            yield file


class Ahead(threading.Thread):
    """A file that is brought while others are read."""

    def __init__(self, files: Files, name: str) -> None:
        super().__init__(daemon=True)
        self._files, self._name = files, name
        self._found: OpenFile | None = None
        self.error: FetchError | UserError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._files.open(self._name)
        except (FetchError, UserError) as error:
            self.error = error

    def take(self) -> OpenFile:
        """As `Files.open`; waits until it is here."""
        self.join()
        if self._found is None:
            raise self.error or FetchError("its download has ended without a word")
        return self._found


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmoe"


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
            said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, sure):
                break
        if number < attempts:
            time.sleep(min(2.0 ** (number - 1), LONGEST_PAUSE))
    raise FetchError(f"{said} ({number} attempts)" if number > 1 else said)


def _filesystem(url: str) -> tuple[Any, str]:
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


def _remote(url: str) -> tuple[Callable[[str], None], str]:
    """What brings a file to a place, and what tells it from others and from later states of itself."""
    files, path = _filesystem(url)
    size = files.info(path).get("size")

    def bring(place: str) -> None:
        files.get_file(path, place)
        found = os.path.getsize(place)
        if size is not None and found != size:
            raise OSError(f"{found} of {size} bytes came")

    return bring, f"{url}\n{files.ukey(path)}\n{size}"


def _piped(url: str) -> tuple[Callable[[str], None], str]:
    if os.environ.get(ALLOW_PIPE) != "1":
        raise UserError(
            f"{url}: a recipe that names a command has it run on this machine: set {ALLOW_PIPE}=1 in the environment "
            "to allow that"
        )

    def bring(place: str) -> None:
        with open(place, "wb") as file:
            done = subprocess.run(url.removeprefix(PIPE), shell=True, stdout=file, stderr=subprocess.PIPE)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the command ended with {done.returncode}{': ' + said if said else ''}")

    return bring, url
