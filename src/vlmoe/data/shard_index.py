"""Where the samples of shards are: found by reading headers, kept in files, mapped into memory when asked for.

Scanning takes a fraction of a millisecond a sample. Shards are scanned once, by all cores, and each one's index is kept
in the user's cache folder, under a name made of path, size and time of change. An index is mapped from its file, so all
processes of a machine share its pages, and the least used ones give theirs back.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.progress import track

from vlmoe.config import parse_json
from vlmoe.data.accounts import Ignored, short
from vlmoe.data.fetch import cache_folder
from vlmoe.data.members import PARTS, Named, entries_of, name_of
from vlmoe.data.packed import Numbers, Packed, Packer
from vlmoe.data.tar import DamagedTar, Member, read_members

FORMAT = "4"  # of a cached index
MAX_PART_BYTES = 1 << 28  # no image, text or array of a sample is larger
_CACHED_FROM = 1 << 24  # bytes of all shards together; fewer are scanned in no time
_PARALLEL_FROM = 1 << 28  # bytes to scan; fewer are not worth starting processes for
_MAPPED = 256  # indexes that stay mapped in a process
_ALIGNED = 64


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

    def __len__(self) -> int:
        """Entries: whole samples, and one bad one for damage."""
        return len(self.keys) + bool(self.damage)


class Indexes:
    """Indexes of many shards. held: in memory. files: of each one that is not.

    counts: int64, entries of each.
    """

    def __init__(self, held: dict[int, ShardIndex], files: Sequence[Path]) -> None:
        self._held, self._files = held, files
        self._mapped: OrderedDict[int, ShardIndex] = OrderedDict()
        self.counts = np.array([len(self[i]) for i in range(len(files) or len(held))], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, shard: int) -> ShardIndex:
        if shard in self._held:
            return self._held[shard]
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
        else:
            self._mapped[shard] = map_index(self._files[shard])
            if len(self._mapped) > _MAPPED:
                self._mapped.popitem(last=False)
        return self._mapped[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": OrderedDict()}


def index_shards(paths: Sequence[str]) -> Indexes:
    """Indexes of local shards, from the cache or scanned. Where the cache cannot be written they stay in memory."""
    about = [os.stat(path) for path in paths]
    if sum(stat.st_size for stat in about) < _CACHED_FROM:
        return Indexes({i: scan_shard(Path(path)) for i, path in enumerate(paths)}, [])
    folder = cache_folder() / "shards"
    files = []
    for path, stat in zip(paths, about, strict=True):
        identity = f"{FORMAT}/{os.path.realpath(path)}/{stat.st_size}/{stat.st_mtime_ns}"
        digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        files.append(folder / f"{digest}.index")
    missing = [i for i, file in enumerate(files) if not _whole(file)]
    jobs = [(paths[i], files[i]) for i in missing]
    size = sum(about[i].st_size for i in missing)
    done = _scan_all(jobs, parallel=size >= _PARALLEL_FROM and len(jobs) > 1)
    held = {i: index for i, index in zip(missing, done, strict=True) if index is not None}
    return Indexes(held, files)


def _scan_all(jobs: list[tuple[str, Path]], parallel: bool) -> Iterator[ShardIndex | None]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not parallel or cores == 1 or multiprocessing.current_process().daemon:  # a data worker may not start any
        yield from map(_scan_and_keep, jobs)
        return
    pool = ProcessPoolExecutor(min(cores, len(jobs)), initializer=signal.signal,
                               initargs=(signal.SIGINT, signal.SIG_IGN))  # fmt: skip
    try:
        yield from track(pool.map(_scan_and_keep, jobs), f"Indexing {len(jobs)} shards", total=len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def _scan_and_keep(job: tuple[str, Path]) -> ShardIndex | None:
    """Scan a shard and write its index. Returns the index where it cannot be written: that costs memory and time at the
    next start, nothing else."""
    path, file = job
    index = scan_shard(Path(path))
    try:
        save_index(index, file)
    except OSError:
        return index
    return None


def save_index(index: ShardIndex, file: Path) -> None:
    """Write an index for `map_index`: a line of JSON, filled up with blanks, then the arrays in a row."""
    arrays = [index.offsets, index.keys.ends, index.sizes, index.keys.buffer]
    about = {"samples": len(index.keys), "bytes": len(index.keys.buffer), "damage": index.damage,
             "members": index.members, "ignored": index.ignored.as_dict()}  # fmt: skip
    head = json.dumps(about).encode()
    head += b" " * (-(len(head) + 1) % _ALIGNED) + b"\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    with open(temporary, "wb") as out:
        out.write(head)
        for array in arrays:
            out.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    os.replace(temporary, file)


def map_index(file: Path) -> ShardIndex:
    """An index as `save_index` wrote it. Raises OSError or ValueError when it is missing or not whole."""
    with open(file, "rb") as given:
        head = given.readline(1 << 24)
        about = parse_json(head, str(file))
        n, parts = about["samples"], len(PARTS)
        layout = [("<i8", n * parts), ("<i8", n), ("<i4", n * parts), ("<u1", about["bytes"])]
        if os.fstat(given.fileno()).st_size != len(head) + sum(np.dtype(d).itemsize * count for d, count in layout):
            raise ValueError(f"{file}: not whole")
        mapped = mmap.mmap(given.fileno(), 0, access=mmap.ACCESS_READ)
    arrays, at = [], len(head)
    for dtype, count in layout:
        arrays.append(np.frombuffer(mapped, dtype, count, at))
        at += arrays[-1].nbytes
    offsets, ends, sizes, buffer = arrays
    return ShardIndex(
        Packed(buffer, ends), offsets.reshape(n, parts), sizes.reshape(n, parts), about["damage"], about["members"],
        Ignored.of(about["ignored"]),
    )  # fmt: skip


def _whole(file: Path) -> bool:
    try:
        map_index(file)
    except (OSError, ValueError, KeyError, TypeError):  # it is only a cache
        return False
    return True


class _Scan:
    """Members of a shard, counted, with those left out that cannot be part of a sample."""

    def __init__(self, shard: Path | int) -> None:
        self.shard, self.members, self.ignored = shard, 0, Ignored()
        self.damage = ""
        self.cut: Named | None = None  # the member that is not whole

    def __iter__(self) -> Iterator[tuple[Named, Member]]:
        try:
            for member in read_members(self.shard):
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


def scan_shard(shard: Path | int) -> ShardIndex:
    """Find every sample of a shard by its headers. Whole samples before a damaged place are kept.

    shard: its path, or a descriptor, which stays open.
    """
    scan, keys, offsets, sizes = _Scan(shard), Packer(), Numbers(), Numbers()
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
