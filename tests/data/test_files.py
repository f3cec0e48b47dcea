"""Folder, parquet and shards: what is read, what is refused, and how."""

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmoe.config import Recipe, RecipeError, UserError, from_mapping
from vlmoe.data import parquet as parquet_module
from vlmoe.data import shard_index as shards_module
from vlmoe.data.files import FileOptions, hash_entries, split_rows
from vlmoe.data.sample import BadSample, Sample
from vlmoe.data.sources import build_sources, held_out_splits, open_files

SIZE = 8


def image_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_of(i)).save(buffer, format="PNG")
    return buffer.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(start: int, stop: int) -> list[tuple[str, bytes]]:
    members = []
    for i in range(start, stop):
        members += [(f"d/{i:04d}.png", png(i)), (f"d/{i:04d}.txt", f"caption {i}".encode())]
    return members


def read(type: str, kind: str, path: Path | str, split: str = "all", **more: Any) -> list[Sample | BadSample]:
    source = open_files(type, FileOptions(kind, str(path), split, SIZE, 1_000_000, **more))
    found: list[Sample | BadSample] = []
    for i in range(len(source)):
        try:
            found.append(source[i])
        except BadSample as bad:
            found.append(bad)
    return found


def texts(found: list[Sample | BadSample]) -> list[str | None]:
    return [s.text if isinstance(s, Sample) else None for s in found]


def only_bad(found: list[Sample | BadSample]) -> list[tuple[str, str]]:
    return [(s.key, s.reason) for s in found if isinstance(s, BadSample)]


