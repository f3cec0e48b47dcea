"""Samples a second of vlmoe's readers beside webdataset and Hugging Face's datasets, from the same shards.

pip install 'vlmoe[bench,dev]'
python benchmarks/data_readers.py --json benchmarks/results/data_readers.json

Every reader goes once through the same eight .tar shards of JPEG images with captions, in shuffled order, and hands
over batches of 64: images as uint8 of one size, captions as text. Images are decoded and resized by the same function
in all of them; what differs is how a sample is found, brought, shuffled and handed over. It is checked that each pass
gives every caption once.

The shards lie on the local disk (in the page cache), on an HTTP server and on an S3 server (moto), both on this machine
and in processes of their own. The time of a pass begins when the reader is made, so it includes opening the data, an
index where there is one, downloading, and starting the workers; what vlmoe keeps of files is empty then. From the S3
server the others read by its public HTTP addresses: webdataset has another program for s3://, and datasets cannot open
such a .tar file with this s3fs. CPU time is that of the main process and the workers, curl included, servers not.
Readers take turns, so that a busy moment of the machine does not hit one alone; figures are medians of the repeats,
beside the least and the most.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from provenance import provenance
from vlmoe.config import SourceConfig, StreamConfig
from vlmoe.data.files import FileOptions
from vlmoe.data.images import decode_image
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import Sample, Source
from vlmoe.data.shards import ShardSource
from vlmoe.data.stream import StreamSource
from vlmoe.data.urls import FetchOptions

BATCH, SHARDS, BUFFER = 64, 8, 1000
STORED = {48: 64, 224: 256}  # side of the model's images -> side of those in the shards
SAMPLES = {48: 8192, 224: 2048}
BUCKET = "shards"
LINE = (
    "{from:6} {pixels:4} px {workers} workers {reader:22}{samples_per_s:>9,.0f} ({least:,} to {most:,}) samples/s, "
    "first batch after {first_batch_s:.2f} s, {cpu_ms_per_sample:.3f} ms of CPU a sample"
)
HTTP = """
import functools, http.server, sys
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sys.argv[1]))
print(server.server_port, flush=True)
server.serve_forever()
"""
S3 = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(10**6)
"""
Batch = tuple[torch.Tensor, list[str]]


# --------------------------------------------------------------------------------------------------------------- data
def write_shards(folder: Path, size: int, samples: int) -> None:
    """`samples` JPEG images of smooth colours and some noise, which take about as many bytes as photographs."""
    rng = np.random.default_rng(size)
    side = STORED[size]
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:03d}.tar")) as writer:
            for i in range(shard * samples // SHARDS, (shard + 1) * samples // SHARDS):
                smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), 3)
                image = np.asarray(smooth) + rng.normal(0, 8, (side, side, 3))
                buffer = io.BytesIO()
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
                caption = f"picture number {i} of smooth colours with some noise"
                writer.write({"__key__": f"{i:06d}", "jpg": buffer.getvalue(), "txt": caption.encode()})


@contextlib.contextmanager
def server(code: str, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def upload(folder: Path) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    files.mkdir(BUCKET)
    for path in sorted(folder.rglob("*.tar")):
        files.pipe_file(f"{BUCKET}/{path.relative_to(folder)}", path.read_bytes(), ACL="public-read")
    s3fs.S3FileSystem.clear_instance_cache()


# ------------------------------------------------------------------------------------------------------------- readers
def stack(pairs: list[tuple[np.ndarray, str]]) -> Batch:
    return torch.from_numpy(np.stack([image for image, _ in pairs])), [text for _, text in pairs]


class Ours(Dataset[Batch]):
    """Micro-batches of one source, as a run draws them, without tokens and masks."""

    def __init__(self, source: Source) -> None:
        self.mixture = Mixture([(source, 1.0)], 0, batch=BATCH)

    def __getitem__(self, number: int) -> Batch:
        use: Callable[[Sample], Any] = lambda sample: (sample.image, sample.text)  # noqa: E731
        return stack([self.mixture.draw(number * BATCH + i, use, []) for i in range(BATCH)])


def ours(urls: str, size: int, samples: int, workers: int, folder: str, read: str) -> Iterable[Batch]:
    options = FileOptions("pair", urls, "train", size, held_out=0.0, fetch=FetchOptions(f"{folder}/files"))
    if read == "stream":
        config = SourceConfig("shards", "pair", urls, read=read, held_out=0.0)
        source: Source = StreamSource(options, config, StreamConfig(readers=SHARDS, buffer=BUFFER), 0, 0)
    else:
        source = ShardSource(options)
    return DataLoader(Ours(source), batch_size=None, sampler=range(samples // BATCH), num_workers=workers,
                      prefetch_factor=4)  # fmt: skip


def public(urls: str) -> str:
    """Where the S3 server shows everybody what lies under its s3:// names."""
    return urls.replace("s3://", f"{os.environ['AWS_ENDPOINT_URL']}/") if urls.startswith("s3://") else urls


def decoded(raw: bytes, text: str | bytes, size: int) -> tuple[np.ndarray, str]:
    return decode_image(raw, "", size, 64_000_000), text.decode() if isinstance(text, bytes) else text


def theirs_webdataset(urls: str, size: int, samples: int, workers: int, folder: str) -> Iterable[Batch]:
    data = (
        webdataset.WebDataset(public(urls), shardshuffle=SHARDS, seed=0, empty_check=False)
        .shuffle(BUFFER, initial=BUFFER)
        .to_tuple("jpg", "txt")
        .map(lambda pair: decoded(pair[0], pair[1], size))
        .batched(BATCH, collation_fn=stack)
    )
    return webdataset.WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4)


def theirs_datasets(urls: str, size: int, samples: int, workers: int, folder: str) -> Iterable[Batch]:
    names = [public(urls).replace("{000..007}", f"{shard:03d}") for shard in range(SHARDS)]
    data = datasets.load_dataset("webdataset", data_files={"train": names}, split="train", streaming=True,
                                 cache_dir=f"{folder}/datasets")  # fmt: skip
    data = data.cast_column("jpg", datasets.Image(decode=False)).shuffle(0, buffer_size=BUFFER)
    collate: Callable[[list[Any]], Batch] = lambda rows: stack(  # noqa: E731
        [decoded(row["jpg"]["bytes"], row["txt"], size) for row in rows]
    )
    return DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collate, prefetch_factor=4)


