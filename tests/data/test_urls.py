"""Files by URL: patterns, the folder they are kept in, and what goes wrong."""

import contextlib
import functools
import gc
import http.server
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from vlmoe.config import UserError
from vlmoe.data import fetch, urls
from vlmoe.data.fetch import ALLOW_PIPE, Files, OpenFile
from vlmoe.data.files import FileOptions
from vlmoe.data.parquet import ParquetSource
from vlmoe.data.shards import ShardSource, expand_shards
from vlmoe.data.urls import (
    FetchError,
    FetchOptions,
    Stat,
    expand_url,
    is_url,
    shown_names,
    without_query,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(name: str, content: bytes) -> str:
    with fsspec.open(f"memory://{name}", "wb") as file:
        file.write(content)
    return f"memory://{name}"


def content(file: OpenFile) -> bytes:
    return os.pread(file.descriptor, file.size + 1, 0)


def kept(files: Files) -> int:
    return sum(path.stat().st_size for path in files.folder.glob("*.file"))


def test_patterns_of_urls() -> None:
    for name in ("a/x-1.tar", "a/x-2.tar", "a/b/x-3.tar", "a/notes.txt"):
        put(name, b"x")
    names = [f"memory:///a/{n}" for n in ("x-1.tar", "x-2.tar")]
    assert expand_shards("memory://a/*.tar") == names
    assert expand_shards("memory://a/x-{1..2}.tar") == ["memory://a/x-1.tar", "memory://a/x-2.tar"]
    assert expand_shards("memory://a") == ["memory:///a/b/x-3.tar", *names]
    assert expand_shards("https://host/a-{0..1}.tar?key=%2A") == [f"https://host/a-{i}.tar?key=%2A" for i in range(2)]
    with pytest.raises(UserError, match=r"memory://none/\*.tar: cannot be listed: not found: /none"):
        expand_shards("memory://none/*.tar")
    with pytest.raises(UserError, match="no file matches"):
        expand_shards("memory://a/*.tgz")
    with pytest.raises(UserError, match="chained URLs"):
        expand_shards("simplecache::memory://a/*.tar")
    with pytest.raises(UserError, match=r"nosuch://a.*nosuch"):
        expand_shards("nosuch://a/*.tar")


def test_file_urls_are_paths(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    assert expand_shards(f"file://{tmp_path}/*.tar") == [str(tmp_path / "a.tar")]


def test_secrets_are_not_shown() -> None:
    assert without_query("https://me:word@host/a.tar?sig=secret#x") == "https://host/a.tar"
    assert shown_names(["https://host/a.tar?sig=1", "https://host/b.tar?sig=2"]) == ["a.tar", "b.tar"]
    assert shown_names(["https://u:p@one/a.tar?sig=1", "https://two/a.tar"]) == [
        "https://one/a.tar",
        "https://two/a.tar",
    ]
    assert is_url("pipe:cat x") and not is_url("a:b/c.tar")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(urls.fsspec.core, "url_to_fs", missing)
    for use in (lambda: expand_url("s3://b/*.tar", ".tar"), lambda: Files(FetchOptions()).open("s3://b/a.tar")):
        with pytest.raises(UserError, match=r"s3://b/.*Install s3fs to access S3; pip install 'vlmoe\[cloud\]'"):
            use()


def test_a_missing_library_is_named_before_a_worker_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError(f"Install what reads {protocol}")

    monkeypatch.setattr(urls.fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"s3://b/0.tar: Install what reads s3; pip install 'vlmoe\[cloud\]'"):
        expand_shards("s3://b/{0..1}.tar")


def test_the_folder_stays_within_its_limit_and_keeps_what_was_used_last() -> None:
    files = Files(FetchOptions(limit=250))
    for i in range(3):
        put(f"{i}", bytes([i]) * 100)
    for i in (0, 1, 0, 2):
        file = files.open(f"memory://{i}")
        assert content(file) == bytes([i]) * 100
        assert kept(files) <= 250
    digests = {path.read_bytes()[0] for path in files.folder.glob("*.file")}
    assert digests == {0, 2}
    assert content(Files(FetchOptions(limit=0)).open("memory://1")) == bytes([1]) * 100
    assert kept(files) == 0
    assert content(file) == bytes([2]) * 100  # open, so still there


def test_a_file_that_changes_is_brought_anew() -> None:
    files = Files(FetchOptions())
    put("a", b"one")
    assert content(files.open("memory://a")) == b"one"
    put("a", b"another")
    assert content(files.open("memory://a")) == b"another"


def test_what_a_listing_says_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: dict[str, Stat] = {}
    put("a/x.tar", b"one")
    assert expand_shards("memory://a/*.tar", listed) == expand_shards("memory://a") == [*listed]
    assert [stat.size for stat in listed.values()] == [3]
    asked: list[str] = []

    def noted(url: str) -> Stat:
        asked.append(url)
        return urls.look_up(url)

    monkeypatch.setattr(fetch, "look_up", noted)
    files = Files(FetchOptions(attempts=2), listed)
    assert [content(files.open(*listed)) for _ in range(2)] == [b"one", b"one"]
    assert not asked
    assert content(Files(FetchOptions()).open(*listed)) == b"one"  # the same file, who asks and who does not
    assert len(asked) == 1 and len(list(files.folder.glob("*.file"))) == 1


def test_a_file_that_has_changed_since_it_was_listed_is_asked_for_anew() -> None:
    listed: dict[str, Stat] = {}
    put("a/x.tar", b"one")
    expand_shards("memory://a/*.tar", listed)
    put("a/x.tar", b"another")
    with pytest.raises(FetchError, match=r"^7 of 3 bytes came$"):
        Files(FetchOptions(attempts=1), listed).open(*listed)
    assert content(Files(FetchOptions(attempts=2), listed).open(*listed)) == b"another"


def test_what_fails_is_tried_so_often_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(FetchOptions(attempts=3))
    seen: list[str] = []
    pauses: list[float] = []
    monkeypatch.setattr(urls.time, "sleep", pauses.append)

    def half(self: MemoryFileSystem, path: str, place: str, **more: Any) -> None:
        seen.append(path)
        Path(place).write_bytes(b"12345")

    monkeypatch.setattr(MemoryFileSystem, "get_file", half)
    put("a", b"1234567890")
    with pytest.raises(FetchError, match=r"^5 of 10 bytes came \(3 attempts\)$"):
        files.open("memory://a")
    assert (len(seen), pauses) == (3, [1.0, 2.0])
    assert not list(files.folder.glob("*.tmp")) and not list(files.folder.glob("*.file"))
    with pytest.raises(FetchError, match="No such file"):
        files.open("/no/such.tar")
    assert len(pauses) == 2  # a local file that is not there needs no second look


def test_commands_run_only_where_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, url = Files(FetchOptions(attempts=2)), f"pipe:printf abc; echo x >> {tmp_path}/ran"
    monkeypatch.delenv(ALLOW_PIPE, raising=False)
    with pytest.raises(UserError, match=rf"set {ALLOW_PIPE}=1"):
        files.open(url)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(ALLOW_PIPE, "1")
    assert content(files.open(url)) == b"abc"
    with pytest.raises(FetchError, match=r"ended with 3: no luck \(2 attempts\)"):
        files.open("pipe:echo no luck >&2; exit 3")
    assert expand_shards("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]


@contextlib.contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of an HTTP server of this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    with serving(functools.partial(Quiet, directory=str(tmp_path / "served"))) as address:
        yield address


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_shards_over_http(server: str, tmp_path: Path) -> None:
    from tests.data.test_stream import shard

    for i in range(2):
        (tmp_path / "served" / f"{i}.tar").write_bytes(shard(f"{i}.tar", 3))
    source = ShardSource(FileOptions("text", server + "/{0..1}.tar", "all"))
    assert [source[i].text for i in range(6)] == [f"{i}.tar number {j}" for i in range(2) for j in range(3)]
    with pytest.raises(UserError, match=r"shard http://.*/2.tar: cannot be read: .*\(2 attempts\)"):
        ShardSource(FileOptions("text", server + "/2.tar", "all", fetch=FetchOptions(attempts=2)))


def test_a_fork_leaves_its_parents_sessions_alone(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To end one there waits a second for a thread of the parent's. Whoever opened it: another library, too."""
    end, parent = HTTPFileSystem.close_session, os.getpid()
    ended: list[int] = []

    def noted(loop: Any, session: Any) -> None:
        ended.append(os.getpid())
        if os.getpid() == parent:
            end(loop, session)

    monkeypatch.setattr(HTTPFileSystem, "close_session", staticmethod(noted))
    HTTPFileSystem.clear_instance_cache()
    (tmp_path / "served" / "a").write_bytes(b"abc")
    assert content(Files(FetchOptions()).open(f"{server}/a")) == b"abc"
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    assert fsspec.filesystem("http", encoded=True).cat(f"{server}/a") == b"abc"

    def child() -> None:
        gc.collect()
        there.send((ended, content(Files(FetchOptions(limit=0)).open(f"{server}/a"))))

    process = fork.Process(target=child)
    process.start()
    assert here.recv() == ([], b"abc")
    process.join()


def test_random_access_to_urls_needs_room_for_all_of_them() -> None:
    from tests.data.test_stream import shard

    for i in range(3):
        put(f"d/{i}.tar", shard(f"{i}.tar", 5))
    options = FileOptions("text", "memory://d/*.tar", "all", fetch=FetchOptions(limit=10**6))
    source = ShardSource(options)
    assert [source[i].key for i in (0, 14)] == ["0.tar/0000", "2.tar/0004"]
    small = FetchOptions(limit=2 * len(shard("0.tar", 5)))
    with pytest.raises(UserError, match=r"3 of 3 have .* GB already, more than data.stream.cache_gb = .*read: stream"):
        ShardSource(FileOptions("text", "memory://d/*.tar", "all", fetch=small))


def test_parquet_files_by_url() -> None:
    from tests.data.test_stream import shard

    names = [f"p/{split}-{i}.parquet" for split in ("train", "test") for i in range(2)]
    for name in names:
        put(name, shard(name, 7))
    for pattern in ("memory://p/train-{0..1}.parquet", "memory://p/train-*.parquet"):
        source = ParquetSource(FileOptions("text", pattern, "all"))
        assert [source[i].text for i in (13, 0)] == ["p/train-1.parquet number 6", "p/train-0.parquet number 0"]
        assert source[8].key == "train-1.parquet:1"
        assert pickle.loads(pickle.dumps(source))[8].text == source.text(8) == "p/train-1.parquet number 1"
    with pytest.raises(UserError, match=r"holds the splits test, train.*for example memory:.*train-"):
        ParquetSource(FileOptions("text", "memory://p", "all"))
    small = FetchOptions(limit=len(shard(names[0], 7)))
    with pytest.raises(UserError, match=r"parquet .*: 2 of 2 have .* GB already.*read: stream"):
        ParquetSource(FileOptions("text", "memory://p/train-*.parquet", "all", fetch=small))
    with pytest.raises(UserError, match=r"parquet memory://p/none.parquet: cannot be read: not found: /p/none.parquet"):
        ParquetSource(FileOptions("text", "memory://p/none.parquet", "all"))
