import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.data.fakes import small_recipe
from vlmoe.config import Recipe, UserError, from_mapping
from vlmoe.data import show
from vlmoe.data.check import check_data, print_check, tell_type
from vlmoe.data.files import FileOptions
from vlmoe.data.loader import StepData, held_out
from vlmoe.data.make import make_shards
from vlmoe.data.mixture import Mixture
from vlmoe.data.sources import build_sources, held_out_splits, open_files
from vlmoe.data.text_tokenizer import build_text_tokenizer


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return from_mapping(
        {
            "model": {"image_size": 48, "patch": 8, "max_text": 48, "vocabulary": 2048},
            "data": {"batch": {"image": 0, "text": 4, "pair": 4}, "text_tokenizer": {"samples": 300}},
        }
    )


@pytest.fixture(scope="module")
def shards(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    make_shards(recipe, out, samples=25, per_shard=10)
    return out


def test_shards_read_back_as_the_same_samples_with_their_truth(recipe: Recipe, shards: Path) -> None:
    assert sorted(p.name for p in shards.iterdir()) == [f"train-pair-0000{i}.tar" for i in range(3)]
    world = Mixture(build_sources(recipe.data, recipe.model, "pair", factors=True), recipe.seed)
    source = open_files("shards", FileOptions("pair", str(shards), "all", factors=True))
    assert len(source) == 25
    for i in range(25):
        made, found = world.draw(i, lambda s: s, []), source[i]
        assert np.array_equal(made.image, found.image)  # type: ignore[arg-type]
        assert made.text == found.text
        assert made.patch_factors == found.patch_factors
        assert made.spans == found.spans
        assert made.spans


def test_shards_are_plain_webdataset(shards: Path) -> None:
    with tarfile.open(shards / "train-pair-00000.tar") as tar:
        names = tar.getnames()
    assert {n.split(".", 1)[1] for n in names} == {"png", "txt", "json"}
    assert len({n.split(".")[0] for n in names}) == 10


def test_making_shards_twice_overwrites_nothing(recipe: Recipe, shards: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in shards.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        make_shards(recipe, shards, samples=5)
    assert before == {p: p.stat().st_mtime_ns for p in shards.iterdir()}
    first = make_shards(recipe, tmp_path, samples=5, kind="text", split="val")
    assert [p.name for p in first] == ["val-text-00000.tar"]
    again = make_shards(recipe, tmp_path / "b", samples=5, kind="text", split="val")
    assert first[0].read_bytes() == again[0].read_bytes()
    with pytest.raises(UserError, match="expected positive numbers"):
        make_shards(recipe, tmp_path / "c", samples=0)


def test_a_run_can_train_on_the_shards(recipe: Recipe, shards: Path) -> None:
    mapping = {
        "model": {"image_size": 48, "patch": 8, "vocabulary": 2048},
        "data": {
            "sources": [{"type": "shards", "kind": k, "path": str(shards)} for k in ("image", "text", "pair")],
            "batch": {"image": 2, "text": 2, "pair": 4},
            "text_tokenizer": {"samples": 20},
        },
    }
    plan = from_mapping(mapping)
    tokenizer = build_text_tokenizer(plan)
    step = StepData(plan, tokenizer, factors=True)[3]
    assert {kind: len(batch) for kind, batch in step.batches.items()} == {"image": 2, "text": 2, "pair": 4}
    assert step.batches["pair"].token_factors[0]
    assert held_out_splits(plan) == ["val"]
    assert len(held_out(plan, tokenizer, "val", "pair", 0, 4)) == 1  # of 25, one is held out


def test_check_passes_good_shards(shards: Path) -> None:
    report = check_data(str(shards))
    assert (report["type"], report["files"], report["samples"], report["good"], report["errors"]) == (
        "shards",
        3,
        25,
        25,
        0,
    )
    assert report["words"]["min"] > 0
    json.dumps(report)
    console = Console(record=True, width=100, file=io.StringIO())
    print_check(report, console)
    assert "No errors." in console.export_text()


def test_check_reports_every_fault_with_file_and_key(shards: Path, tmp_path: Path) -> None:
    with tarfile.open(shards / "train-pair-00000.tar") as old, tarfile.open(tmp_path / "x.tar", "w") as new:
        for member in [*old.getmembers(), *old.getmembers()[:3]]:  # the first sample twice
            file = old.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name == "000000003.png":
                data = data[:200]
            elif member.name == "000000005.txt":
                data = b"\xff\xff"
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    raw = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "y.tar").write_bytes(raw[:4000])
    report = check_data(str(tmp_path / "*.tar"))
    keys = {e["key"]: e["reason"] for e in report["first_errors"]}
    assert set(keys) == {"x.tar/000000003", "x.tar/000000005", "y.tar"}
    assert report["first_duplicates"] == ["x.tar/000000000"]
    assert report["errors"] == 4
    assert report["reasons"] == {"broken image": 1, "text is not UTF-8": 1, "truncated or damaged shard": 1}
    assert report["good"] + sum(report["reasons"].values()) == report["samples"]
    console = Console(record=True, width=100, file=io.StringIO())
    print_check(report, console)
    text = console.export_text()
    assert "x.tar/000000003: broken image" in text
    assert "x.tar/000000000: key occurs again" in text


def test_check_tells_types_apart(tmp_path: Path, shards: Path) -> None:
    assert tell_type("x/{0..3}.tar") == "shards"
    assert tell_type("x/*.parquet") == "parquet"
    assert tell_type(str(shards)) == "shards"
    assert tell_type(str(tmp_path)) == "folder"
    with pytest.raises(UserError, match=r"neither .tar, .parquet nor .arrow"):
        tell_type(str(tmp_path / "none"))
    with pytest.raises(UserError, match="expected image, text or pair"):
        check_data(str(shards), kind="video")


@pytest.mark.parametrize(("kind", "split"), [("pair", "train"), ("image", "val"), ("text", "train")])
def test_the_contact_sheet_is_drawn_as_the_model_sees_it(recipe: Recipe, tmp_path: Path, kind: str, split: str) -> None:
    tokenizer = build_text_tokenizer(recipe)
    batch = show.show_data(recipe, tmp_path / "sheet.png", kind, split, 5, tokenizer)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 800
        assert len(np.unique(np.array(sheet.convert("L")))) > 20
    if kind == "pair":
        first = StepData(recipe, tokenizer)[0].batches["pair"]
        assert batch.keys[:4] == first.keys
        assert batch.patch_mask_BP[:4].equal(first.patch_mask_BP)  # type: ignore[index, arg-type]
    if kind == "image":
        assert batch.keys == held_out(recipe, tokenizer, "val", "image", 0, 5).keys
    if kind != "image":
        assert batch.target_BT is not None
        for b in range(len(batch)):
            assert show.mark_hidden(batch, b, tokenizer).count("[") == int((batch.target_BT[b] >= 0).sum())


def test_hidden_patches_are_grey() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    mask = np.array([False, True, False, False])
    shown = show.hide_patches(image, mask)
    assert (shown[:4, 4:] == show.GREY).all()
    assert (shown[4:] == 0).all()
    assert (shown[:4, :4] == 0).all()


def test_unknown_kinds_and_splits_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected image, text or pair"):
        show.show_data(recipe, tmp_path / "x.png", kind="video")
    with pytest.raises(UserError, match="no source has pair samples for the split 'nowhere'"):
        make_shards(recipe, tmp_path, split="nowhere", samples=1)
    assert "handwriting" in held_out_splits(small_recipe())


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (example,) = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/data.md", "exec"), {})
