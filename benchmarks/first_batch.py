"""What a data worker does before its first batch from an S3 server: requests, CPU time, and waiting in vain.

pip install 'vlmoe[bench,dev]'
python benchmarks/first_batch.py --json benchmarks/results/first_batch.json

The server (moto) runs on this machine, in a process of its own that writes a line for each request. For each setting a
fresh process opens the data, as a run does, and forks a worker, which draws 64 texts; the wall clock has no part in the
figures, so a busy machine does not change them. Files are named one by one (`{000..007}`) or listed (`*`). `waited_s`:
for threads of the parent process when the worker lets go of the parent's sessions, which it does at the latest when
garbage is collected at the end.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from provenance import provenance

FILES, SAMPLES, BATCH, BUCKET = 8, 512, 64, "files"
PATTERNS = {"named": "{000..007}", "listed": "*"}
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
logging.basicConfig(level=logging.INFO, stream=open(sys.argv[1], "w", buffering=1), format="%(message)s")
logging.getLogger("werkzeug").setLevel(logging.INFO)
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def file_of(suffix: str, number: int) -> bytes:
    buffer = io.BytesIO()
    texts = [f"text {i} of file {number}" for i in range(SAMPLES)]
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), buffer, row_group_size=100)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, text in enumerate(texts):
            info = tarfile.TarInfo(f"{i:04d}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@contextmanager
def server(log: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SERVER, str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


def upload() -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    files.mkdir(BUCKET)
    for suffix in ("tar", "parquet"):
        for number in range(FILES):
            files.pipe_file(f"{BUCKET}/{number:03d}.{suffix}", file_of(suffix, number))


# -------------------------------------------------------------------------------------------- one setting, in a process
def one(pattern: str, folder: str) -> dict[str, float]:
    from vlmoe.config import SourceConfig, StreamConfig
    from vlmoe.data.files import FileOptions
    from vlmoe.data.mixture import Mixture
    from vlmoe.data.stream import StreamSource
    from vlmoe.data.urls import FetchOptions

    began = time.process_time()
    type_ = "parquet" if pattern.endswith("parquet") else "shards"
    options = FileOptions("text", pattern, held_out=0.0, fetch=FetchOptions(folder))
    config = SourceConfig(type_, "text", pattern, read="stream", held_out=0.0)
    source = StreamSource(options, config, StreamConfig(readers=FILES, buffer=SAMPLES), 0, 0)
    opened = time.process_time() - began
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    fork.Process(target=worker, args=(Mixture([(source, 1.0)], 0, batch=BATCH), there), daemon=True).start()
    return {"cpu_s_to_open": round(opened, 3), **here.recv()}


def worker(mixture: Any, to: Connection) -> None:
    wait, waited = threading.Event.wait, [0.0]

    def noted(event: threading.Event, timeout: float | None = None) -> bool:
        came = wait(event, timeout)
        if not came and any(frame.name == "close_session" for frame in traceback.extract_stack()):
            waited[0] += timeout or 0.0
        return came

    threading.Event.wait = noted  # type: ignore[method-assign, assignment]
    began = time.process_time()
    for position in range(BATCH):
        mixture.draw(position, lambda sample: sample.text, [])
    used = time.process_time() - began
    gc.collect()
    to.send({"cpu_s_of_the_worker": round(used, 3), "waited_s": waited[0]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--one", nargs=2, metavar=("PATTERN", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, server(log := Path(folder, "log")) as address:
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
                       "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
        upload()
        for suffix in ("tar", "parquet"):
            for said, pattern in PATTERNS.items():
                before = len(log.read_text().splitlines())
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    f"s3://{BUCKET}/{pattern}.{suffix}",
                    f"{folder}/{len(rows)}",
                ]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                lines = [line.split('"')[1] for line in log.read_text().splitlines()[before:] if '"' in line]
                requests = dict(Counter("LIST" if "list-type" in line else line.split()[0] for line in lines))
                rows.append({"files": suffix, "are": said, **found, "requests": requests})
                print(rows[-1], flush=True)
    if arguments.json:
        about = {"what": "a worker's first batch, from S3", **provenance(), "samples_in_a_file": SAMPLES}
        arguments.json.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
