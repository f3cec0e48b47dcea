"""Tables as Hugging Face data sets lay them out, in parquet and in Arrow files: what is read, and what is refused."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.data.test_files import SIZE, image_of, only_bad, png, read, texts
from vlmoe.cli import app
from vlmoe.config import RecipeError, UserError, from_mapping
from vlmoe.data.check import check_data
from vlmoe.data.files import FileOptions
from vlmoe.data.loader import StepData
from vlmoe.data.sample import Sample
from vlmoe.data.show import show_data
from vlmoe.data.sources import open_files
from vlmoe.data.text_tokenizer import build_text_tokenizer

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
# data-00000-of-00001.arrow as `save_to_disk` of datasets 5.2.0 wrote it, compressed: two rows of img (an Image),
# caption (a list of texts) and label (a class of cat and dog, the second row's not told)
GENUINE = """
c-oy)&ui3B5T0zZO>DDmC`A_OA><$kB8Z1V52AI&20|$!A{4Q2ce80=H@n@u1xqQ2^x|2N9z1yLK|Fi%ya%C(m&L!pKcR<0oOzjDV-8vzc$pvXo0<2%H
_5Ur+pYjOKr#=DFb7qz&_dCSS=`32!SQot<2EjeTll3t3+=DG_XXFX7bl&*x9%Q#olwZpFie#b_adcV$b&(Mmgo0G6naNDU9TkuGVUkE9A&qs&{PiNB=
QhC%YG`lqda>S3gT3%NLMt&uBwoTo@&2?JtXC~`;qs&nDn44(lk&BM<@Ubc!#}F6k)@TXoaAoe}d~C-_b?xkcA3y<Z_Ipic2+SZY(erH$)lbKFjm$6|`
3iT#|3%ViF)g+;NVrQjdC}2kBUbJ+dWYKIXVuy-*XM6#~fLmd=j6!w1Ao{!()w<Q~~$#5i~&3+KU9uk7$FXogehF}-i|K!&M`87hwH*@>3l3Dlfi<;k*
DHP8*!yRI<+C#%kLL^F25=dQqSS%k}r&Dvr8j`e8?cUr=KX1&CET*8k__(^GhQtJDY^(t#i`x8I)okDD`bZ__%U;oEGiC^I5&Gy!#+Wa-5zUFT>9`o}W
7A0PPd*ue5(Qn*;^74J_;_MX!c4HszeACSJ<GYG8|KV2S)5h-W%M@DSLhar2GtdKj6V^<){arJ67M6b$i{)oC3-2)u+qVWu)Wlz&^z3eW>Ft-8bKzo!o
9>UqFhonZl*vBue+N9TQz8Es7dpW7
"""


def features(**of: Any) -> dict[bytes, bytes]:
    """The schema's metadata as `datasets` writes it."""
    return {b"huggingface": json.dumps({"info": {"features": of}}).encode()}


