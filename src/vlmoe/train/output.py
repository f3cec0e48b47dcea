"""A standard output that nobody reads any more costs no run: `vlmoe pretrain demo | head` trains to its end."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe has ended; the terminal is closed


class Forgiving:
    """A text stream whose writes go nowhere from the first failure on. failure: that one, None before."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._forgiven():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is buffered, and what others write there, goes there too
            os.close(nowhere)
            with contextlib.suppress(OSError):
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving_output() -> Iterator[list[OSError]]:
    """Standard output and error forgive within this block.

    Yields a list that holds, after the block, why output was lost if not because its reader has gone: a full disk.
    """
    failures: list[OSError] = []
    for descriptor in (0, 1, 2):  # one that is closed would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    streams = [None if stream is None else Forgiving(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield failures
    finally:
        for stream in filter(None, streams):
            stream.flush()
            if stream.failure is not None and stream.failure.errno not in GONE:
                failures.append(stream.failure)
        sys.stdout, sys.stderr = before
