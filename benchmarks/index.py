"""Random access to very many samples: seconds and bytes that the index of shards takes.

python benchmarks/index.py --samples 10000000 --json benchmarks/results/index.json

Shards of tiny members are written to a temporary folder, 2 kB a sample: 20 GB for 10 million. Measured are the first
opening, which scans all headers, and a second one, which maps what the first has kept; then the memory that one process
has to itself after 10,000 draws, and that a forked worker adds. All with the page cache warm.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
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


def write_shards(folder: Path, samples: int, per_shard: int) -> None:
    """Shards of `per_shard` samples: an image of one byte, which is never decoded here, and a caption."""
    for first in range(0, samples, per_shard):
        with open(folder / f"{first // per_shard:06d}.tar", "wb") as shard:
            for i in range(first, min(first + per_shard, samples)):
                for suffix, data in (("jpg", b"x"), ("txt", f"caption {i}".encode())):
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(data)
                    shard.write(info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(512, b"\0"))
            shard.write(bytes(1024))


def own_bytes() -> int:
    """Memory that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


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
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        data = Path(folder) / "data"
        data.mkdir()
        write_shards(data, arguments.samples, arguments.per_shard)
        options = FileOptions("text", str(data))
        first, _ = timed(lambda: ShardSource(options))
        before = own_bytes()
        again, source = timed(lambda: ShardSource(options))
        drawing, _ = timed(lambda: draw(source, 0))
        found = {
            "samples": arguments.samples,
            "first opening, s": round(first, 2),
            "samples indexed a second": round(arguments.samples / first),
            "second opening, s": round(again, 2),
            "index on disk, bytes": sum(f.stat().st_size for f in Path(folder, "cache").rglob("*.index")),
            "own memory after opening and draws, bytes": own_bytes() - before,
            "own memory of a worker after its draws, bytes": in_worker(source),
            "draws a second, texts": round(DRAWS / drawing),
        }
    for name, value in found.items():
        print(f"{name:45} {value:>15,}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(provenance() | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