def save_to_disk(folder: Path, tables: list[pa.Table]) -> Path:
    """A data set as `Dataset.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "0", "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": {}}))
    return folder


def hub_table(start: int, stop: int, **more: Any) -> pa.Table:
    images = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(start, stop)], IMAGE)
    table = pa.table({"image": images, "text": [f"caption {i}" for i in range(start, stop)], **more})
    about = features(image={"_type": "Image"}, text={"dtype": "string", "_type": "Value"})
    return table.replace_schema_metadata(about)


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": words} for i, words in enumerate(turns)]


def understood(type: str, path: Path, **more: Any) -> str:
    return "\n".join(open_files(type, FileOptions("pair", str(path), "all", SIZE, **more)).understood())


# --------------------------------------------------------------------------------------------------- saved data sets
def test_a_file_that_datasets_wrote_is_read_to_the_byte(tmp_path: Path) -> None:
    raw = zlib.decompress(base64.b85decode("".join(GENUINE.split())))
    assert b'"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}' in raw
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "data-00000-of-00001.arrow").write_bytes(raw)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    first, second = read("arrow", "pair", folder)
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert (first.text, second.text) == ("a red square", "a blue square")
    assert first.image is not None
    assert second.image is not None
    assert first.image[0, 0].tolist() == [255, 0, 0]
    assert second.image[0, 0].tolist() == [0, 0, 255]
    assert first.key == "data-00000-of-00001.arrow:0"
    found = read("arrow", "pair", folder, text_column="label")
    assert texts(found) == ["dog", None]
    assert only_bad(found) == [("data-00000-of-00001.arrow:1", "no caption")]
    assert understood("arrow", folder) == (
        "image: column 'img', {bytes, path}; a path is one from the folder of the file\n"
        "text: column 'caption', a list, each a text\nnot read: label"
    )


def test_a_saved_data_set_is_read_in_its_own_order_and_at_random(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", [hub_table(0, 5), hub_table(5, 8)])
    with pa.ipc.new_stream(folder / "cache-1234.arrow", hub_table(9, 12).schema) as writer:  # what `map` leaves behind
        writer.write_table(hub_table(9, 12))
    source = open_files("arrow", FileOptions("pair", str(folder), "all", SIZE))
    assert len(source) == 8
    for i in (7, 0, 4, 5):
        assert source[i].text == f"caption {i}"
        assert np.array_equal(source[i].image, image_of(i))  # type: ignore[arg-type]
    assert source[6].key == "data-00001-of-00002.arrow:1"
    assert pickle.loads(pickle.dumps(source))[6].text == source.text(6) == "caption 6"
    report = check_data(str(folder), image_size=SIZE)
    assert (report["type"], report["good"], report["errors"]) == ("arrow", 8, 0)
    assert report["ignored_files_reasons"]["not one of the data set's files"]["example"] == "cache-1234.arrow"


def test_of_several_splits_one_has_to_be_named(tmp_path: Path) -> None:
    both = tmp_path / "both"
    for split in ("test", "train"):
        save_to_disk(both / split, [hub_table(0, 2)])
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"holds the data sets test, train: name one of them, for example .*both/train"):
        read("arrow", "pair", both)
    assert len(read("arrow", "pair", both / "train")) == 2
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        pq.write_table(hub_table(0, 2), hub / f"{name}.parquet")
    with pytest.raises(
        UserError, match=r"holds the splits train, validation.*for example .*hub/data/train-\*\.parquet"
    ):
        read("parquet", "pair", tmp_path / "hub")
    assert len(read("parquet", "pair", hub / "train-*.parquet")) == 4


def test_arrow_files_that_are_cut_off_or_none_are_refused(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", [hub_table(0, 5)])
    file = folder / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 8):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"arrow .*data-00000-of-00001\.arrow: (no Arrow file|cannot be read)"):
            read("arrow", "pair", folder)
    file.unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow is missing, which state\.json names"):
        read("arrow", "pair", folder)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(UserError, match="expected '_data_files'"):
        read("arrow", "pair", folder)
    with pytest.raises(UserError, match="no such file"):
        read("arrow", "pair", tmp_path / "none.arrow")


def test_a_row_whose_offsets_lead_astray_is_a_bad_sample(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", [hub_table(0, 2)])
    file = folder / "data-00000-of-00001.arrow"
    raw = file.read_bytes()
    offsets = np.array([0, 9, 18], dtype=np.int32).tobytes()  # of the two captions
    assert raw.count(offsets) == 1
    file.write_bytes(raw.replace(offsets, np.array([0, 9, 1 << 30], dtype=np.int32).tobytes()))
    found = read("arrow", "pair", folder)
    assert texts(found) == ["caption 0", None]
    assert only_bad(found)[0][0] == "data-00000-of-00001.arrow:1"


def test_the_other_arrow_format_is_read_as_well(tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "a.arrow", hub_table(0, 3).schema) as writer:
        writer.write_table(hub_table(0, 3))
    assert texts(read("arrow", "pair", tmp_path / "*.arrow")) == [f"caption {i}" for i in range(3)]


# ----------------------------------------------------------------------------------------------------------- images
def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_images_named_by_their_path_are_found_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    paths = ["pictures/1.png", "pictures/none.png", "../secret.png", str(tmp_path / "secret.png"), "zip://a.png", None]
    structs = pa.array([{"bytes": None, "path": p} for p in paths], IMAGE)
    file = write(tmp_path / "data" / "a.parquet", image=structs, picture=paths, text=["x"] * len(paths))
    for column in ("image", "picture"):
        found = read("parquet", "pair", tmp_path, image_column=column)  # from the source's folder
        assert isinstance(found[0], Sample)
        assert np.array_equal(found[0].image, image_of(1))  # type: ignore[arg-type]
        assert [key for key, _ in only_bad(found)] == ["a.parquet:1", "a.parquet:2", "a.parquet:4", "a.parquet:5"]
        assert isinstance(found[3], Sample)  # an absolute path that leads there
    found = read("parquet", "pair", file)  # from the file's folder, where they are not
    reasons = [reason.split(":")[0] for _, reason in only_bad(found)]
    assert reasons == [
        *["image cannot be read"] * 2,
        *["image's path leads elsewhere"] * 2,
        "image is a link",
        "no image",
    ]
    found = read("parquet", "pair", file, images=str(tmp_path))
    assert isinstance(found[0], Sample)
    assert isinstance(found[3], Sample)  # an absolute path below the folder that the recipe names
    assert f"a path is one from {tmp_path}" in understood("parquet", file, images=str(tmp_path))


def test_of_several_images_the_first_is_taken_and_it_is_said(tmp_path: Path) -> None:
    images = pa.array([[{"bytes": png(i), "path": None} for i in row] for row in ([3, 4], [5], [])], pa.list_(IMAGE))
    write(tmp_path / "a.parquet", images=images, text=["a", "b", "c"])
    found = read("parquet", "pair", tmp_path / "a.parquet")
    assert isinstance(found[0], Sample)
    assert isinstance(found[1], Sample)
    assert np.array_equal(found[0].image, image_of(3))  # type: ignore[arg-type]
    assert (found[0].taken, found[1].taken) == (("the first of several images",), ())
    assert only_bad(found) == [("a.parquet:2", "no image")]
    assert "a list, each {bytes, path}; of several the first is taken" in understood("parquet", tmp_path / "a.parquet")
    report = check_data(str(tmp_path / "a.parquet"))
    assert report["taken"] == {"the first of several images": 1}
    write(tmp_path / "b.parquet", image=[[png(6), png(7)]], text=["a"])
    (only,) = read("parquet", "pair", tmp_path / "b.parquet")
    assert isinstance(only, Sample)
    assert np.array_equal(only.image, image_of(6))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- conversations
LLAVA = talk("<image>\nWhat is this?", "A red square.", "Sure?", "Yes.")
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A red square."},
]
PARTS = [{"role": "assistant", "content": [{"type": "image", "text": None}, {"type": "text", "text": "A square."}]}]
LISTS = {"from": ["human", "gpt"], "value": ["What?", "A square."]}  # how older data sets store a list of objects
CAULDRON = [{"user": "What?", "assistant": "A square.", "source": "vqa"}]


@pytest.mark.parametrize(
    ("turns", "answer", "everything"),
    [
        (LLAVA, "A red square.", "What is this? A red square. Sure? Yes."),
        (CHAT, "A red square.", "What is this? A red square."),
        (PARTS, "A square.", "A square."),
        (LISTS, "A square.", "What? A square."),
        (CAULDRON, "A square.", "What? A square."),
    ],
    ids=["llava", "chat", "parts", "lists", "cauldron"],
)
def test_conversations(tmp_path: Path, turns: Any, answer: str, everything: str) -> None:
    path = write(tmp_path / "a.parquet", image=[png(0)], conversations=[turns])
    for wanted, text in (("answer", answer), ("all", everything)):
        (found,) = read("parquet", "pair", path, turns=wanted)
        assert isinstance(found, Sample)
        assert found.text == text
        assert found.taken[0].endswith("of a conversation")
        assert "a conversation; " in understood("parquet", path, turns=wanted)
        source = open_files("parquet", FileOptions("pair", str(path), "all", SIZE, turns=wanted))
        assert source.text(0) == text


def test_conversations_in_tables_of_a_folder(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    lines = [{"file_name": "0.png", "talk": LLAVA}, {"file_name": "1.png", "talk": talk("Hello?")}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read("folder", "pair", tmp_path, text_column="talk")
    assert texts(found) == ["A red square.", None]
    assert "no answer in the conversation: an answer is from assistant, gpt" in only_bad(found)[0][1]
    assert texts(read("folder", "pair", tmp_path, text_column="talk", turns="all"))[1] == "Hello?"


# ----------------------------------------------------------------------------------------------------------- errors
def test_what_no_column_can_be_is_said_when_the_file_is_opened(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet",
        image=[[[1, 2]]],
        text=[3],
        objects=[[{"raw": "x", "id": 1}]],
        caption=["x"],
        more=[png(0)],
    )
    for columns, message in (
        ({}, "column 'image' is list.*expected encoded bytes"),
        ({"image_column": "more"}, "column 'text' is int64; as text is expected a text"),
        ({"image_column": "more", "text_column": "objects"}, "column 'objects' is list.*a conversation: a list of"),
        ({"image_column": "none"}, "no column 'none'; there are image, text, objects, caption, more"),
    ):
        with pytest.raises(UserError, match=message):
            read("parquet", "pair", tmp_path / "a.parquet", **columns)
    write(tmp_path / "b.parquet", photo=[png(0)], caption=["x"], sentences=[["y"]])
    with pytest.raises(UserError, match=r"no column 'text'.*could be caption or sentences: set text_column"):
        read("parquet", "pair", tmp_path / "b.parquet")
    assert texts(read("parquet", "pair", tmp_path / "b.parquet", text_column="sentences")) == ["y"]
    classes = [features(text={"names": names, "_type": "ClassLabel"}) for names in (["cat", "dog"], ["dog", "cat"])]
    for name, about in zip("cd", classes, strict=True):
        table = pa.table({"image": [png(0)], "text": [0]})
        pq.write_table(table.replace_schema_metadata(about), tmp_path / f"{name}.parquet")
    assert texts(read("parquet", "pair", tmp_path / "d.parquet")) == ["dog"]
    with pytest.raises(UserError, match=r"d\.parquet: column 'text'.*or the names differ"):
        read("parquet", "pair", tmp_path / "[cd].parquet")
    write(tmp_path / "e.parquet", image=[png(0)], text=[None])
    with pytest.raises(
        UserError, match=r"e\.parquet: column 'text', a text here, and .* of 2 classes in the first file"
    ):
        read("parquet", "pair", tmp_path / "[ce].parquet")
    with pytest.raises(RecipeError, match=r"data\.sources\[0\]\.turns"):
        from_mapping({"data": {"sources": [{"type": "arrow", "path": "x", "turns": "first"}]}})


# ------------------------------------------------------------------------------------------------------------- a run
def test_a_run_draws_from_a_saved_data_set_and_says_what_it_reads(tmp_path: Path) -> None:
    rows = pa.array([LLAVA] * 6, TURNS)
    images = pa.array([[{"bytes": png(i), "path": None}] * 2 for i in range(6)], pa.list_(IMAGE))
    folder = save_to_disk(tmp_path / "saved", [pa.table({"images": images, "conversations": rows})])
    recipe = from_mapping(
        {
            "model": {"image_size": 16, "patch": 4, "max_text": 16, "vocabulary": 128, "width": 24, "heads": 2},
            "data": {
                "batch": {"image": 0, "text": 2, "pair": 3},
                "sources": [{"type": "arrow", "kind": kind, "path": str(folder)} for kind in ("pair", "text")],
                "text_tokenizer": {"samples": 5},
            },
        }
    )
    tokenizer = build_text_tokenizer(recipe)
    data = StepData(recipe, tokenizer)
    first, again = data[0], StepData(recipe, tokenizer)[0]
    assert first.batches["pair"].keys == again.batches["pair"].keys
    assert len(first.batches["pair"]) == 3
    assert not first.bad
    assert any("of several the first is taken" in line for line in data.understood())
    said: list[str] = []
    show_data(recipe, tmp_path / "sheet.png", samples=4, tokenizer=tokenizer, say=said.append)
    assert "4 of 4 shown are the first of several images" in said
    assert any("column 'conversations', a conversation; its first answer is taken" in line for line in said)


def test_the_command_says_what_it_understood(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", [pa.table({"img": [png(0)], "talk": pa.array([LLAVA], TURNS)})])
    arguments = ["data", "check", str(folder), "--text-column", "talk", "--turns", "all"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "image: column 'img', encoded bytes" in result.output
    assert "text: column 'talk', a conversation; all its turns are taken" in result.output
    assert "1 samples are all turns of a conversation" in result.output
