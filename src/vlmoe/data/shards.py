"""WebDataset shards (.tar files) by random access.

A shard's headers are read once and give each member's place (`shard_index`); after that a sample is a few reads at
known offsets. So samples can be taken in any order. Shards that a URL names are brought whole, all of them, before the
first sample; where they are too many for that, `stream` reads them shard by shard. Which members make a sample: see
`members`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import braceexpand
import numpy as np

from vlmoe.config import UserError
from vlmoe.data.accounts import Account, account_of_files, short
from vlmoe.data.fetch import FileList, OpenFile
from vlmoe.data.files import FileOptions, FileSource, Parts, decode_codes, decode_json, decode_text
from vlmoe.data.members import PARTS
from vlmoe.data.rows import SplitRows
from vlmoe.data.sample import BadSample
from vlmoe.data.shard_index import MAX_PART_BYTES, Indexes, ShardIndex, index_shards, scan_shard
from vlmoe.data.urls import (
    FetchError,
    Stat,
    expand_url,
    file_name,
    is_url,
    local_path,
    shown_names,
    without_query,
)
from vlmoe.data.walk import walk_files


def expand_shards(pattern: str, listed: dict[str, Stat] | None = None) -> list[str]:
    """Shard files of a pattern with braces (train-{000..017}.tar) and wildcards (** for any folders), or of a folder
    and those below it, in order. URLs take braces and wildcards too; whether one that is named exists shows when it is
    read. listed: as of `expand_url`.

    Raises UserError when a named file does not exist, nothing matches, or a file is compressed.
    """
    found: list[str] = []
    try:
        names = braceexpand.braceexpand(pattern, escape=False)
    except ValueError as error:  # of a pattern with unbalanced braces
        raise UserError(f"shards {pattern}: {error}") from None
    for name in map(local_path, names):
        if is_url(name):
            found += expand_url(name, ".tar", listed=listed)
        elif os.path.isdir(name):
            found += [os.path.join(name, f) for f in sorted(walk_files(name).files) if f.lower().endswith(".tar")]
        elif glob.has_magic(name) and not os.path.exists(name):
            found += [p for p in sorted(glob.glob(name, recursive=True)) if os.path.isfile(p)]
        elif os.path.isfile(name):
            found.append(name)
        else:
            raise UserError(f"shards {pattern}: no file {name}")
    if not found:
        raise UserError(f"shards {pattern}: no file matches")
    for path in found:
        if not is_url(path):
            _check_plain(path)
    return list(dict.fromkeys(found))


def _check_plain(path: str) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read: {error.strerror or error}") from None
    if compressed(magic):
        raise UserError(f"shard {path}: compressed; a plain .tar file is needed")


def compressed(magic: bytes) -> bool:
    """Whether a file of these first four bytes is gzip, zstd or bzip2."""
    return magic[:2] == b"\x1f\x8b" or magic == b"\x28\xb5\x2f\xfd" or magic[:3] == b"BZh"


def read_entry(descriptor: int, index: ShardIndex, entry: int, key: str, options: FileOptions, image: bool) -> Parts:
    """The raw parts of an entry of a shard, the image only if asked for. Raises BadSample."""
    if entry >= len(index.keys):
        raise BadSample(key, index.damage)
    parts = Parts()
    raw = {p: _part(descriptor, index, entry, p, key) for p in PARTS if image or p in {"txt", "json"}}
    about = None
    if raw["json"] is not None and (options.factors or (raw["txt"] is None and options.kind != "image")):
        about = decode_json(raw["json"], key)
    if raw["txt"] is not None and options.kind != "image":
        parts.captions = decode_text(raw["txt"], key)
    elif about is not None:
        parts.captions = about.get(options.text_column)
    parts.truth = about if options.factors else None
    parts.image = raw.get("image")
    if options.patches and raw.get("codes") is not None:
        parts.codes = decode_codes(raw["codes"], key)  # type: ignore[arg-type]
    return parts


def _part(descriptor: int, index: ShardIndex, entry: int, part: str, key: str) -> bytes | None:
    column = PARTS.index(part)
    offset, size = int(index.offsets[entry, column]), int(index.sizes[entry, column])
    if size < 0:
        return None
    if size > MAX_PART_BYTES:
        raise BadSample(key, f"{part} of more than {MAX_PART_BYTES} bytes")
    try:
        raw = os.pread(descriptor, size, offset)
    except OSError as error:
        raise BadSample(key, f"cannot be read: {error.strerror or error}") from None
    if len(raw) < size:
        raise BadSample(key, f"{part} cut off: the shard has become shorter")
    return raw


class OpenShard:
    """A shard at hand. Raises FetchError where it is compressed."""

    def __init__(self, file: OpenFile, options: FileOptions) -> None:
        if compressed(os.pread(file.descriptor, 4, 0)):
            raise FetchError("compressed; a plain .tar file is needed")
        self.file, self.index, self.options = file, scan_shard(file.descriptor), options

    def __len__(self) -> int:
        return len(self.index)

    def key(self, entry: int, shard: str) -> str:
        """shard: what it is called in keys."""
        return f"{shard}/{short(self.index.keys[entry])}" if entry < len(self.index.keys) else shard

    def read(self, entry: int, key: str, image: bool) -> Parts:
        """Raises BadSample."""
        return read_entry(self.file.descriptor, self.index, entry, key, self.options, image)


class ShardSource(FileSource):
    """Samples of WebDataset shards.

    Image: a member of a format that Pillow reads. Caption: the .txt member, else `text_column` of the .json member (a
    text or a list of texts). Codes: the codes.npy member. A damaged shard gives its whole samples and one bad one that
    says so.

    shards: their names, instead of those that the options' path stands for; of few, none may be held out.

    Raises UserError when shards cannot be had, or those of URLs together exceed what is kept of such files.
    """

    def __init__(self, options: FileOptions, shards: list[str] | None = None) -> None:
        super().__init__(options)
        listed: dict[str, Stat] = {}
        self.shards = shards or expand_shards(options.path, listed)
        self.files = FileList(self.shards, options.fetch, "shard", listed)
        if any(map(is_url, self.shards)):
            self.indexes = Indexes(dict(enumerate(self._scan(bounded=shards is None))), [])
        else:
            self.indexes = index_shards(self.shards)
        counts = self.indexes.counts.tolist()
        self.starts = np.cumsum([0, *counts])
        self.shown = shown_names(self.shards)
        names = [file_name(name) for name in self.shards]
        self.rows = SplitRows(names, counts, options.split, options.held_out, at_least_one=shards is None)

    def _scan(self, bounded: bool) -> Iterator[ShardIndex]:
        for name, file in zip(self.shards, self.files.bring(bounded), strict=True):
            if compressed(os.pread(file.descriptor, 4, 0)):
                raise UserError(f"shard {without_query(name)}: compressed; a plain .tar file is needed")
            yield scan_shard(file.descriptor)

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, entry in it)."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])

    def key(self, row: int) -> str:
        shard, entry = self.locate(row)
        keys, name = self.indexes[shard].keys, self.shown[shard]
        return f"{name}/{short(keys[entry])}" if entry < len(keys) else name

    def read(self, row: int, image: bool) -> Parts:
        shard, entry = self.locate(row)
        key = self.key(row)
        try:
            file = self.files[shard]
        except FetchError as error:
            raise BadSample(key, f"cannot be read: {error}") from None
        return read_entry(file.descriptor, self.indexes[shard], entry, key, self.options, image)

    def account(self) -> Account:
        found = account_of_files(self.options.path, [Path(name) for name in self.shards], ".tar")
        found.members = sum(self.indexes[shard].members for shard in range(len(self.shards)))
        for shard, name in enumerate(self.shown):
            found.ignored_members.merge(self.indexes[shard].ignored, name)
        return found
