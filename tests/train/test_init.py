"""`vlmoe pretrain RECIPE init=RUN`: a dense run's weights in a sparse model, as a user types it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlmoe
from tests.golden.record import OVERRIDES
from tests.test_cli import invoke
from vlmoe.config import UserError, load_recipe
from vlmoe.tasks.export import seal
from vlmoe.train.pretrain import why_dense
from vlmoe.train.runlog import read_lines

pytestmark = pytest.mark.usefixtures("no_plots")
SHORT = ["data.visual_tokenizer.steps=2", "train.steps=2", "eval.samples=16", "eval.pictures=2"]
DENSE = ["model.vision.sparse=none", "model.text.sparse=none"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    invoke("pretrain", "demo", f"run.dir={folder}", *OVERRIDES, *SHORT, *DENSE)
    return folder


def test_a_sparse_run_starts_from_a_dense_one_with_its_tokenizers(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    words = ["pretrain", "demo", f"run.dir={folder}", f"init={dense}", *OVERRIDES, *SHORT, "seed=1", "train.lr=1e-9"]
    said = " ".join(invoke(*words).split())
    assert "layers filled from dense ones" in said
    assert "visual tokenizer: " not in said  # none is trained
    (event,) = (e for e in read_lines(folder / "events.jsonl") if e["event"] == "upcycled")
    assert event["init"] == str(dense) and event["output"] < 1e-6  # two shared halves hold the whole layer
    assert len(event["layers"]) == 4 and max(event["layers"].values()) < 1e-6
    for name in ("tokenizer.json", "visual.safetensors"):
        assert (folder / "tokenizers" / name).read_bytes() == (dense / "tokenizers" / name).read_bytes()
    got, wanted = (load_file(f / "model" / "model.safetensors") for f in (folder, dense))
    name = "backbone.text.tokens.weight"
    torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-6)
    assert vlmoe.load(folder).recipe.init == str(dense)


ONE = [f"model.{side}.{change}" for side in ("vision", "text")
       for change in ("granularity=1", "shared_experts=0", "router.k=1", "router.renormalize=false")]  # fmt: skip


def test_experts_that_are_not_the_dense_layer_are_refused_unless_allowed(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    words = ["pretrain", "demo", f"run.dir={folder}", f"init={dense}", *OVERRIDES, *ONE, *SHORT]
    with pytest.raises(UserError, match=r"layer: the sparse layer's output would differ .* init_allow_inexact=true"):
        invoke(*words)
    assert not folder.exists()
    said = " ".join(invoke(*words, "init_allow_inexact=true").split())
    (event,) = (e for e in read_lines(folder / "events.jsonl") if e["event"] == "upcycled")
    assert 1e-4 < event["output"] < 1 and f"output {event['output']:.2g} from the dense model's" in said


def test_a_run_that_goes_on_needs_the_earlier_one_no_more(dense: Path, tmp_path: Path) -> None:
    folder, init = tmp_path / "sparse", tmp_path / "dense"
    shutil.copytree(dense, init)
    words = ["pretrain", "demo", f"run.dir={folder}", f"init={init}", *OVERRIDES, *SHORT]
    invoke(*words)
    shutil.rmtree(init)
    assert "nothing left to train" in invoke(*words)


def test_other_tokenizers_are_refused(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    shutil.copytree(dense / "tokenizers", folder / "tokenizers")
    file = folder / "tokenizers" / "visual.safetensors"
    tensors = load_file(file)
    tensors["codebook_VZ"] = tensors["codebook_VZ"] + 1
    save_file(tensors, file)
    seal(folder)
    with pytest.raises(UserError, match="visual tokenizer there is not this run's"):
        invoke("pretrain", "demo", f"run.dir={folder}", f"init={dense}", *OVERRIDES, *SHORT)


def test_another_shape_is_refused_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    with pytest.raises(UserError, match=r"layer: width: experts have 48, the dense layer \d+"):
        invoke("pretrain", "demo", f"run.dir={folder}", f"init={dense}", *OVERRIDES, *SHORT, "model.width=48")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vision.sparse=none", "model.text.sparse=none"], "This model is dense: it has no sparse layer"),
        (["model.depth=1"], "This model is dense"),
        (["model.vl_ffn=4", "data.sources=[{kind: pair}]"], "No token of this run meets an expert"),
        (["model.vision.sparse=none", "data.sources=[{kind: image}]"], "No token of this run meets an expert"),
        (["model.vl_ffn=4"], ""),
        (["model.vision.sparse=none"], ""),
    ],
)
def test_a_run_without_experts_says_so(overrides: list[str], words: str) -> None:
    found = why_dense(load_recipe("demo", overrides))
    assert found.startswith(words) and bool(found) == bool(words)
