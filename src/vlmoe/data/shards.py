"""WebDataset shards (.tar files) by random access.

A shard's headers are read once and give each member's place; after that a sample is a few reads at known offsets. So
samples can be taken in any order, which streaming a tar file cannot give. The index of a large shard is kept in the
user's cache folder, under a name made of path, size and time of change. Which members make a sample: see `members`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import braceexpand
import numpy as np

from vlmoe.config import UserError, parse_json
from vlmoe.data.accounts import Account, Ignored, account_of_files, short, shown_below
from vlmoe.data.files import (
    FileOptions,
    FileSource,
    Parts,
    decode_codes,
    decode_json,
    decode_text,
    hash_entries,
    split_rows,
)
from vlmoe.data.members import PARTS, Named, entries_of, name_of
from vlmoe.data.packed import Numbers, Packed, Packer
from vlmoe.data.sample import BadSample
from vlmoe.data.tar import DamagedTar, Member, read_members
from vlmoe.data.walk import walk_files

FORMAT = "3"  # of a cached index
MAX_PART_BYTES = 1 << 28  # no image, text or array of a sample is larger
_CACHED_FROM = 1 << 24  # bytes; smaller shards are scanned in no time


@dataclass
class ShardIndex:
    """Where the samples of a shard are.

    keys: (n,). offsets: int64 (n, 4), sizes: int32 (n, 4), of each of PARTS; size -1 where there is none, one that no
    part may have is cut to what fits.
    damage: why the rest of the file cannot be read, "" for a whole shard. members: how many there are; ignored: those
    of them that are no part of a sample.
    """

    keys: Packed
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str
    members: int = 0
    ignored: Ignored = field(default_factory=Ignored)


def expand_shards(pattern: str) -> list[Path]:
    """Shard files of a pattern with braces (train-{000..017}.tar) and wildcards (** for any folders), or of a folder
    and those below it, in order.

    Raises UserError when a named file does not exist, nothing matches, or a file is compressed.
    """
    found: list[Path] = []
    try:
        names = braceexpand.braceexpand(pattern, escape=False)
    except ValueError as error:  # of a pattern with unbalanced braces
        raise UserError(f"shards {pattern}: {error}") from None
    for name in names:
        if os.path.isdir(name):
            found += [Path(name) / f for f in sorted(walk_files(name).files) if f.lower().endswith(".tar")]
        elif glob.has_magic(name) and not os.path.exists(name):
            found += [Path(p) for p in sorted(glob.glob(name, recursive=True)) if os.path.isfile(p)]
        elif os.path.isfile(name):
            found.append(Path(name))
        else:
            raise UserError(f"shards {pattern}: no file {name}")
    if not found:
        raise UserError(f"shards {pattern}: no file matches")
    for path in found:
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise UserError(f"shard {path}: cannot be read: {error.strerror or error}") from None
        if magic[:2] == b"\x1f\x8b" or magic == b"\x28\xb5\x2f\xfd" or magic[:3] == b"BZh":
            raise UserError(f"shard {path}: compressed; random access needs a plain .tar file")
    return list(dict.fromkeys(found))


def index_shard(path: Path) -> ShardIndex:
    """Read a shard's headers, or its index from the cache."""
    stat = path.stat()
    if stat.st_size < _CACHED_FROM:
        return scan_shard(path)
    identity = f"{FORMAT}/{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    cached = _cache_folder() / f"{digest}.npz"
    try:
        with np.load(cached, allow_pickle=False) as file:
            about = parse_json(file["about"].tobytes(), str(cached))
            keys = Packed(file["keys"], file["ends"])
            return ShardIndex(
                keys, file["offsets"], file["sizes"], about["damage"], about["members"], Ignored.of(about["ignored"])
            )  # fmt: skip
    except Exception:  # missing or damaged: it is only a cache
        index = scan_shard(path)
    about = {"damage": index.damage, "members": index.members, "ignored": index.ignored.as_dict()}
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(
                file, keys=index.keys.buffer, ends=index.keys.ends, offsets=index.offsets, sizes=index.sizes, about=text
            )
        os.replace(temporary, cached)
    except OSError:  # a read-only home costs time at the next start, nothing else
        pass
    return index


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmoe" / "shards"


