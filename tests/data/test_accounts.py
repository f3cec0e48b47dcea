"""Hostile and odd input: every file and member is accounted for, nothing hangs, and indexes hold no objects."""

import importlib.util
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmoe.config import UserError, json_lines, parse_json
from vlmoe.data.check import check_data
from vlmoe.data.packed import Packed
from vlmoe.data.shard_index import scan_shard
from vlmoe.data.text_tokenizer import train_wordpiece

_FILE = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


def _fuzz() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz", _FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, names: list[str], format: int = tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, "w", format=format) as tar:
        for name in names:
            body = png() if name.lower().endswith(("png", "jpg")) else b"a caption"
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return str(path)


@pytest.mark.parametrize(
    ("names", "good", "ignored"),
    [
        (["s0.input.jpg", "s0.outputs.txt"], 1, 0),
        (["x0.jpg", "x0.txt", "22.05.jpg", "22.05.txt"], 2, 0),
        (["22.05.jpg", "22.05.txt", "22.06.jpg", "22.06.txt"], 2, 0),
        (["a.JPG", "a.TXT", "a.thumb.jpg"], 1, 1),
        (["a.jpg", "a.txt", "a.cls", "._a.jpg", "__MACOSX/a.jpg", "b.jxl"], 1, 4),
    ],
)
def test_every_member_is_part_of_a_sample_or_ignored(tmp_path: Path, names: list[str], good: int, ignored: int) -> None:
    report = check_data(write(tmp_path / "a.tar", names))
    assert (report["good"], report["errors"]) == (good, 0)
    assert (report["members"], report["ignored_members"]) == (len(names), ignored)
    assert sum(r["count"] for r in report["ignored_members_reasons"].values()) == ignored


def test_links_hidden_files_tables_below_and_the_account_of_a_folder(tmp_path: Path) -> None:
    photos, disk = tmp_path / "photos", tmp_path / "disk"
    for folder in (photos / "sub", disk):
        folder.mkdir(parents=True)
    for stem in (photos / "22.05", photos / "sub" / "s", photos / "sub" / "t", disk / "b"):
        Path(f"{stem}.png").write_bytes(png())
    (photos / "22.05.txt").write_text("a")
    (disk / "b.txt").write_text("b")
    (photos / "sub" / "metadata.csv").write_text('file_name,text\ns.png,"of, two"\n')
    (photos / ".DS_Store").write_text("")
    (photos / "more").symlink_to(disk)
    (photos / "round").symlink_to(photos)
    (photos / "gone.png").symlink_to(tmp_path / "none")
    report = check_data(str(photos), type="folder")
    assert (report["good"], report["errors"]) == (3, 0)
    assert report["files"] == 10  # 4 images, 2 texts, a table, and three that are no file of ours
    assert {reason: said["example"] for reason, said in report["ignored_files_reasons"].items()} == {
        "left behind by macOS": ".DS_Store",
        "a link to a folder that is read already": "round",
        "a broken link": "gone.png",
        "an image that the table does not list": "sub/t.png",
    }


def test_a_negative_size_ends_the_shard_and_nothing_loops(tmp_path: Path) -> None:
    path = tmp_path / "loop.tar"
    write(path, ["a.png", "a.txt", "b.png", "b.txt"])
    raw = bytearray(path.read_bytes())
    at = next(i for i in range(0, len(raw), 512) if raw[i : i + 6] == b"b.png\0")
    raw[at + 124 : at + 136] = b"\xff" + (-1024).to_bytes(11, "big", signed=True)
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    path.write_bytes(raw)
    index = scan_shard(path)
    assert list(index.keys) == [b"a"] and "negative" in index.damage


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_index_holds_no_object_for_a_sample_and_a_long_key_costs_its_length(tmp_path: Path, format: int) -> None:
    long = "k" * 100_000
    index = scan_shard(Path(write(tmp_path / "a.tar", [f"{i:06d}.txt" for i in range(500)] + [long + ".txt"], format)))
    assert index.keys[500] == long.encode() and index.keys[7] == b"000007"
    assert len(index.keys.buffer) == 500 * 6 + 100_000
    assert len(pickle.dumps(index)) < 100_000 + 501 * 64 + 1_000
    names = Packed.of(f"{i:09d}".encode() for i in range(200_000))
    assert len(pickle.dumps(names)) < 200_000 * 17 + 1_000


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[" * 100_000, "levels deep"),
        (b"[" * 66 + b"]" * 66, "levels deep"),
        (b'"\\ud83d"', "surrogate"),
        (b"9" * 5000, "5000 digits"),
        (b"[1e999]", "too large"),
        (b"NaN", "no JSON number"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'"\xff"', "not.*UTF-8"),
    ],
)
def test_json_that_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=f"(?s)x, line 3: .*{reason}"):
        parse_json(raw, "x, line 3")


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    assert parse_json(b'\xef\xbb\xbf"\\ud83d\\ude00"', "x") == "\U0001f600"
    (tmp_path / "a").write_text(json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False) + "\n\n{}\n", encoding="utf-8")
    found = list(json_lines(tmp_path / "a"))
    assert found == [(f"{tmp_path}/a, line 1", {"a": "x\u2028y\x85z"}), (f"{tmp_path}/a, line 3", {})]


@pytest.mark.parametrize(
    "text", ["一个红色的数字七位于图像的中央", "こんにちは世界カタカナー", "สวัสดีครับ", "ខ្មែរ", "x" * 300]
)
def test_captions_without_blanks_are_many_tokens_none_unknown(text: str) -> None:
    tokenizer = train_wordpiece([text] * 5, 500)
    ids, offsets = tokenizer.encode(text * 8)
    assert len(ids) > 8 and tokenizer.unk_id not in ids and offsets[-1][1] == 8 * len(text)


@pytest.mark.parametrize("reader", ["tar", "json", "yaml", "images"])
def test_a_short_fuzz(reader: str) -> None:
    found = _fuzz().fuzz(reader, 25, seed=1)
    assert not found["crashes"] and sum(found["outcomes"].values()) == 25
