"""Random access to very many samples: seconds and bytes that the index of shards takes.

python benchmarks/index.py --samples 10000000 --json benchmarks/results/index.json

Shards of tiny members are written to a temporary folder, 2 kB a sample. Only `--different` of them are written; the
others are links to these, under names of their own: to the index each is a file to be scanned. So 10 million samples
need 2 GB of disk and as much of the page cache, beside 0.75 GB for the index; without links, 20 GB. Measured are the
first opening, which scans all headers on all cores, and a second one, which maps what the first has kept; then the
memory that one process has to itself after 10,000 draws, and that a forked worker adds. All with the page cache warm:
headers on a disk take at least the time to read a block from it for each member.

`of_400M` says what the same would be for 400 million samples, as a multiple of what was measured: seconds, bytes on
disk and own memory grow with the number of shards.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import provenance
from vlmoe.data.counter import shuffled
from vlmoe.data.files import FileOptions
from vlmoe.data.shards import ShardSource

DRAWS = 10_000
LARGE = 400_000_000  # samples that one would like to read


def write_shards(folder: Path, samples: int, per_shard: int, different: int) -> None:
    """Shards of `per_shard` samples: an image of one byte, which is never decoded here, and a caption."""
    shards = samples // per_shard
    needed = 1.1 * min(different, shards) * per_shard * 2048 + 100 * samples
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"{folder}: {needed / 1e9:.1f} GB are needed; set TMPDIR to a folder with more room")
    for number in range(shards):
        place = folder / f"{number:06d}.tar"
        if number >= different:
            os.link(folder / f"{number % different:06d}.tar", place)
            continue
        with open(place, "wb") as shard:
            for i in range(number * per_shard, (number + 1) * per_shard):
                for suffix, data in (("jpg", b"x"), ("txt", f"caption {i}".encode())):
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(data)
                    shard.write(info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(512, b"\0"))
            shard.write(bytes(1024))


def own_bytes() -> int:
    """Memory that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def cpu_seconds() -> float:
    """Of this process and those it has started that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def draw(source: ShardSource, start: int) -> None:
    for i in range(start, start + DRAWS):
        source.text(shuffled(i % len(source), len(source), 1))


def in_worker(source: ShardSource) -> int:
    """Bytes that a forked worker has to itself after its draws."""
    here, there = multiprocessing.get_context("fork").Pipe()

    def work(connection: Any) -> None:
        before = own_bytes()
        draw(source, DRAWS)
        connection.send(own_bytes() - before)

    worker = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    worker.start()
    found: int = here.recv()
    worker.join()
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--different", type=int, default=100, help="shards that are no links to others")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    if arguments.samples % arguments.per_shard:
        parser.error(f"--samples must be a multiple of --per-shard ({arguments.per_shard})")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        data = Path(folder) / "data"
        data.mkdir()
        write_shards(data, arguments.samples, arguments.per_shard, arguments.different)
        options = FileOptions("text", str(data))
        used = cpu_seconds()
        first, _ = timed(lambda: ShardSource(options))
        used = cpu_seconds() - used
        before = own_bytes()
        again, source = timed(lambda: ShardSource(options))
        opened = own_bytes() - before
        drawing, _ = timed(lambda: draw(source, 0))
        found = {
            "samples": arguments.samples,
            "shards": len(source.shards),
            "first opening, s": round(first, 2),
            "samples indexed a second": round(arguments.samples / first),
            "CPU time of the first opening, s": round(used, 2),
            "most memory of a scanning process, bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
            "second opening, s": round(again, 3),
            "index on disk, bytes": sum(f.stat().st_size for f in Path(folder, "cache").rglob("*.index")),
            "own memory after opening, bytes": opened,
            "own memory after opening and draws, bytes": own_bytes() - before,
            "own memory of a worker after its draws, bytes": in_worker(source),
            "draws a second, texts": round(DRAWS / drawing),
        }
        times = LARGE / arguments.samples
        large = {
            "first opening, hours": round(first * times / 3600, 2),
            "second opening, s": round(again * times, 1),
            "index on disk, bytes": round(found["index on disk, bytes"] * times),
            "own memory after opening, bytes": round(opened * times),
        }
    for title, values in (("measured", found), ("for 400 million samples, by multiplying", large)):
        print(title)
        for name, value in values.items():
            print(f"  {name:45} {value:>17,}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        about = provenance() | {"results": found, "of_400M": large}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