class _Scan:
    """Members of a shard, counted, with those left out that cannot be part of a sample."""

    def __init__(self, path: Path) -> None:
        self.path, self.members, self.ignored = path, 0, Ignored()
        self.damage = ""
        self.cut: Named | None = None  # the member that is not whole

    def __iter__(self) -> Iterator[tuple[Named, Member]]:
        try:
            for member in read_members(self.path):
                self.members += 1
                if member.kind != "file":
                    self.ignored.add(f"a {member.kind}, no file", member.name)
                    continue
                named = name_of(member.name)
                if isinstance(named, str):
                    self.ignored.add(named, member.name)
                else:
                    yield named, member
        except DamagedTar as error:
            self.damage = str(error)
            named = name_of(error.member) if error.member else ""
            self.cut = None if isinstance(named, str) else named


def scan_shard(path: Path) -> ShardIndex:
    """Find every sample of a shard by its headers. Whole samples before a damaged place are kept."""
    scan, keys, offsets, sizes = _Scan(path), Packer(), Numbers(), Numbers()
    last: bytes | None = None
    for _, group in groupby(scan, key=lambda pair: pair[0].key):
        members = list(group)
        if scan.cut is not None and scan.cut.key == members[0][0].key:  # the file ends within this sample
            for _, member in members:
                scan.ignored.add("part of a sample that is cut off", member.name)
            break
        for key, parts in entries_of(members, scan.ignored):
            keys.add(key)
            last = key
            for part in PARTS:
                offsets.add(parts[part].offset if part in parts else 0)
                sizes.add(min(parts[part].size, MAX_PART_BYTES + 1) if part in parts else -1)
    damage = scan.damage
    if damage:
        good = f"the last good key is {short(last)}" if last is not None else "nothing in it can be read"
        damage = f"truncated or damaged shard ({damage}); {good}"
    shape = -1, len(PARTS)
    where, size = offsets.array().reshape(shape), sizes.array().astype(np.int32).reshape(shape)
    return ShardIndex(keys.packed(), where, size, damage, scan.members, scan.ignored)


class ShardSource(FileSource):
    """Samples of WebDataset shards.

    Image: a member of a format that Pillow reads. Caption: the .txt member, else `text_column` of the .json member (a
    text or a list of texts). Codes: the codes.npy member. A damaged shard gives its whole samples and one bad one that
    says so.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self.paths = expand_shards(options.path)
        self.indexes = [index_shard(path) for path in self.paths]
        counts = [len(index.keys) + bool(index.damage) for index in self.indexes]
        self.starts = np.cumsum([0, *counts])
        self.shown = shown_below(self.paths)
        hashes = [hash_entries(path.name, count) for path, count in zip(self.paths, counts, strict=True)]
        self.rows = split_rows(np.concatenate(hashes), options.split, options.held_out)

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
        index, key = self.indexes[shard], self.key(row)
        if entry >= len(index.keys):
            raise BadSample(key, index.damage)
        parts = Parts()
        raw = {p: self._part(shard, entry, p, key) for p in PARTS if image or p in {"txt", "json"}}
        about = None
        if raw["json"] is not None and (self.options.factors or (raw["txt"] is None and self.kind != "image")):
            about = decode_json(raw["json"], key)
        if raw["txt"] is not None and self.kind != "image":
            parts.captions = decode_text(raw["txt"], key)
        elif about is not None:
            parts.captions = about.get(self.options.text_column)
        parts.truth = about if self.options.factors else None
        parts.image = raw.get("image")
        if self.options.patches and raw.get("codes") is not None:
            parts.codes = decode_codes(raw["codes"], key)  # type: ignore[arg-type]
        return parts

    def _part(self, shard: int, entry: int, part: str, key: str) -> bytes | None:
        index, column = self.indexes[shard], PARTS.index(part)
        offset, size = int(index.offsets[entry, column]), int(index.sizes[entry, column])
        if size < 0:
            return None
        if size > MAX_PART_BYTES:
            raise BadSample(key, f"{part} of more than {MAX_PART_BYTES} bytes")
        try:
            with self.paths[shard].open("rb", buffering=0) as file:
                raw = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadSample(key, f"cannot be read: {error.strerror or error}") from None
        if len(raw) < size:
            raise BadSample(key, f"{part} cut off: the shard has become shorter")
        return raw

    def account(self) -> Account:
        found = account_of_files(self.options.path, self.paths, ".tar")
        found.members = sum(index.members for index in self.indexes)
        for name, index in zip(self.shown, self.indexes, strict=True):
            found.ignored_members.merge(index.ignored, name)
        return found
