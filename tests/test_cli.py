"""The command as a user types it: what it prints, what it leaves, how it fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlmoe
from tests.golden.record import OVERRIDES
from vlmoe.cli import app, main
from vlmoe.config import UserError

TINY = [
    *OVERRIDES, "data.visual_tokenizer.steps=2", "train.steps=4", "eval.samples=16", "eval.batch=8", "eval.pictures=2",
]  # fmt: skip


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, invoke("pretrain", "demo", f"run.dir={folder}", *TINY)


def test_pretrain_leaves_a_model_scores_and_pictures(run: tuple[Path, str]) -> None:
    folder, output = run
    for name in ("recipe.yaml", "metrics.jsonl", "eval.json", "completions.png", "curves.png", "routing.png", "model"):
        assert (folder / name).exists(), name
    for words in ("with the image", "largest/mean", "another's image", "completions.png", str(folder)):
        assert words in output.replace("\n", " ") or words in output.replace("\n", ""), words
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert all(isinstance(s["loss"], float) for s in steps)


def test_scores_cover_every_held_out_split(run: tuple[Path, str]) -> None:
    report = json.loads((run[0] / "eval.json").read_text())
    assert list(report["splits"]) == ["val", "drawing"]
    for scores in report["splits"].values():
        assert {"seen", "blind", "swapped", "gap", "by_word_class"} <= set(scores["text"])
        assert 0 <= scores["text"]["seen"]["accuracy"] <= 1
        assert 0 <= scores["image"]["accuracy"] <= 1
        assert {"seen", "blind", "swapped", "names", "chance"} == set(scores["names"])
        assert scores["names"]["seen"]["predictions"] == 16
        assert scores["restored"]["plain"] > 0
    assert set(report["splits"]["val"]["text"]["by_word_class"]) == {"name"}
    assert "Names from sight" in run[1]
    assert len(report["completions"]) == 2
    assert set(report["experts"]) == {"1/vision", "1/text", "3/vision"}  # a pair's top blocks are dense


def test_pretraining_again_says_that_it_is_done(run: tuple[Path, str]) -> None:
    before = (run[0] / "metrics.jsonl").read_bytes()
    assert "already" in invoke("pretrain", "demo", f"run.dir={run[0]}", *TINY)
    assert (run[0] / "metrics.jsonl").read_bytes() == before


def test_eval_gives_the_scores_of_the_run_as_json(run: tuple[Path, str]) -> None:
    written = json.loads((run[0] / "eval.json").read_text())
    assert json.loads(invoke("eval", str(run[0]), "--json")) == written


def test_load_gives_a_model_to_use(run: tuple[Path, str]) -> None:
    trained = vlmoe.load(run[0])
    assert not trained.model.training
    assert trained.recipe.model.width == 32
    ids, _ = trained.text_tokenizer.encode("play circle")
    assert trained.text_tokenizer.decode(ids) == "play circle"


@pytest.mark.parametrize(("recipe", "total", "per_token"), [("base_32e", 1.9e9, 180e6), ("base_dense", 180e6, 180e6)])
def test_info_as_json(recipe: str, total: float, per_token: float) -> None:
    s = json.loads(invoke("info", recipe, "--json"))
    assert s["params_total"] == pytest.approx(total, rel=0.03)
    assert s["params_per_token"] == pytest.approx(per_token, rel=0.03)
    assert s["memory_bytes"] == 16 * (s["params_total"] + s["params_heads"])
    assert s["flops_per_token"] > 2 * 80e6


def test_info_for_people() -> None:
    output = invoke("info", "base_32e")
    assert "1.94G in all, 180M per token" in output


def test_data_make_check_show(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    sizes = ["data.text_tokenizer.samples=500"]
    invoke("data", "make", "demo", str(shards), *sizes, "--samples", "30", "--per-shard", "20")
    assert len(list(shards.glob("*.tar"))) == 2
    report = json.loads(invoke("data", "check", str(shards / "*.tar"), "--json"))
    assert not report["errors"]
    invoke("data", "show", "demo", *sizes, "--out", str(tmp_path / "sheet.png"), "--samples", "4")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_data_check_fails_on_broken_data(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "a.txt").write_text("a caption")
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 1
    assert "a.png" in result.output


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["vlmoe", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("vlmoe: error: ")
    assert "Traceback" not in error
    return error


def test_mistakes_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean 'demo'" in error_of(monkeypatch, capsys, "info", "demos")
    assert "did you mean 'train.steps'" in error_of(monkeypatch, capsys, "pretrain", "demo", "train.step=3")
    assert "wanted a whole number" in error_of(monkeypatch, capsys, "pretrain", "demo", "train.steps=x")
    assert "is the run finished" in error_of(monkeypatch, capsys, "eval", str(tmp_path))
    assert str(tmp_path / "none") in error_of(monkeypatch, capsys, "data", "check", str(tmp_path / "none"))
    for words in ((), ("vqa",), ("--step", "3")):
        assert "none: no such folder" in error_of(monkeypatch, capsys, "eval", str(tmp_path / "none"), *words)
    assert "none: no such folder" in error_of(monkeypatch, capsys, "seal", str(tmp_path / "none"))
    assert "no overrides: --samples 64" in error_of(monkeypatch, capsys, "eval", str(tmp_path), "eval.samples=64")
    several = ("eval", str(tmp_path), "vqa", "eval.batch=8", "train.steps=1")
    assert "no overrides: --batch 8" in error_of(monkeypatch, capsys, *several)
    assert "takes one run and one task" in error_of(monkeypatch, capsys, "eval", str(tmp_path), "vqa", "nlvr2")
    assert "no overrides: the recipe is" in error_of(monkeypatch, capsys, "eval", str(tmp_path), "train.steps=64")


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "no/run"],
        ["report", "no/run"],
        ["report", ".", "--compare", "no/run"],
        ["predict", "no/run", "vqa"],
        ["seal", "no/run"],
        ["finetune", "vqa", "world", "--init", "no/run"],
        ["finetune", "vqa", "no/run"],
        ["plan", "--flops", "1e12", "--memory", "1GB", "--study", "no/run"],
        ["data", "check", "no/run"],
        ["data", "show", "no/run"],
        ["pretrain", "no/run"],
        ["pretrain", "demo", "init=no/run", "run.dir=here"],
        ["pretrain", "demo", "branch_from=no/run", "run.dir=here"],
        ["pretrain", "demo", "data.visual_tokenizer.path=no/run", "run.dir=here"],
        ["study", "no/run"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_missing_is_called_missing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of(monkeypatch, capsys, *words)
    assert "no/run" in error and ("no such folder" in error or "no such file or folder" in error)


def test_a_folder_goes_before_a_packaged_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "icons").mkdir()
    (tmp_path / "icons" / "a.png").write_bytes(b"no image")
    result = CliRunner().invoke(app, ["data", "check", "icons", "--kind", "image"])
    assert result.exit_code == 1 and "icons (folder, image)" in result.output


def test_a_recipe_that_does_not_match_the_run_is_refused(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.name for p in (run[0] / "checkpoints").iterdir())
    error = error_of(monkeypatch, capsys, "pretrain", "demo", f"run.dir={run[0]}", *TINY, "train.lr=0.5")
    assert "train.lr" in error
    assert sorted(p.name for p in (run[0] / "checkpoints").iterdir()) == before


def test_broken_model_files_are_named(run: tuple[Path, str], tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(run[0] / "model", copy)
    (copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        vlmoe.load(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        vlmoe.load(copy)


def test_help_is_there_for_every_command() -> None:
    for words in ("", "pretrain", "eval", "info", "data", "data make", "data check", "data show", "new", "recipe keys"):
        assert "Usage:" in invoke(*words.split(), "--help")


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, vlmoe, vlmoe.cli; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
