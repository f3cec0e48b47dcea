"""The headers of a tar file, read with distrust: every step leads forward, and no size is believed past the file's end.

The standard library's reader goes backwards on a negative size and builds an object for each header. Here a header is
checked and answered with a name, a place and a kind. Read are the formats of POSIX.1-1988 (ustar), 2001 (pax) and GNU
tar; sparse members are named, not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
MAX_EXTRA = 1 << 20  # bytes of a long name or of pax records
_CHECKSUM = slice(148, 156)
_REGULAR, _LONG = b"\x0007", b"LK"
_KINDS = {ord("1"): "hard link", ord("2"): "symbolic link", ord("3"): "device", ord("4"): "device", ord("5"): "folder",
          ord("6"): "pipe", ord("S"): "sparse file"}  # fmt: skip


@dataclass(slots=True)
class Member:
    """name: as stored, without checking its encoding. kind: "file", or what else it is. offset, size: of its data."""

    name: bytes
    kind: str
    offset: int
    size: int


class DamagedTar(Exception):  # noqa: N818 - says what is wrong with the rest of a file
    """What is wrong, in words; `member`: the name of a member that is not whole, else None."""

    def __init__(self, reason: str, member: bytes | None = None) -> None:
        super().__init__(reason)
        self.member = member


def read_members(tar: Path | int) -> Iterator[Member]:
    """The members of a tar file in order. tar: its path, or a descriptor, which stays open.

    Raises DamagedTar where the file cannot be followed further.
    """
    with open(tar, "rb", buffering=0, closefd=not isinstance(tar, int)) as file:
        yield from _Headers(file.fileno(), os.fstat(file.fileno()).st_size).members()


class _Headers:
    def __init__(self, file: int, end: int) -> None:
        self.file, self.end, self.at = file, end, 0

    def members(self) -> Iterator[Member]:
        everywhere: dict[bytes, bytes] = {}
        while (header := self._header()) is not None:
            here: dict[bytes, bytes] = {}
            while (kind := header[156]) in b"xgXLK":
                extra = self._extra(_number(header[124:136], "size"))
                if kind in _LONG:
                    if kind == ord("L"):
                        here[b"path"] = extra.partition(b"\0")[0]
                elif kind == ord("g"):
                    everywhere |= _pax(extra)
                else:
                    here |= _pax(extra)
                following = self._header()
                if following is None:
                    raise DamagedTar("a long name or pax records without a member")
                header = following
            yield self._member(header, everywhere | here)

    def _member(self, header: bytes, pax: dict[bytes, bytes]) -> Member:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        name = pax.get(b"path") or (prefix + b"/" + name if prefix else name)
        kind = "file" if header[156] in _REGULAR else _KINDS.get(header[156], "special file")
        if kind == "file" and name.endswith(b"/"):  # as tar wrote folders before there was a kind for them
            kind = "folder"
        if kind == "file" and any(key.startswith(b"GNU.sparse.") for key in pax):
            kind = "sparse file"
        size = _decimal(pax[b"size"]) if b"size" in pax else _number(header[124:136], "size")
        if kind == "sparse file" and header[156] == ord("S"):
            more = header[482]
            while more:
                block = self._block()
                if len(block) < BLOCK:
                    raise DamagedTar("unexpected end of data", name)
                more = block[504]
        if kind not in {"file", "sparse file", "special file"}:
            size = 0  # links, folders and devices have no data, whatever their header says
        member = Member(name.rstrip(b"/"), kind, self.at, size)
        self.at += -(-size // BLOCK) * BLOCK
        if member.offset + size > self.end:
            raise DamagedTar("unexpected end of data", name)
        return member

    def _block(self) -> bytes:
        block = os.pread(self.file, BLOCK, self.at)
        self.at += BLOCK
        return block

    def _header(self) -> bytes | None:
        """The next header; None at the end-of-archive mark, a block of zeros."""
        header = self._block()
        if header == bytes(BLOCK):
            return None
        if not header:
            raise DamagedTar("no end-of-archive mark")
        if len(header) < BLOCK:
            raise DamagedTar("unexpected end of data")
        said = _number(header[_CHECKSUM], "checksum")
        found = sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")
        if said != found and said != found - 256 * sum(b > 127 for b in header[:148] + header[156:]):  # of signed bytes
            raise DamagedTar("bad checksum of a header")
        return header

    def _extra(self, size: int) -> bytes:
        if size > MAX_EXTRA:
            raise DamagedTar(f"a name or pax records of {size} bytes, more than {MAX_EXTRA}")
        raw = os.pread(self.file, size, self.at)
        if len(raw) < size:
            raise DamagedTar("unexpected end of data")
        self.at += -(-size // BLOCK) * BLOCK
        return raw


def _number(field: bytes, what: str) -> int:
    """A header's number: octal digits, or a number to the base 256 where the first bit is set."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise DamagedTar(f"a header's {what} is negative or too large")
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.partition(b"\0")[0].strip(b" ")
        if digits.strip(b"01234567"):
            raise DamagedTar(f"a header's {what} is no number")
        value = int(digits or b"0", 8)
    if value >> 62:
        raise DamagedTar(f"a header's {what} is too large")
    return value


def _decimal(raw: bytes) -> int:
    if not 0 < len(raw) < 19 or raw.strip(b"0123456789"):
        raise DamagedTar("a size in pax records is no number that a file can have")
    return int(raw)


def _pax(raw: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n"."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(raw) and raw[at]:
        length, blank, _ = raw[at : at + 20].partition(b" ")
        if not blank or not length or length.strip(b"0123456789"):
            raise DamagedTar("broken pax records")
        stop = at + int(length)
        key, equals, value = raw[at + len(length) + 1 : stop - 1].partition(b"=")
        if stop > len(raw) or raw[stop - 1 : stop] != b"\n" or not equals:
            raise DamagedTar("broken pax records")
        found[key] = value
        at = stop
    return found