READERS: dict[str, Callable[..., Iterable[Batch]]] = {
    "vlmoe, stream": functools.partial(ours, read="stream"),
    "vlmoe, random access": functools.partial(ours, read="random"),
    "webdataset": theirs_webdataset,
    "datasets, streaming": theirs_datasets,
}


# ------------------------------------------------------------------------------------------------------------- measure
def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def one_pass(
    make: Callable[..., Iterable[Batch]], urls: str, size: int, samples: int, workers: int
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        began, used = time.perf_counter(), cpu_seconds()
        first = 0.0
        captions: list[str] = []
        for images, texts in make(urls, size, samples, workers, folder):
            first = first or time.perf_counter() - began
            assert images.shape == (len(texts), size, size, 3) and images.dtype == torch.uint8
            captions += texts
        seconds, used = time.perf_counter() - began, cpu_seconds() - used
        if len(captions) != samples or len(set(captions)) != samples:
            raise SystemExit(f"{make}: {len(captions)} samples, {len(set(captions))} different ones, of {samples}")
        if captions == sorted(captions):
            raise SystemExit(f"{make}: not shuffled")
    return {"samples_per_s": samples / seconds, "first_batch_s": first, "cpu_ms_per_sample": 1e3 * used / samples}


def summary(passes: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: float(f"{statistics.median(p[name] for p in passes):.4g}") for name in passes[0]}
    rates = [p["samples_per_s"] for p in passes]
    return {**found, "least": round(min(rates)), "most": round(max(rates))}


def measure(
    folder: Path, places: list[str], samples: dict[int, int], workers: list[int], repeats: int
) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        where = {"local": str(folder)}
        if "http" in places:
            where["http"] = stack.enter_context(server(HTTP, str(folder)))
        if "s3" in places:
            os.environ |= {"AWS_ENDPOINT_URL": stack.enter_context(server(S3)), "AWS_ACCESS_KEY_ID": "k",
                           "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
            where["s3"] = f"s3://{BUCKET}"
            upload(folder)
        for place, size, count in itertools.product(places, samples, workers):
            urls = f"{where[place]}/{size}/{{000..007}}.tar"
            passes: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
            for _ in range(repeats):
                for name, make in READERS.items():
                    passes[name].append(one_pass(make, urls, size, samples[size], count))
            for name, found in passes.items():
                row = {"from": place, "pixels": size, "workers": count, "reader": name, **summary(found)}
                print(LINE.format(**row), flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--places", nargs="+", default=["local", "http", "s3"], choices=["local", "http", "s3"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SAMPLES], choices=[*SAMPLES])
    parser.add_argument("--part", type=int, default=1, help="read one in so many samples, to try it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    samples = {size: SAMPLES[size] // arguments.part for size in arguments.sizes}
    if any(number % (SHARDS * BATCH) for number in samples.values()):
        parser.error(f"each shard must hold whole batches: {samples} are no multiples of {SHARDS * BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        for size, number in samples.items():
            write_shards(Path(folder, str(size)), size, number)
        mean = {size: sum(f.stat().st_size for f in Path(folder, str(size)).iterdir()) // n
                for size, n in samples.items()}  # fmt: skip
        about = {
            "what": "one shuffled pass, from making the reader to the last batch; medians of the repeats",
            **provenance(),
            "versions": {"webdataset": webdataset.__version__, "datasets": datasets.__version__},
            "samples": samples,
            "stored_pixels": {size: STORED[size] for size in samples},
            "bytes_per_sample_in_shards": mean,
            "batch": BATCH,
            "shuffle_buffer": BUFFER,
            "repeats": arguments.repeats,
        }
        rows = []
        for row in measure(Path(folder), arguments.places, samples, arguments.workers, arguments.repeats):
            rows.append(row)
            if arguments.json:  # anew after each: a run that is cut short keeps what it has
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
