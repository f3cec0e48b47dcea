"""Fuzz the readers of foreign files: tar, JSON, YAML and images, with seeded cases.

    python benchmarks/fuzz.py tar|json|yaml|images|all --cases 3000 --seed 0 [--out benchmarks/results/fuzz.json]

Every case is a function of (reader, seed, number). A reader may give a result, a UserError or a BadSample. Anything
else is a crash, and a case that takes more than 10 seconds is a hang. Both are reported with the seed and number that
show it again: --first NUMBER --cases 1. Exits with 1 when there was one.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from vlmoe.config import UserError, json_lines, load_recipe, parse_json
from vlmoe.data.check import check_data
from vlmoe.data.images import FORMATS, decode_image
from vlmoe.data.sample import BadSample

HANG_SECONDS = 10


class Hang(BaseException):
    """Not caught by any reader's own handling of errors."""


def mutate(raw: bytes, rng: random.Random, words: list[bytes]) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by words that mean something to the reader."""
    data = bytearray(raw)
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 600)]
        elif kind == 3:
            data[at:at] = rng.choice(words)
        elif kind == 4:
            word = rng.choice(words)
            data[at : at + len(word)] = word
        else:
            data = data[:at] if rng.random() < 0.2 else data
    return bytes(data)


def _tar(rng: random.Random) -> bytes:
    """An archive with odd members, headers changed and their checksums put right again in most cases."""
    out = io.BytesIO()
    style = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=out, mode="w", format=style) as tar:
        for i in range(rng.randint(1, 4)):
            long = "a/b/" + "c" * 120 * (style != tarfile.USTAR_FORMAT)
            stem = rng.choice([f"{i:03d}", "22.05", "ä" * 20, "._x", long])
            for suffix in (".png", ".txt", ".json"):
                about = tarfile.TarInfo(stem + suffix)
                about.type = rng.choice([b"0"] * 9 + [b"1", b"2", b"5", b"7"])
                body = rng.choice([b"", b"a caption", b'{"text": "x"}', rng.randbytes(700)])
                about.size = len(body) if about.type in b"07" else 0
                tar.addfile(about, io.BytesIO(body))
    data = bytearray(out.getvalue())
    for _ in range(rng.randint(1, 3)):
        at = 512 * rng.randrange(len(data) // 512)
        header = data[at : at + 512]
        place, field = rng.choice([(124, 12), (156, 1), (0, 100), (345, 155), (482, 1), (257, 8)])
        size = rng.choice([-512, -1024, -1, 0, 1, 511, 2**33, 2**80, 2**62])
        number = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=size < 0)
        kind = bytes([rng.choice(b"xgLKS1257V\0")])
        value = rng.choice([rng.randbytes(field), number[:field], b"\0" * field, b"9" * field, kind])
        header[place : place + len(value)] = value
        if rng.random() < 0.9:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        data[at : at + 512] = header
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def tar(rng: random.Random, folder: Path) -> None:
    path = folder / "x.tar"
    path.write_bytes(_tar(rng))
    report = check_data(str(path), kind=rng.choice(["pair", "image", "text"]), type="shards", image_size=16)
    json.dumps(report, ensure_ascii=False).encode()
    assert report["good"] + sum(report["reasons"].values()) >= report["samples"]


JSON_WORDS = [
    b"[" * 5000,
    b'{"a":' * 2000,
    b"\\ud83d",
    b"\\u0000",
    "\u2028".encode(),
    b"\x85",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
    b"9" * 6000,
    b"\xed\xa0\x80",
    b"\n",
    b'"text": "y", ',
    b"-",
    b"\xff",
]


def json_(rng: random.Random, folder: Path) -> None:
    line = json.dumps(
        {"file_name": "a.png", "text": rng.choice(["x", ["a", "b"], None, 3.5, "\U0001f600"]), "n": {"b": [1, 2]}}
    )
    raw = mutate(b"\n".join([line.encode()] * rng.randint(1, 3)), rng, JSON_WORDS)
    (folder / "metadata.jsonl").write_bytes(raw)
    for read in (lambda: parse_json(raw, "x"), lambda: list(json_lines(folder / "metadata.jsonl"))):
        try:
            json.dumps(read(), ensure_ascii=False, allow_nan=False).encode()
        except UserError as error:
            str(error).encode()
    report = check_data(str(folder), type="folder", image_size=16)
    json.dumps(report, ensure_ascii=False).encode()


BASE = resources.files("vlmoe.recipes").joinpath("demo.yaml").read_bytes()
YAML_WORDS = [
    b"&a [*a]",
    b"${x}",
    b"${",
    b"}",
    b"!!python/object:os.system",
    b"[" * 2000,
    b"\0",
    b"\t",
    b"- ",
    b": ",
    b"9" * 6000,
    b".nan",
    b".inf",
    b"\xff",
    b"<<: ",
    b"'",
    b'"',
    b"|",
    b"? ",
    b"1e999",
    b"~",
    "\u2028".encode(),
]


def yaml(rng: random.Random, folder: Path) -> None:
    path = folder / "x.yaml"
    path.write_bytes(mutate(BASE, rng, YAML_WORDS))
    load_recipe(str(path), rng.choice([[], ["train.steps=" + rng.choice(["3", "x", "[", "${a}", "9" * 5000, ".inf"])]]))


def images(rng: random.Random, folder: Path) -> None:
    out = io.BytesIO()
    kind = rng.choice([f for f in FORMATS if f in Image.SAVE])
    mode = (
        "RGB"
        if kind in {"JPEG", "PPM", "QOI"}
        else rng.choice(["RGB", "L", "RGBA" if kind not in {"BMP", "DIB"} else "RGB"])
    )
    Image.frombytes(mode, (24, 18), rng.randbytes(24 * 18 * len(mode))).save(out, kind)
    decode_image(mutate(out.getvalue(), rng, [b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff"]), "x", 16, 1_000_000)


READERS: dict[str, Callable[[random.Random, Path], None]] = {"tar": tar, "json": json_, "yaml": yaml, "images": images}


def _hang(*_: Any) -> None:
    raise Hang


def fuzz(reader: str, cases: int, seed: int = 0, first: int = 0) -> dict[str, Any]:
    """{"cases", "outcomes": {name: count}, "crashes": [{"seed", "number", "error"}]} of one reader."""
    outcomes: Counter[str] = Counter()
    crashes: list[dict[str, Any]] = []
    old = signal.signal(signal.SIGALRM, _hang)
    try:
        for number in range(first, first + cases):
            with tempfile.TemporaryDirectory() as folder:
                signal.alarm(HANG_SECONDS)
                try:
                    READERS[reader](random.Random(f"{reader}/{seed}/{number}"), Path(folder))
                    outcome = "read"
                except (UserError, BadSample) as error:
                    outcome = type(error).__name__
                    str(error).encode()
                except (Exception, Hang) as error:
                    outcome = "hang" if isinstance(error, Hang) else "crash"
                    crashes.append({"seed": seed, "number": number, "error": repr(error)[:300]})
                    traceback.print_exc()
                finally:
                    signal.alarm(0)
            outcomes[outcome] += 1
    finally:
        signal.signal(signal.SIGALRM, old)
    return {"cases": cases, "seed": seed, "outcomes": dict(sorted(outcomes.items())), "crashes": crashes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chosen = list(READERS) if given.reader == "all" else [given.reader]
    found = {name: fuzz(name, given.cases, given.seed, given.first) for name in chosen}
    about = {"python": platform.python_version(), "machine": platform.machine(), "hang_seconds": HANG_SECONDS}
    text = json.dumps({"about": about, "readers": found}, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    sys.exit(any(reader["crashes"] for reader in found.values()))


if __name__ == "__main__":
    main()