# -------------------------------------------------------------------------------------------------------------- shards
def test_shards_read_back_by_brace_and_glob(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-00.tar", pairs(0, 5))
    write_tar(tmp_path / "a-01.tar", pairs(5, 9))
    by_brace = read("shards", "pair", tmp_path / "a-{00..01}.tar")
    by_glob = read("shards", "pair", tmp_path / "a-*.tar")
    by_folder = read("shards", "pair", tmp_path)
    assert texts(by_brace) == texts(by_glob) == texts(by_folder) == [f"caption {i}" for i in range(9)]
    for i, sample in enumerate(by_brace):
        assert isinstance(sample, Sample)
        assert sample.key == f"a-0{int(i >= 5)}.tar/d/{i:04d}"
        assert np.array_equal(sample.image, image_of(i))  # type: ignore[arg-type]
    assert [s.image for s in read("shards", "text", tmp_path / "a-*.tar")] == [None] * 9  # type: ignore[union-attr]
    assert texts(read("shards", "image", tmp_path / "a-*.tar")) == [None] * 9


def test_shard_captions_from_json_rotate_over_epochs(tmp_path: Path) -> None:
    about = json.dumps({"caption": ["one", "two", " ", "three"]}).encode()
    path = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.json", about), ("1.json", about), ("1.png", png(1))])
    source = open_files("shards", FileOptions("pair", str(path), "all", SIZE, 10**6, text_column="caption"))
    assert [source.draw(0, epoch).text for epoch in range(4)] == ["one", "two", "three", "one"]
    assert source.draw(1, 0).text == "two"
    assert source.text(1) == "two"


def test_a_truncated_shard_gives_its_whole_samples_and_one_bad_one(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", pairs(0, 6)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        places = {m.name: (m.offset, m.offset_data, m.size) for m in tar.getmembers()}
    header, data, size = places["d/0003.png"]
    for cut in (data + size // 2, header + 100, header):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        found = read("shards", "pair", tmp_path / "cut.tar")
        assert texts(found) == ["caption 0", "caption 1", "caption 2", None]
        ((key, reason),) = only_bad(found)
        assert key == "cut.tar"
        assert "truncated or damaged shard" in reason
        assert "the last good key is d/0002" in reason


def test_a_damaged_header_and_a_file_that_is_no_tar(tmp_path: Path) -> None:
    damaged = bytearray(write_tar(tmp_path / "a.tar", pairs(0, 4)).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        at = tar.getmember("d/0002.png").offset
    damaged[at : at + 200] = b"\xff" * 200
    (tmp_path / "b.tar").write_bytes(damaged)
    assert texts(read("shards", "pair", tmp_path / "b.tar")) == ["caption 0", "caption 1", None]
    for name, content in (("empty.tar", b""), ("noise.tar", b"no tar at all" * 100)):
        (tmp_path / name).write_bytes(content)
        ((key, reason),) = only_bad(read("shards", "pair", tmp_path / name))
        assert key == name
        assert "nothing in it can be read" in reason


def test_every_kind_of_broken_member_is_told_by_key(tmp_path: Path) -> None:
    good = [("ok.png", png(0)), ("ok.txt", b"fine")]
    broken = {
        "utf": ([("utf.png", png(0)), ("utf.txt", b"caf\xe9 au lait")], "text is not UTF-8: byte 0xe9 at 3"),
        "blank": ([("blank.png", png(0)), ("blank.txt", b" \n\t")], "empty caption"),
        "none": ([("none.png", png(0))], "no caption"),
        "img": ([("img.png", png(0)[:50]), ("img.txt", b"x")], "broken image"),
        "noimg": ([("noimg.txt", b"x")], "no image"),
        "js": ([("js.png", png(0)), ("js.json", b"{broken")], "broken JSON"),
        "arr": ([("arr.png", png(0)), ("arr.json", b"[1]")], "JSON is a list, expected an object"),
        "num": ([("num.png", png(0)), ("num.json", b'{"text": 5}')], "caption is int"),
        "list": ([("list.png", png(0)), ("list.json", b'{"text": ["", 5]}')], "caption is int"),
    }
    members = good + [m for entry, _ in broken.values() for m in entry]
    found = read("shards", "pair", write_tar(tmp_path / "x.tar", members))
    assert texts(found)[0] == "fine"
    bad = only_bad(found)
    assert [key for key, _ in bad] == [f"x.tar/{name}" for name in broken]
    for (_, reason), (_, wanted) in zip(bad, broken.values(), strict=True):
        assert wanted in reason


def test_codes_beside_images(tmp_path: Path) -> None:
    codes = np.arange(4, dtype=np.int32)
    pickled = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
    members = [
        ("0.png", png(0)),
        ("0.codes.npy", npy(codes)),
        ("1.png", png(1)),
        ("1.codes.npy", npy(codes.reshape(2, 2))),
    ]
    for i, raw in enumerate((npy(codes[:3]), npy(codes.astype(float)), npy(codes - 1), pickled, b"no array"), start=2):
        members += [(f"{i}.png", png(i)), (f"{i}.codes.npy", raw)]
    members += [("7.png", png(7))]
    path = write_tar(tmp_path / "x.tar", members)
    found = read("shards", "image", path, patches=4)
    assert [s.codes.tolist() for s in found[:2]] == [[0, 1, 2, 3]] * 2  # type: ignore[union-attr]
    reasons = [reason for _, reason in only_bad(found)]
    wanted = ["int32 (3,)", "float64", "-1 is below 0", "broken codes", "broken codes", "no visual codes"]
    assert len(reasons) == len(wanted)
    assert all(w in r for w, r in zip(wanted, reasons, strict=True))
    assert not only_bad(read("shards", "image", path))  # codes are not asked for


def test_shards_that_cannot_be_opened_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none-1.tar"):
        read("shards", "pair", tmp_path / "none-{1..2}.tar")
    with pytest.raises(UserError, match="no file matches"):
        read("shards", "pair", tmp_path / "*.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"z.tar: compressed"):
        read("shards", "pair", tmp_path / "z.tar")


def test_the_index_is_cached_by_content_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_CACHED_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "a.tar", pairs(0, 3))
    first = texts(read("shards", "pair", path))
    (cached,) = (tmp_path / "cache" / "vlmoe" / "shards").glob("*.index")
    monkeypatch.setattr(shards_module, "scan_shard", lambda p: pytest.fail("scanned again"))
    assert texts(read("shards", "pair", path)) == first
    monkeypatch.undo()
    monkeypatch.setattr(shards_module, "_CACHED_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached.write_bytes(b"broken")
    assert texts(read("shards", "pair", path)) == first
    write_tar(path, pairs(0, 5))
    assert len(read("shards", "pair", path)) == 5


# -------------------------------------------------------------------------------------------------------------- folder
def test_folder_with_captions_beside(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, i in (("b.png", 1), ("sub/a.png", 2), ("c.png", 3), ("z.png", 4)):
        (tmp_path / name).write_bytes(png(i))
    (tmp_path / "b.txt").write_text("the b\nsecond line", encoding="utf-8")
    (tmp_path / "sub" / "a.json").write_text('{"text": "the a"}')
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    found = read("folder", "pair", tmp_path)
    assert texts(found) == ["the b second line", None, "the a", None]
    assert [key for key, _ in only_bad(found)] == ["c.png", "z.png"]
    assert "expected z.txt or z.json" in only_bad(found)[1][1]
    assert len(read("folder", "image", tmp_path)) == 4


def test_folder_with_a_table(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    lines = [
        {"file_name": "1.png", "text": "one"},
        {"file_name": "0.png", "text": "zero"},
        {"file_name": "9.png", "text": "x"},
    ]
    lines.append({"file_name": "1.png", "text": "uno"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read("folder", "pair", tmp_path)
    assert texts(found) == ["one", "zero", None]
    assert only_bad(found)[0][0] == "9.png"
    source = open_files("folder", FileOptions("pair", str(tmp_path), "all", SIZE))
    assert source.draw(0, 1).text == "uno"
    for line, reason in (
        ("{", "line 1: not valid JSON"),
        ("{}", "line 1: expected .file_name"),
        ('{"file_name": "../x.png"}', "not a path below"),
    ):
        (tmp_path / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=reason):
            read("folder", "pair", tmp_path)


def test_a_tables_column_of_captions_is_found_or_missed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.csv").write_text("file_name,caption,place\na.png,a cat,here\n")
    options = FileOptions("pair", str(tmp_path), "all", SIZE)
    source = open_files("folder", options)
    assert source[0].text == "a cat"
    assert source.understood() == ["text: column 'caption' of metadata.csv"]
    named = open_files("folder", replace(options, text_column="place"))
    assert named[0].text == "here" and not named.understood()
    with pytest.raises(UserError, match=r"metadata\.csv: no column 'label'; there are file_name, caption, place: name"):
        open_files("folder", replace(options, text_column="label"))
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "a", "description": "b"}')
    with pytest.raises(UserError, match="it could be caption or description"):
        open_files("folder", options)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png"}\n{"file_name": "a.png", "text": "late"}')
    assert open_files("folder", options)[1].text == "late"  # some lines have none


def test_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"first\n\nthird \xc3\xa9\n   \nfifth \xff\nlast without end")
    (tmp_path / "b.txt").write_bytes(b"windows\r\n\r\nline\r\n")
    (tmp_path / "c.txt").write_bytes(("é" * 50_000).encode() + b"\nafter\n")
    found = read("folder", "text", tmp_path)
    assert texts(found)[:7] == ["first", "third é", None, None, "last without end", "windows", "line"]
    assert only_bad(found) == [("a.txt:4", "empty caption"), ("a.txt:5", "text is not UTF-8: byte 0xff at 6")]
    assert texts(found)[7:] == ["é" * 32768, "after"]  # the first 64 KiB of a line are read
    assert texts(read("folder", "text", tmp_path / "b.txt")) == ["windows", "line"]


def test_folders_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read("folder", "pair", tmp_path / "none")
    with pytest.raises(UserError, match="no images"):
        read("folder", "image", tmp_path)
    with pytest.raises(UserError, match=r"no .txt file with text"):
        read("folder", "text", tmp_path)


# ------------------------------------------------------------------------------------------------------------- parquet
def write_parquet(path: Path, rows: int, group: int = 4, struct: bool = True) -> Path:
    images: list[Any] = [{"bytes": png(i), "path": None} if struct else png(i) for i in range(rows)]
    captions = [[f"caption {i}", f"other {i}"] for i in range(rows)]
    table = pa.table({"image": images, "text": captions, "codes": [[0, 1, 2, 3]] * rows, "more": [1] * rows})
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_reads_bytes_and_hugging_face_structs(tmp_path: Path, struct: bool) -> None:
    write_parquet(tmp_path / "a.parquet", 10, struct=struct)
    write_parquet(tmp_path / "b.parquet", 3)
    found = read("parquet", "pair", tmp_path / "*.parquet", patches=4)
    assert [s.key for s in found] == [f"a.parquet:{i}" for i in range(10)] + [f"b.parquet:{i}" for i in range(3)]
    for i, sample in enumerate(found):
        assert isinstance(sample, Sample)
        row = i % 10
        assert np.array_equal(sample.image, image_of(row))  # type: ignore[arg-type]
        assert sample.text == (f"caption {row}" if i % 2 == 0 else f"other {row}")
        assert sample.codes is not None
        assert sample.codes.tolist() == [0, 1, 2, 3]
    source = open_files("parquet", FileOptions("pair", str(tmp_path), "all", SIZE))
    assert source.text(3) == "other 3"
    assert pickle.loads(pickle.dumps(source))[4].text == "caption 4"


def test_parquet_epoch_order_is_exact_and_keeps_to_few_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", 200, group=10)
    size = pq.read_metadata(path).row_group(0).total_byte_size
    monkeypatch.setattr(parquet_module, "WINDOW_BYTES", int(size * 3.5))
    source = open_files("parquet", FileOptions("pair", str(path), "train", SIZE))
    assert isinstance(source, parquet_module.ParquetSource)
    orders = [[source.order(n, key) for n in range(len(source))] for key in (1, 2)]
    assert all(sorted(order) == list(range(len(source))) for order in orders)
    assert orders[0] != orders[1]
    groups = [int(source.rows[i]) // 10 for i in orders[0]]
    assert len(set(groups[:25])) <= 4
    assert groups[:25] != sorted(groups[:25])
    for i in orders[0]:
        source[i]
        assert sum(t.nbytes for t in source._cache.values()) <= size * 3.5


def test_parquet_bad_rows_and_bad_files(tmp_path: Path) -> None:
    table = pa.table({"image": [png(0), None, b"no image", png(3)], "text": ["fine", "x", "x", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read("parquet", "pair", tmp_path / "a.parquet")
    assert [key for key, _ in only_bad(found)] == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]
    assert [reason.split(" of ")[0] for _, reason in only_bad(found)] == ["no image", "not an image", "no caption"]
    with pytest.raises(UserError, match="no column 'caption'; there are image, text"):
        read("parquet", "pair", tmp_path / "a.parquet", text_column="caption")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"b.parquet: cannot be read"):
        read("parquet", "pair", tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no such file"):
        read("parquet", "pair", tmp_path / "c.parquet")


# -------------------------------------------------------------------------------------------------------------- splits
def test_one_in_a_hundred_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"line {i}" for i in range(5000)))
    parts = {split: set(texts(read("folder", "text", tmp_path, split))) for split in ("train", "val", "all")}
    assert not parts["train"] & parts["val"]
    assert parts["train"] | parts["val"] == parts["all"]
    assert 30 <= len(parts["val"]) <= 70
    (tmp_path / "u.txt").write_text("more\n" * 300)
    assert parts["val"] <= set(texts(read("folder", "text", tmp_path, "val")))  # other files move nothing


def test_the_same_entries_are_held_out_from_every_kind(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 150))
    held = [{s.key for s in read("shards", kind, path, "val")} for kind in ("image", "text", "pair")]
    assert held[0] == held[1] == held[2]
    assert held[0]


def test_few_samples_still_hold_one_out() -> None:
    hashes = np.array([7, 5, 9], dtype=np.uint64)
    assert split_rows(hashes, "val").tolist() == [1]
    assert split_rows(hashes, "train").tolist() == [0, 2]
    assert split_rows(hashes[:1], "train").tolist() == [0]


def test_a_share_is_held_out_or_all_or_nothing() -> None:
    hashes = hash_entries("a", 20_000)
    assert split_rows(hashes, "val").tolist() == np.flatnonzero(hashes % 100 == 0).tolist()
    smaller: set[int] = set()
    for share in (0.001, 0.01, 0.055, 0.5):
        val, train = (set(split_rows(hashes, split, share).tolist()) for split in ("val", "train"))
        assert not val & train
        assert len(val | train) == 20_000
        assert abs(len(val) / 20_000 - share) < 0.01
        assert smaller <= val
        smaller = val
    assert [len(split_rows(hashes, split, 1)) for split in ("train", "val", "all")] == [0, 20_000, 20_000]
    assert [len(split_rows(hashes, split, 0)) for split in ("train", "val", "all")] == [20_000, 0, 20_000]


def test_a_source_can_be_for_validation_alone(tmp_path: Path) -> None:
    for name in ("train", "mine"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(300)))

    def plan(*shares: float, names: tuple[str, str] = ("train", "mine")) -> Recipe:
        sources = [
            {"type": "folder", "kind": "text", "path": str(tmp_path / f"{name}.txt"), "held_out": share}
            for name, share in zip(names, shares, strict=True)
        ]
        return from_mapping({"data": {"sources": sources, "batch": {"image": 0, "pair": 0, "text": 2}}})

    recipe = plan(0, 1)
    for split, name in (("train", "train"), ("val", "mine")):
        ((source, _),) = build_sources(recipe.data, recipe.model, "text", split)
        assert len(source) == 300
        assert {(source[i].text or "").split()[0] for i in range(300)} == {name}
    assert held_out_splits(recipe) == ["val"]
    with pytest.raises(RecipeError, match="because all text sources are held out"):
        plan(1, 1)
    with pytest.raises(RecipeError, match="because no text source holds samples out"):
        plan(0, 0)
    with pytest.raises(RecipeError, match=r"data\.sources\[1\]\.held_out' got 1.*another source of the same files"):
        plan(0, 1, names=("mine", "mine"))
    with pytest.raises(RecipeError, match="from 0 to 1"):
        plan(0, 2)
    with pytest.raises(RecipeError, match="the world makes its held-out samples"):
        from_mapping({"data": {"sources": [{"held_out": 0.5}], "batch": {"image": 0, "text": 0}}})
