"""WebDataset shards (.tar files) by random access.

A shard's headers are read once and give each member's place; after that a sample is a few reads at known offsets. So
samples can be taken in any order, which streaming a tar file cannot give. The index of a large shard is kept in the
user's cache folder, under a name made of path, size and time of change.

Members that belong together share the name up to its first dot: 000017.jpg, 000017.txt, 000017.json, 000017.codes.npy.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import braceexpand
import numpy as np

from vlmoe.config import UserError
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
from vlmoe.data.images import SUFFIXES
from vlmoe.data.sample import BadSample

PARTS = ("image", "txt", "json", "codes")  # columns of an index
MAX_PART_BYTES = 1 << 28  # no image, text or array of a sample is larger
_CACHED_FROM = 1 << 24  # bytes; smaller shards are scanned in no time
_BLOCK = 512  # of the tar format


@dataclass
class ShardIndex:
    """Where the samples of a shard are.

    keys: bytes (n,). places: int64 (n, 4, 2), offset and size of each of PARTS, size -1 where there is none.
    damage: why the rest of the file cannot be read, "" for a whole shard.
    """

    keys: np.ndarray
    places: np.ndarray
    damage: str


def expand_shards(pattern: str) -> list[Path]:
    """Shard files of a pattern with braces (train-{000..017}.tar) and wildcards, or of a folder, in order.

    Raises UserError when a named file does not exist, nothing matches, or a file is compressed.
    """
    found: list[Path] = []
    for name in braceexpand.braceexpand(pattern, escape=False):
        if os.path.isdir(name):
            name = os.path.join(glob.escape(name), "*.tar")
        if glob.has_magic(name) and not os.path.exists(name):
            found += [Path(p) for p in sorted(glob.glob(name))]
        elif os.path.isfile(name):
            found.append(Path(name))
        else:
            raise UserError(f"shards {pattern}: no file {name}")
    if not found:
        raise UserError(f"shards {pattern}: no file matches")
    for path in found:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic[:2] == b"\x1f\x8b" or magic == b"\x28\xb5\x2f\xfd" or magic[:3] == b"BZh":
            raise UserError(f"shard {path}: compressed; random access needs a plain .tar file")
    return list(dict.fromkeys(found))


def index_shard(path: Path) -> ShardIndex:
    """Read a shard's headers, or its index from the cache."""
    stat = path.stat()
    if stat.st_size < _CACHED_FROM:
        return scan_shard(path)
    identity = f"1/{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    cached = _cache_folder() / (hashlib.blake2b(identity.encode(), digest_size=16).hexdigest() + ".npz")
    try:
        with np.load(cached, allow_pickle=False) as file:
            return ShardIndex(file["keys"], file["places"], str(file["damage"]))
    except Exception:  # missing or damaged: it is only a cache
        index = scan_shard(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, keys=index.keys, places=index.places, damage=np.array(index.damage))
        os.replace(temporary, cached)
    except OSError:  # a read-only home costs time at the next start, nothing else
        pass
    return index


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmoe" / "shards"


def scan_shard(path: Path) -> ShardIndex:
    """Find every sample of a shard by its headers. Whole samples before a damaged place are kept."""
    size = path.stat().st_size
    keys: list[bytes] = []
    places: list[list[tuple[int, int]]] = []
    damage = ""
    cut = None  # key of the member that is not whole
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                key, part = _split_name(member.name)
                if member.offset_data + member.size > size:
                    cut = key
                    raise tarfile.ReadError("unexpected end of data")
                if not member.isreg() or member.issparse() or part is None:
                    continue
                if not keys or keys[-1] != key:
                    keys.append(key)
                    places.append([(0, -1)] * len(PARTS))
                if places[-1][PARTS.index(part)][1] < 0:
                    places[-1][PARTS.index(part)] = (member.offset_data, member.size)
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):  # where tarfile stops, a whole archive has a block of zeros
                damage = "no end-of-archive mark"
    except tarfile.TarError as error:
        damage = str(error) or type(error).__name__
    if damage and keys and keys[-1] == cut:
        keys, places = keys[:-1], places[:-1]
    if damage:
        last = f"the last good key is {keys[-1].decode(errors='replace')}" if keys else "nothing in it can be read"
        damage = f"truncated or damaged shard ({damage}); {last}"
    array = np.array(places, dtype=np.int64).reshape(len(keys), len(PARTS), 2)
    return ShardIndex(np.array(keys, dtype=bytes), array, damage)


def _split_name(name: str) -> tuple[bytes, str | None]:
    """A member's key, which ends at the first dot of its file name, and which of PARTS it is (None: none of ours)."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    suffix = suffix.lower()
    if suffix in SUFFIXES:
        part: str | None = "image"
    else:
        part = {"txt": "txt", "json": "json", "codes.npy": "codes"}.get(suffix)
    return key.encode(errors="surrogateescape"), part if stem else None


class ShardSource(FileSource):
    """Samples of WebDataset shards.

    Image: jpg, jpeg, png, webp or gif. Caption: the .txt member, else `text_column` of the .json member (a text or a
    list of texts). Codes: the codes.npy member. A damaged shard gives its whole samples and one bad one that says so.
    """

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self.paths = expand_shards(options.path)
        self.indexes = [index_shard(path) for path in self.paths]
        counts = [len(index.keys) + bool(index.damage) for index in self.indexes]
        self.starts = np.cumsum([0, *counts])
        hashes = [hash_entries(path.name, count) for path, count in zip(self.paths, counts, strict=True)]
        self.rows = split_rows(np.concatenate(hashes), options.split)

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, entry in it)."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])

    def key(self, row: int) -> str:
        shard, entry = self.locate(row)
        keys = self.indexes[shard].keys
        name = self.paths[shard].name
        return f"{name}/{keys[entry].decode(errors='replace')}" if entry < len(keys) else name

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
        offset, size = self.indexes[shard].places[entry, PARTS.index(part)].tolist()
        if size < 0:
            return None
        if size > MAX_PART_BYTES:
            raise BadSample(key, f"{part} of {size} bytes, more than {MAX_PART_BYTES}")
        try:
            with self.paths[shard].open("rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadSample(key, f"cannot be read: {error}") from None
