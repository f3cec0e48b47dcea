"""Every mix of images, texts and pairs goes the whole way: pretrain, load, eval, report, finetune, init."""

import itertools
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlmoe
from tests.test_cli import invoke
from vlmoe.config import UserError
from vlmoe.data.text_tokenizer import train_wordpiece
from vlmoe.tasks.export import Pretrained

pytestmark = pytest.mark.usefixtures("no_plots")
KINDS = ("image", "text", "pair")
MIXES = [mix for n in (1, 2, 3) for mix in itertools.combinations(KINDS, n)]
SPARSE = "{sparse: last, experts: 2}"
SMALL = [
    f"model={{width: 16, depth: 2, heads: 2, mlp_ratio: 1, patch: 24, vocabulary: 256, codes: 8, max_text: 24, "
    f"vl_ffn: 0, vision: {SPARSE}, text: {SPARSE}}}",
    "data.visual_tokenizer={steps: 2, batch: 4, width: 4, dim: 4}", "data.text_tokenizer.samples=100",
    "data.workers=0", "train={steps: 2, warmup: 1}", "eval={samples: 4, batch: 4, pictures: 1}",
]  # fmt: skip
TUNE = ["data.workers=0", "train={steps: 1, warmup: 1}", "data.batch=4", "eval={samples: 4, validate: 4}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions, and texts, in a place whose name has spaces and letters of other scripts."""
    folder = tmp_path_factory.mktemp("some d\u00e4ta \u4e16")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red square and number {i}")
    (folder / "texts.txt").write_text("a red square\na blue square\na green square\n")
    return folder


def pretrain(folder: Path, data: Path, mix: tuple[str, ...], *more: str) -> str:
    paths = {"image": data, "text": data / "texts.txt", "pair": data}
    sources = [{"kind": kind, "type": "folder", "path": str(paths[kind])} for kind in mix]
    given = {"data": {"batch": {kind: 4 * (kind in mix) for kind in KINDS}, "sources": sources}}
    folder.with_suffix(".yaml").write_text(json.dumps(given))
    return invoke("pretrain", str(folder.with_suffix(".yaml")), f"run.dir={folder}", *SMALL, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[tuple[str, ...], Path]:
    top = tmp_path_factory.mktemp("mixes")
    return {mix: top / "-".join(mix) for mix in MIXES if pretrain(top / "-".join(mix), data, mix)}


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_a_mix_goes_the_whole_way(runs: dict[tuple[str, ...], Path], mix: tuple[str, ...]) -> None:
    run, images = runs[mix], mix != ("text",)
    trained = vlmoe.load(run)
    assert isinstance(trained, Pretrained)
    assert (trained.visual_tokenizer is not None) == (run / "model" / "visual.json").exists() == images
    assert trained.text_tokenizer.knows_words == (mix != ("image",))
    wanted = {"pair": {"text", "image", "restored", "loss"}, "image": {"image_alone"}, "text": {"text_alone"}}
    scores = json.loads((run / "eval.json").read_text())["splits"]["val"]
    assert set(scores) == set().union(*(wanted[kind] for kind in mix))
    assert (run / "completions.png").exists() == ("pair" in mix)
    found = json.loads(invoke("report", str(run), "--samples", "2", "--json"))
    seen = {site for site, use in found["use"].items() if use["tokens"]}
    assert seen == {
        f"1/{m}" for m in ("vision", "text") if (m == "text" and mix != ("image",)) or (m == "vision" and images)
    }
    assert (run / "report.html").exists()


def test_pairs_may_hide_no_patch(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "words-alone"
    masking = "data.masking={pair_text: 1, pair_patches: 0}"
    said = pretrain(run, data, ("pair",), masking)
    assert "visual tokenizer" not in said and "Codes of hidden patches" not in said
    trained = vlmoe.load(run)
    assert isinstance(trained, Pretrained) and trained.visual_tokenizer is None
    assert not (run / "model" / "visual.json").exists()
    scores = json.loads((run / "eval.json").read_text())["splits"]["val"]
    assert set(scores) == {"text", "loss"} and scores["loss"]["sum"] == scores["loss"]["mlm"]
    assert "mim" not in (run / "metrics.jsonl").read_text()
    assert (run / "completions.png").exists()
    invoke("report", str(run), "--samples", "2")
    both = pretrain(tmp_path / "images-too", data, ("image", "pair"), masking)  # codes of images alone are predicted
    assert "Codes of hidden patches" in both


def finetune(run: Path, task: str, out: Path, *more: str) -> str:
    return invoke("finetune", task, "world", "--init", str(run), f"run.dir={out}", *TUNE, *more)


def test_finetuning_from_texts_alone(runs: dict[tuple[str, ...], Path], tmp_path: Path) -> None:
    run = runs["text",]
    assert "random weights" not in finetune(run, "nli", tmp_path / "nli")
    said = finetune(run, "vqa", tmp_path / "vqa")
    assert "has seen no images: what reads them starts from random weights" in " ".join(said.split())
    with pytest.raises(UserError, match="has seen no images, and classify reads nothing else"):
        finetune(run, "classify", tmp_path / "classify")
    assert not (tmp_path / "classify").exists()
    finetune(run, "classify", tmp_path / "classify", "train.scratch=true")
    assert json.loads(invoke("predict", str(tmp_path / "nli"), "nli", "--text", "a", "--text", "b", "--json"))[
        "answers"
    ]


def test_finetuning_from_images_alone(runs: dict[tuple[str, ...], Path], tmp_path: Path) -> None:
    run = runs["image",]
    finetune(run, "classify", tmp_path / "classify")
    for task in ("vqa", "nlvr2", "retrieval", "nli", "caption"):
        with pytest.raises(UserError, match=f"has read no texts, so its tokenizer knows no words, and {task} needs"):
            finetune(run, task, tmp_path / task)
        assert not (tmp_path / task).exists()


def test_images_alone_with_a_given_text_tokenizer(data: Path, tmp_path: Path) -> None:
    train_wordpiece(["a red square is shown"] * 4, 200).save(tmp_path)
    given = ["data.text_tokenizer.type=hf", f"data.text_tokenizer.path={tmp_path / 'tokenizer.json'}"]
    pretrain(tmp_path / "run", data, ("image",), *given)
    assert vlmoe.load(tmp_path / "run").text_tokenizer.knows_words
    said = finetune(tmp_path / "run", "vqa", tmp_path / "vqa")
    assert "has seen no texts" in " ".join(said.split())
    with pytest.raises(UserError, match="has seen no texts, and nli reads nothing else"):
        finetune(tmp_path / "run", "nli", tmp_path / "nli")


@pytest.mark.parametrize(("first", "then"), [("text", "pair"), ("image", "pair"), ("pair", "text"), ("pair", "image")])
def test_one_stage_after_another(
    runs: dict[tuple[str, ...], Path], data: Path, first: str, then: str, tmp_path: Path
) -> None:
    """What the first has learned is taken, tokenizers included; what it has not seen begins anew."""
    pretrain(tmp_path / "run", data, (then,), f"init={runs[first,]}", "train.lr=1e-12", "train.min_lr=0")
    before, after = vlmoe.load(runs[first,]), vlmoe.load(tmp_path / "run")
    assert isinstance(before, Pretrained) and isinstance(after, Pretrained)
    assert (after.visual_tokenizer is not None) == (then != "text")
    assert after.text_tokenizer.knows_words
    weights, kept = before.model.state_dict(), after.model.state_dict()
    assert all(torch.allclose(kept[name], weights[name], rtol=0, atol=1e-6) for name in weights)
    if before.recipe.reads_texts:
        file = Path("tokenizers") / "tokenizer.json"
        assert (runs[first,] / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_the_world_as_source_of_texts_alone(tmp_path: Path) -> None:
    recipe = tmp_path / "texts.yaml"
    recipe.write_text("data: {sources: [{kind: text}], batch: {image: 0, pair: 0, text: 4}}")
    assert "Hidden text of texts alone" in invoke("pretrain", str(recipe), f"run.dir={tmp_path / 'run'}", *SMALL)
    assert "text_alone" in invoke("eval", str(tmp_path / "run"), "--json", "--samples", "2")


def test_a_batch_of_nothing_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.batch.*at least one kind above 0"):
        pretrain(tmp_path / "run", data, ())


def test_all_files_of_a_run_have_the_mode_that_the_umask_gives(data: Path, tmp_path: Path) -> None:
    umask = 0o027  # neither what temporary files have nor what is usual
    before = os.umask(umask)
    try:
        pretrain(tmp_path / "run", data, ("image", "pair"))
        invoke("report", str(tmp_path / "run"), "--samples", "2")
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} >= {".safetensors", ".json", ".jsonl", ".html", ".png", ".yaml"}
    assert {str(p): oct(stat.S_IMODE(p.stat().st_mode)) for p in files} == {str(p): oct(0o666 & ~umask) for p in files}


def test_the_home_folder_on_the_command_line(
    runs: dict[tuple[str, ...], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(runs["pair",])
    (tmp_path / "recipe.yaml").write_text("data: {workers: 0}")
    monkeypatch.chdir(tmp_path)
    assert "splits" in invoke("eval", "~/run", "--json", "--samples", "2")
    assert invoke("report", "~/run", "--out=~/page.html", "--samples", "2").strip() == str(tmp_path / "page.html")
    assert vlmoe.load("~/run").path == tmp_path / "run" / "model"
    invoke("data", "make", "~/recipe.yaml", "~/shards", "--samples", "2", "--kind", "text")
    checked = json.loads(invoke("data", "check", "~/shards", "--kind", "text", "--json"))
    assert checked["path"] == str(tmp_path / "shards")
    invoke("data", "show", "~/recipe.yaml", "--out=~/x.png", "--samples", "2", "--kind", "text", *SMALL[:1])
    assert str(tmp_path) in invoke("seal", "~/run")
    finetune(Path("~/run"), "nli", Path("~/tuned"))
    assert (tmp_path / "tuned" / "model").is_dir() and not (tmp_path / "~").exists()
