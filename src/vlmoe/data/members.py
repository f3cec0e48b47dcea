"""Which members of a shard make a sample.

WebDataset takes members side by side as one sample whose names are equal up to the first dot of the file name; what
follows names the field: 000017.jpg, 000017.txt, 000017.codes.npy. Its rule (`base_plus_ext`) gives "22.05.jpg" and
"22.06.jpg" the key "22" and the fields "05.jpg" and "06.jpg", and "a.input.jpg" the field "input.jpg". Here the last
suffix says what a member is, and what stands between is its middle ("05", "input"):

- Where each part occurs once among the members of a key they are one sample, whatever their middles.
- Where a part occurs more than once, members without middle are one sample; those of one middle are a sample of
  their own if they have both image and text, or if no member of the key is without middle. Others are ignored, and
  counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlmoe.data.accounts import Ignored, hidden, no_picture
from vlmoe.data.images import SUFFIXES

PARTS = ("image", "txt", "json", "codes")  # columns of an index
_SUFFIXES = {s.encode(): "image" for s in SUFFIXES} | {b"txt": "txt", b"json": "json"}


@dataclass(frozen=True, slots=True)
class Named:
    """key: up to the first dot of the file name, with folders. middle: between it and the suffix. part: of PARTS."""

    key: bytes
    middle: bytes
    part: str


def name_of(name: bytes) -> Named | str:
    """What a member's name says, or why it can be no part of a sample."""
    folder, slash, file = name.rpartition(b"/")
    if (reason := hidden(name)) is not None:
        return reason
    stem, _, rest = file.partition(b".")
    middle, _, suffix = rest.rpartition(b".")
    part = _SUFFIXES.get(suffix.lower())
    if suffix.lower() == b"npy" and (middle.lower() == b"codes" or middle.lower().endswith(b".codes")):
        middle, part = middle[: -len(b".codes")], "codes"
    return no_picture(suffix) if part is None else Named(folder + slash + stem, middle, part)


def entries_of(members: list[tuple[Named, Any]], ignored: Ignored) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(key, {part: member}) of the samples among members of one key, in order; the rest goes to `ignored`."""
    run: list[tuple[Named, Any]] = []
    seen: set[Named] = set()
    for named, member in members:
        if named in seen:  # the same name again: another sample of the same key
            yield from _entries(run, ignored)
            run, seen = [], set()
        run.append((named, member))
        seen.add(named)
    yield from _entries(run, ignored)


def _entries(members: list[tuple[Named, Any]], ignored: Ignored) -> Iterator[tuple[bytes, dict[str, Any]]]:
    by_middle: dict[bytes, dict[str, Any]] = {}
    for named, member in members:
        by_middle.setdefault(named.middle, {})[named.part] = member
    key = members[0][0].key
    if len({named.part for named, _ in members}) == len(members):
        middle = next(iter(by_middle)) if len(by_middle) == 1 else b""
        yield _joined(key, middle), {named.part: member for named, member in members}
        return
    for middle, parts in by_middle.items():
        if not middle or b"" not in by_middle or ("image" in parts and ("txt" in parts or "json" in parts)):
            yield _joined(key, middle), parts
        else:
            for member in parts.values():
                ignored.add("another part of the sample that shares its name up to the first dot", member.name)


def _joined(key: bytes, middle: bytes) -> bytes:
    return key + b"." + middle if middle else key
