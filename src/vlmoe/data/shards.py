"""WebDataset shards (.tar files) by random access.

A shard's headers are read once and give each member's place (`shard_index`); after that a sample is a few reads at
known offsets. So samples can be taken in any order. Shards that a URL names are brought whole, all of them, before the
first sample; where they are too many for that, `stream` reads them shard by shard. Which members make a sample: see
`members`.
"""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from pathlib import Path

import braceexpand
import numpy as np

from vlmoe.config import UserError
from vlmoe.data.accounts import Account, account_of_files, short, shown_below
from vlmoe.data.files import FileOptions, FileSource, Parts, decode_codes, decode_json, decode_text
from vlmoe.data.members import PARTS
from vlmoe.data.rows import SplitRows
from vlmoe.data.sample import BadSample
from vlmoe.data.shard_index import MAX_PART_BYTES, Indexes, ShardIndex, index_shards, scan_shard
from vlmoe.data.urls import FetchError, Files, OpenFile, expand_url, file_name, is_url, local_path, without_query
from vlmoe.data.walk import walk_files

_OPEN = 128  # shards kept open, of each source


def expand_shards(pattern: str) -> list[str]:
    """Shard files of a pattern with braces (train-{000..017}.tar) and wildcards (** for any folders), or of a folder
    and those below it, in order. URLs take braces and wildcards too; whether one that is named exists shows when it is
    read.

    Raises UserError when a named file does not exist, nothing matches, or a file is compressed.
    """
    found: list[str] = []
    try:
        names = braceexpand.braceexpand(pattern, escape=False)
    except ValueError as error:  # of a pattern with unbalanced braces
        raise UserError(f"shards {pattern}: {error}") from None
    for name in map(local_path, names):
        if is_url(name):
            found += expand_url(name, ".tar")
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


def shown_shards(names: list[str]) -> list[str]:
    """How shards are called in keys: by their file's name, where two share one by more of it."""
    if not any(map(is_url, names)):
        return shown_below([Path(name) for name in names])
    files = [file_name(name) for name in names]
    if len(set(files)) < len(files):
        files = [without_query(name) for name in names]
    return [short(os.fsencode(name)) for name in files]


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
        self.shards = shards or expand_shards(options.path)
        self.files = Files(options.fetch)
        self._open: OrderedDict[int, OpenFile] = OrderedDict()  # the shards used last
        if any(map(is_url, self.shards)):
            limit = options.fetch.limit if shards is None else None
            self.indexes = Indexes(dict(enumerate(self._bring(limit))), [])
        else:
            self.indexes = index_shards(self.shards)
        counts = self.indexes.counts.tolist()
        self.starts = np.cumsum([0, *counts])
        self.shown = shown_shards(self.shards)
        names = [file_name(name) for name in self.shards]
        self.rows = SplitRows(names, counts, options.split, options.held_out, at_least_one=shards is None)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _bring(self, limit: int | None) -> list[ShardIndex]:
        indexes, size = [], 0
        for shard, name in enumerate(self.shards):
            try:
                file = self._opened(shard)
            except FetchError as error:
                raise UserError(f"shard {without_query(name)}: cannot be read: {error}") from None
            size += file.size
            if limit is not None and size > limit:
                raise UserError(
                    f"shards {self.options.path}: {shard + 1} of {len(self.shards)} have {size / 1e9:.3g} GB already, "
                    f"more than data.stream.cache_gb = {limit / 1e9:g}, and random access needs all "
                    "of them: read them with `read: stream`, or set it higher"
                )
            if compressed(os.pread(file.descriptor, 4, 0)):
                raise UserError(f"shard {without_query(name)}: compressed; a plain .tar file is needed")
            indexes.append(scan_shard(file.descriptor))
        return indexes

    def _opened(self, shard: int) -> OpenFile:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = self.files.open(self.shards[shard])
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return self._open[shard]

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
            file = self._opened(shard)
        except FetchError as error:
            raise BadSample(key, f"cannot be read: {error}") from None
        return read_entry(file.descriptor, self.indexes[shard], entry, key, self.options, image)

    def account(self) -> Account:
        found = account_of_files(self.options.path, [Path(name) for name in self.shards], ".tar")
        found.members = sum(self.indexes[shard].members for shard in range(len(self.shards)))
        for shard, name in enumerate(self.shown):
            found.ignored_members.merge(self.indexes[shard].ignored, name)
        return found
