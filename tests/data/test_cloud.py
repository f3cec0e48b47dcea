"""Files in object stores and on the hub: servers of this machine answer as the real ones do."""

import http.server
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import huggingface_hub.constants
import pytest
import s3fs

from tests.data.test_loader import same_steps
from tests.data.test_stream import keys_of, open_stream, shard, whole_names, write
from tests.data.test_stream_loader import SIZE, TOKENIZER, recipe_of
from tests.data.test_urls import serving
from vlmoe.config import UserError
from vlmoe.data import urls
from vlmoe.data.fetch import Files
from vlmoe.data.files import FileOptions
from vlmoe.data.loader import StepData, make_loader
from vlmoe.data.parquet import ParquetSource
from vlmoe.data.shards import ShardSource, expand_shards
from vlmoe.data.urls import FetchError, FetchOptions

# In a process of its own, as data workers are forked here; it ends with its standard input.
S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
HELD = {name: shard(name, SIZE) for name in (*whole_names(SIZE, 8), *whole_names(SIZE, 4, "parquet"))}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server, whose bucket "held" has the files of HELD below "a/b"."""
    with subprocess.Popen([sys.executable, "-c", S3], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            files = s3fs.S3FileSystem(key="k", secret="s", endpoint_url=address, skip_instance_cache=True)
            files.mkdir("held")
            for name, content in HELD.items():
                files.pipe_file(f"held/a/b/{name}", content)
            yield address
        finally:
            process.stdin.close()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server is what s3:// means, with credentials in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s",
                        "EC2_METADATA_DISABLED": "true", "CONFIG_FILE": os.devnull,
                        "SHARED_CREDENTIALS_FILE": os.devnull}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_patterns_of_a_bucket(s3: None) -> None:
    names = [f"s3://held/a/b/{name}" for name in sorted(HELD) if name.endswith(".tar")]
    assert expand_shards("s3://held/a/b/*.tar") == expand_shards("s3://held/a") == names
    assert expand_shards("s3://held/a/b/s00{0..1}.tar") == [f"s3://held/a/b/s00{i}.tar" for i in range(2)]


def test_data_workers_stream_from_a_bucket_what_they_stream_from_a_disk(s3: None, tmp_path: Path) -> None:
    write({name: SIZE for name in HELD if name.endswith(".tar")}, tmp_path / "data")
    local = StepData(recipe_of(tmp_path / "data"), TOKENIZER)
    remote = StepData(recipe_of("s3://held/a/b/*.tar"), TOKENIZER, record=tmp_path / "record")
    remote[30]  # opened here before others are forked
    assert same_steps(list(make_loader(remote, 0, 30, workers=2)), [local[n] for n in range(30)])


def test_parquet_files_of_a_bucket(s3: None, tmp_path: Path) -> None:
    sizes = {name: SIZE for name in HELD if name.endswith(".parquet")}
    pattern = "s3://held/a/b/*.parquet"
    assert keys_of(open_stream(pattern), 0, 24) == keys_of(open_stream(write(sizes, tmp_path / "data")), 0, 24)
    source = ParquetSource(FileOptions("text", pattern, "all"))
    assert len(source) == 4 * SIZE
    assert source[SIZE].text == f"{sorted(sizes)[1]} number 0"


@pytest.fixture
def requests(s3: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many there were of each kind; without those that list."""
    call = s3fs.S3FileSystem._call_s3
    found: Counter[str] = Counter()

    async def counted(self: s3fs.S3FileSystem, method: str, *options: Any, **more: Any) -> Any:
        found[method] += 1
        return await call(self, method, *options, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    return found


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_file_that_was_listed_costs_one_request_and_a_named_one_two(
    requests: Counter[str], suffix: str, named: bool
) -> None:
    names = [name.partition(".")[0] for name in HELD if name.endswith(suffix)]
    pattern = f"s3://held/a/b/{'{' + ','.join(names) + '}' if named else '*'}.{suffix}"
    epoch = len(names) * SIZE // 4  # in steps
    source = open_stream(pattern)
    keys_of(source, 0, epoch)
    assert requests["head_object"] == (len(names) + (suffix == "parquet") if named else 0)  # the first for its columns
    keys_of(source, epoch, 2 * epoch)
    assert requests["get_object"] == len(names)
    requests.clear()
    (ShardSource if suffix == "tar" else ParquetSource)(FileOptions("text", pattern, "all"))
    assert requests == (Counter(head_object=len(names)) if named else Counter())  # the files are kept


def test_what_a_bucket_does_not_have(s3: None) -> None:
    with pytest.raises(UserError, match=r"shard s3://held/a/x.tar: cannot be read: not found: held/a/x.tar$"):
        ShardSource(FileOptions("text", "s3://held/a/x.tar"))
    with pytest.raises(UserError, match=r"shard s3://none/x.tar: .*not found: The specified bucket does not exist$"):
        ShardSource(FileOptions("text", "s3://none/x.tar"))
    with pytest.raises(UserError, match=r"s3://none/\*.tar: cannot be listed: not found: The specified bucket"):
        expand_shards("s3://none/*.tar")
    with pytest.raises(UserError, match=r"s3://held/c/\*.tar: cannot be listed: not found: held/c$"):
        expand_shards("s3://held/c/*.tar")
    with pytest.raises(UserError, match=r"shards s3://held/a/\*.tar: no file matches"):
        expand_shards("s3://held/a/*.tar")


def test_missing_credentials_end_a_run_at_once(s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(urls.time, "sleep", pauses.append)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    words = r"s3://held/a/b/.*tar: Unable to locate credentials: set them in the environment"
    for use in (
        lambda: expand_shards("s3://held/a/b/*.tar"),
        lambda: ShardSource(FileOptions("text", "s3://held/a/b/s000.tar")),
        lambda: open_stream("s3://held/a/b/s000.tar")[0],
    ):
        with pytest.raises(UserError, match=words):
            use()
    assert not pauses


class Local(http.server.BaseHTTPRequestHandler):
    """The hub's answers for the data set me/cats, as far as they are asked for; and one file behind a password."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.seen.append(f"{path} {self.headers.get('Authorization', '')}")
        name = path.rpartition("/")[2]
        below = "/api/datasets/me/cats/tree/main"
        if path.startswith("/datasets/me/cats/resolve/main/data/") and name in HELD:
            self._answer(200, HELD[name])
        elif path == "/api/datasets/me/cats":
            self._answer(200, {"id": "me/cats", "sha": "0" * 40, "siblings": []})
        elif path == below:
            self._answer(200, [{"type": "directory", "path": "data", "oid": "0" * 40}])
        elif path == f"{below}/data":
            found = [(n, len(c)) for n, c in HELD.items() if n.endswith(".tar")]
            self._answer(200, [{"type": "file", "path": f"data/{n}", "size": s, "oid": "0" * 40} for n, s in found])
        elif path == "/s000.tar" and self.headers.get("Authorization") == "Bearer word":
            self._answer(200, HELD["s000.tar"])
        else:
            self._answer(401 if path == "/s000.tar" else 404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, content: Any, more: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        for name, value in {"Content-Type": "application/json", **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def local() -> Iterator[str]:
    with serving(Local) as address:
        yield address
    Local.seen.clear()


def test_shards_of_the_hub(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants  # they are made of HF_ENDPOINT when it is imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, local))  # fmt: skip
    monkeypatch.setattr(constants, "ENDPOINT", local)
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    pattern = "hf://datasets/me/cats/data/*.tar"
    assert len(expand_shards(pattern)) == 8
    source = ShardSource(FileOptions("text", pattern, "all"))
    assert source[SIZE].text == "s001.tar number 0"
    assert "/datasets/me/cats/resolve/main/data/s001.tar Bearer hf_word" in Local.seen
    for name, words in (("cats/data/x.tar", "cats/data/x.tar"), ("dogs/x.tar", "repository not found")):
        with pytest.raises(UserError, match=f"shard hf://datasets/me/{name}: cannot be read: not found: .*{words}"):
            ShardSource(FileOptions("text", f"hf://datasets/me/{name}"))
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_headers_and_secrets_of_http(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(FetchOptions(attempts=1))
    with pytest.raises(FetchError) as failed:
        files.open(f"{local}/s000.tar?signature=secret")
    assert "/s000.tar" in str(failed.value) and "secret" not in str(failed.value)
    # What fsspec's own configuration says of a protocol: a file in ~/.config/fsspec, or FSSPEC_HTTP in the environment
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer word"}})
    assert files.open(f"{local}/s000.tar").size == len(HELD["s000.tar"])
