"""Files brought here whole, by path or URL, and kept in a folder of bounded size.

A file is complete before anything of it is read. So what can fail fails in one place, where it is tried again, and
what is read is a local file like any other. fsspec knows the protocols; its own caches have no bound in bytes, so the
folder is ours: the files used longest ago go first, and one that is being read stays readable until it is closed.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmoe.config import UserError
from vlmoe.data.urls import (
    PIPE,
    FetchError,
    FetchOptions,
    Stat,
    credentials_of,
    filesystem,
    gone,
    is_url,
    look_up,
    persist,
    without_query,
)

ALLOW_PIPE = "VLMOE_ALLOW_PIPE"
_LEFT_BEHIND = 86_400  # seconds after which an unfinished download is nobody's any more
_OPEN = 128  # files kept open, of each list


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmoe"


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
    """Opens files by path or URL. listed: what is known of URLs; of others their place is asked each time."""

    def __init__(self, options: FetchOptions, listed: Mapping[str, Stat] | None = None) -> None:
        self.options, self.listed = options, dict(listed or {})
        self.folder = Path(options.folder) if options.folder else cache_folder() / "files"

    def open(self, name: str) -> OpenFile:
        """A whole, local file of this name. Several attempts are made, with growing pauses.

        Raises FetchError after the last attempt, UserError for what no attempt can mend.
        """
        if not is_url(name):
            return persist(lambda: OpenFile(os.open(name, os.O_RDONLY)), self.options.attempts, gone(name))
        with credentials_of(name):
            return persist(lambda: OpenFile(self._open(name)), self.options.attempts, gone(name))

    def made_folder(self) -> Path:
        """The folder, which is there now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def _open(self, url: str) -> int:
        bring, identity = _piped(url) if url.startswith(PIPE) else self._remote(url)
        digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        place = self.made_folder() / f"{digest}.file"
        with self._lock(digest[:2]):  # of several processes that want the same file one brings it
            with suppress(FileNotFoundError):
                descriptor = os.open(place, os.O_RDONLY)
                os.utime(place, ns=(now := time.time_ns(), now))
                return descriptor
            temporary = f"{place}.{os.getpid()}.{threading.get_ident()}.tmp"
            try:
                bring(temporary)
                os.utime(temporary, ns=(now := time.time_ns(), now))
                descriptor = os.open(temporary, os.O_RDONLY)
                os.replace(temporary, place)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
        self._trim()
        return descriptor

    def _remote(self, url: str) -> tuple[Callable[[str], None], str]:
        """What brings a file to a place, and what tells it from others and from later states of itself."""
        about = self.listed.get(url) or look_up(url)

        def bring(place: str) -> None:
            files, path = filesystem(url)
            files.get_file(path, place)
            found = os.path.getsize(place)
            if about.size is not None and found != about.size:
                self.listed.pop(url, None)  # it may have changed since: the next attempt asks
                raise OSError(f"{found} of {about.size} bytes came")

        return bring, f"{url}\n{about.version}\n{about.size}"

    def _trim(self) -> None:
        """Keep within the limit. Files that someone has open keep their content until they are closed. When a file was
        used last is its time of change: what the kernel notes of readings is too coarse to tell files apart."""
        with self._lock("trim"):
            kept: list[tuple[int, int, str]] = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    about = entry.stat()
                    if entry.name.endswith(".tmp") and about.st_mtime < time.time() - _LEFT_BEHIND:
                        os.unlink(entry.path)
                    elif entry.name.endswith(".file"):
                        kept.append((about.st_mtime_ns, about.st_size, entry.path))
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
    """Files of a list, by their numbers; those used last stay open. what: what errors call one of them. listed: as of
    `Files`."""

    def __init__(
        self, names: Sequence[str], options: FetchOptions, what: str, listed: Mapping[str, Stat] | None = None
    ) -> None:
        self.names, self.files, self.what = names, Files(options, listed), what
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
