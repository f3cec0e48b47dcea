"""Fine-tuning, evaluation and prediction as a user types them, on the world and on genuine files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vlmoe
from tests.data.downstream.test_files import karpathy, nlvr2, paint, vqa, write_jsonl
from tests.golden.record import OVERRIDES
from tests.test_cli import invoke
from vlmoe.config import TASKS, RecipeError, UserError, load_finetune, load_recipe, recipe_names
from vlmoe.data.downstream.loader import open_split
from vlmoe.evaluate.downstream import evaluate_task
from vlmoe.tasks.export import Finetuned, load_finetuned, load_pretrained
from vlmoe.tasks.init import interpolate_positions, start_from
from vlmoe.tasks.registry import build_task
from vlmoe.train.finetune import with_steps
from vlmoe.train.kept import load_step
from vlmoe.train.plots import CURVES, plot_curves

pytestmark = pytest.mark.usefixtures("no_plots")
TINY = [
    "train.steps=4", "train.warmup=1", "train.device=cpu", "train.validate_every=2", "data.batch=8", "data.workers=0",
    "eval.samples=5", "eval.validate=5", "eval.batch=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    short = ["data.visual_tokenizer.steps=2", "train.steps=2", "eval.samples=16", "eval.pictures=2"]
    invoke("pretrain", "characters", f"run.dir={folder}", *OVERRIDES, *short)
    return folder


def finetune(task: str, pretrained: Path, folder: Path, *more: str) -> str:
    short = ["caption.max_length=4"] if task == "caption" else []
    return invoke("finetune", task, "world", "--init", str(pretrained), f"run.dir={folder}", *TINY, *short, *more)


@pytest.fixture(scope="module")
def runs(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """A fine-tuned run of every task and what the command printed."""
    root = tmp_path_factory.mktemp("tasks")
    return {task: (root / task, finetune(task, pretrained, root / task)) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_finetune_leaves_a_model_and_scores(runs: dict[str, tuple[Path, str]], task: str) -> None:
    folder, output = runs[task]
    for name in ("recipe.yaml", "metrics.jsonl", "eval.json", "best", "model"):
        assert (folder / name).exists(), name
    assert "best guess" in output.replace("\n", " ")
    report = json.loads((folder / "eval.json").read_text())
    assert report["task"] == task
    first = next(iter(report["splits"].values()))
    assert report["main"] in first["scores"]
    assert first["examples"] == 5
    loaded = vlmoe.load(folder)
    assert isinstance(loaded, Finetuned)
    assert loaded.labels == loaded.model.labels
    best, model = load_file(folder / "best" / "model.safetensors"), loaded.model.state_dict()
    assert all(torch.equal(best[name], model[name]) for name in best)


def test_the_curves_of_a_task_are_drawn(runs: dict[str, tuple[Path, str]]) -> None:
    folder, _ = runs["vqa"]
    assert plot_curves(folder) == folder / CURVES
    assert (folder / CURVES).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", ["vqa", "retrieval", "caption"])
def test_eval_gives_the_same_numbers_for_any_batch_size_and_worker_count(
    runs: dict[str, tuple[Path, str]], task: str
) -> None:
    words = ["eval", str(runs[task][0]), task, "--json"]
    wanted = json.loads(invoke(*words))
    for batch, workers in (("1", "0"), ("3", "2")):
        assert json.loads(invoke(*words, "--batch", batch, "--workers", workers)) == wanted


def test_eval_refuses_embeddings_that_are_no_numbers(
    runs: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*given: Any) -> Any:
        trained = load_finetuned(*given)
        torch.nn.init.constant_(trained.model.get_parameter("image_head.weight"), float("nan"))
        return trained

    folder = runs["retrieval"][0]
    before = (folder / "eval.json").read_bytes()
    monkeypatch.setattr("vlmoe.evaluate.downstream.load_finetuned", damaged)
    with pytest.raises(UserError, match=r"^split val: 5 of 5 answers are no numbers"):
        evaluate_task(folder)
    assert (folder / "eval.json").read_bytes() == before


def test_eval_of_one_split(runs: dict[str, tuple[Path, str]]) -> None:
    report = json.loads(invoke("eval", str(runs["nli"][0]), "--split", "mismatched", "--samples", "3", "--json"))
    assert list(report["splits"]) == ["mismatched"]
    assert report["splits"]["mismatched"]["examples"] == 3
    with pytest.raises(UserError, match="no split 'test' for nli: there are val, mismatched"):
        invoke("eval", str(runs["nli"][0]), "--split", "test")


def test_a_killed_run_goes_on_to_the_same_weights(pretrained: Path, tmp_path: Path) -> None:
    """Stopped by early stopping's own end of patience or not, the second launch repeats what the first would do."""
    finetune("nli", pretrained, tmp_path / "whole", "train.checkpoint_every=2")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for gone in ("checkpoints/step-4", "model"):
        shutil.rmtree(tmp_path / "cut" / gone)
    output = finetune("nli", pretrained, tmp_path / "cut", "train.checkpoint_every=2")
    assert "going on from step 2" in output
    a, b = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_recipe_in_the_same_folder_is_refused(runs: dict[str, tuple[Path, str]], pretrained: Path) -> None:
    with pytest.raises(UserError, match=r"train\.lr"):
        finetune("vqa", pretrained, runs["vqa"][0], "train.lr=0.5")


# ------------------------------------------------------------------------------------------------------------- predict
@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        paint(folder / f"{i}.png", (80 * i, 255 - 80 * i, 0))
    return folder


def inputs(task: str, pictures: Path) -> list[str]:
    image = ["--image", str(pictures / "0.png")]
    return {
        "vqa": [*image, "--text", "what colour is it ?"],
        "nlvr2": [*image, "--image", str(pictures / "1.png"), "--text", "both images show a digit"],
        "classify": image,
        "nli": ["--text", "a red digit", "--text", "the digit is red"],
        "caption": image,
        "retrieval": ["--image", str(pictures), "--text", "a red digit"],
    }[task]


@pytest.mark.parametrize("task", TASKS)
def test_predict(runs: dict[str, tuple[Path, str]], pictures: Path, task: str) -> None:
    words = ["predict", str(runs[task][0]), task, *inputs(task, pictures)]
    result = json.loads(invoke(*words, "--json"))
    assert result["task"] == task
    assert result["answers"]
    probabilities = [a["probability"] for a in result["answers"]]
    assert all(0 <= p <= 1 for p in probabilities)
    if task in {"nli", "nlvr2", "retrieval"}:
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
    assert result["experts"]
    assert all(sum(shares) == pytest.approx(1) for shares in result["experts"].values())
    assert str(result["answers"][0]["answer"])[:20] in invoke(*words).replace("\n", " ")


def test_a_search_keeps_its_embeddings_until_an_image_changes(
    runs: dict[str, tuple[Path, str]], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmoe.evaluate import predict as module

    folder, calls = tmp_path / "images", []
    shutil.copytree(pictures, folder)
    read = module.read_image

    def counted(path: Path, trained: Finetuned) -> Any:
        calls.append(path)
        return read(path, trained)

    monkeypatch.setattr(module, "read_image", counted)
    words = ["predict", str(runs["retrieval"][0]), "retrieval", "--image", str(folder), "--text", "red", "--json"]
    first, again = invoke(*words), invoke(*words)
    assert json.loads(first)["answers"] == json.loads(again)["answers"]
    assert len(calls) == 3
    paint(folder / "1.png", (9, 9, 9))
    assert json.loads(invoke(*words))["answers"] != json.loads(first)["answers"]
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("vqa", [], "vqa takes one --image and the question as --text; got 0 --image and 0 --text"),
        ("nlvr2", ["--image", "0.png", "--text", "x"], "nlvr2 takes two --image"),
        ("nli", ["--text", "x"], "nli takes two --text, premise and hypothesis"),
        ("classify", ["--image", "none.png"], "none.png: cannot be read"),
        ("classify", ["--image", "broken.png"], "broken.png: not an image"),
        ("retrieval", ["--text", "x"], "retrieval takes a folder of images"),
    ],
)
def test_predicting_from_the_wrong_things(
    runs: dict[str, tuple[Path, str]], pictures: Path, monkeypatch: pytest.MonkeyPatch, task: str, given: list[str],
    words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(pictures)
    Path("broken.png").write_text("no image")
    try:
        with pytest.raises(UserError) as error:
            invoke("predict", str(runs[task][0]), task, *given)
    finally:
        Path("broken.png").unlink()
    assert words in str(error.value)


# ------------------------------------------------------------------------------------------------------ genuine files
def file_keys(task: str, folder: Path) -> list[str]:
    if task == "vqa":
        files: dict[str, Any] = vqa(folder)
    elif task == "nlvr2":
        files = nlvr2(folder)
    elif task == "classify":
        for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
            paint(folder / name)
        files = {"file": folder}
    elif task == "nli":
        write_jsonl(folder / "dev.jsonl")
        files = {"file": folder / "dev.jsonl"}
    else:
        files = karpathy(folder)
    train = [f"data.train.{key}={value}" for key, value in files.items()]
    listed = ", ".join(f"{key}: {value}" for key, value in files.items())
    return ["data.type=files", *train, f"data.eval=[{{name: dev, {listed}}}]"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_on_genuine_files(task: str, pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    keys = [*file_keys(task, tmp_path / "data"), "train.epochs=1"]
    finetune(task, pretrained, tmp_path / "run", *keys, "data.batch=2", "data.max_bad_share=0.5")
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert list(report["splits"]) == ["dev"]
    assert report["splits"]["dev"]["examples"] == 3


def test_an_image_that_is_missing_in_evaluation_is_left_out_and_listed(pretrained: Path, tmp_path: Path) -> None:
    keys = file_keys("caption", tmp_path)
    finetune("caption", pretrained, tmp_path / "run", *keys)
    (tmp_path / "val2014" / "1.jpg").unlink()
    report = json.loads(invoke("eval", str(tmp_path / "run"), "--json"))["splits"]["dev"]
    assert report["examples"] == 2
    assert [s["key"] for s in report["skipped"]] == [str(tmp_path / "val2014" / "1.jpg")]
    assert "1 examples could not be read" in invoke("eval", str(tmp_path / "run"))


def own_lines(folder: Path, task: str) -> Path:
    """Two groups, of which one is held out of training."""
    lines = []
    for i, (group, split) in enumerate([("seen", "train")] * 4 + [("seen", "val")] * 2 + [("new", "val")] * 2):
        paint(folder / f"{i}.png", (40 * (i % 4), 0, 200))
        about = {"image": f"{i}.png", "group": group, "split": split, "id": f"no. {i}"}
        said = (
            {"question": "How blue?", "answer": ["little", "much"][i % 2]} if task == "vqa" else {"caption": f"c {i}"}
        )
        lines.append(json.dumps(about | said))
    (folder / "own.jsonl").write_text("\n".join(lines))
    return folder / "own.jsonl"


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_groups_of_ones_own_files_are_scored_apart(task: str, pretrained: Path, tmp_path: Path) -> None:
    file = own_lines(tmp_path, task)
    keys = [f"data.train.file={file}", "data.train.part=train", f"data.eval=[{{name: mine, file: {file}, part: val}}]"]
    output = finetune(task, pretrained, tmp_path / "run", "data.type=files", *keys, "data.batch=4")
    assert "mine, by group" in output
    assert "in training" in output
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    groups = report["splits"]["mine"]["by"]["group"]
    assert {name: found["training_examples"] for name, found in groups.items()} == {"new": 0, "seen": 4}
    assert all(found["scores"][report["main"]]["n"] == 2 for found in groups.values())
    file.rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(UserError, match=r"own\.jsonl: cannot be read"):
        evaluate_task(tmp_path / "run")


def test_a_split_that_is_not_there_is_refused_before_the_training(pretrained: Path, tmp_path: Path) -> None:
    file = own_lines(tmp_path, "vqa")
    mine = f"{{name: mine, file: {file}, part: val}}"
    for other in ("file: nowhere.jsonl", f"file: {file}, images: nowhere"):
        keys = [f"data.train.file={file}", "data.train.part=train", f"data.eval=[{mine}, {{name: other, {other}}}]"]
        with pytest.raises(UserError, match=r"^nowhere(\.jsonl)?: no such file or folder"):
            finetune("vqa", pretrained, tmp_path / "run", "data.type=files", *keys)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", recipe_names("finetune"))
def test_packaged_recipes_have_settings_for_every_task(name: str, task: str, pretrained: Path) -> None:
    files = ["data.train.file=x", "data.eval=[{file: y}]"] if name == "base" else []
    start = load_recipe("base_32e") if name == "base" else load_pretrained(pretrained).recipe
    plan = load_finetune(task, name, start, str(pretrained), files)
    assert plan.task == task
    assert "Command: vlmoe finetune" in plan.about
    assert plan.model.width == start.model.width


def test_published_settings_of_the_base_size() -> None:
    start = load_recipe("base_32e")
    files = ["data.train.file=x", "data.eval=[{file: y}]"]
    of = {task: load_finetune(task, "base", start, "x", files) for task in TASKS}
    vqa_plan = of["vqa"]
    assert (vqa_plan.train.lr, vqa_plan.train.epochs, vqa_plan.model.image_size) == (3e-5, 10, 480)
    assert (vqa_plan.train.head_lr, vqa_plan.data.answers) == (20, 3129)
    sizes = {task: plan.data.batch * plan.train.accumulate for task, plan in of.items()}
    assert {t: sizes[t] for t in ("vqa", "nlvr2", "classify", "caption")} == {
        "vqa": 128, "nlvr2": 256, "classify": 1024, "caption": 256,
    }  # fmt: skip
    for task, lr, epochs in (("nlvr2", 7e-4, 20), ("retrieval", 2e-4, 15), ("classify", 7e-4, 50)):
        assert (of[task].train.lr, of[task].train.epochs, of[task].train.layer_decay) == (lr, epochs, 0.65)


def test_epochs_become_steps(pretrained: Path, tmp_path: Path) -> None:
    start = load_pretrained(pretrained).recipe
    keys = [*file_keys("caption", tmp_path), "data.batch=2", "train.epochs=4", "train.warmup_epochs=1"]
    plan = load_finetune("caption", "world", start, "x", keys)
    plan = with_steps(plan, open_split(plan, "train"))
    assert (plan.train.steps, plan.train.warmup) == (6, 2)
    endless = load_finetune("caption", "world", start, "x", ["train.epochs=4"])
    with pytest.raises(UserError, match="this data is endless"):
        with_steps(endless, open_split(endless, "train"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", "vqqa", "world"], "no task 'vqqa': did you mean 'vqa'"),
        (["finetune", "vqa", "wold"], "no recipe 'wold': did you mean 'world'"),
        (["finetune", "vqa", "world", "train.stesp=3"], "did you mean 'train.steps'"),
        (["finetune", "vqa", "world", "data.type=files"], "data.train.file"),
    ],
)
def test_mistakes_of_finetune(pretrained: Path, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        invoke(*words, "--init", str(pretrained))


def test_a_run_to_start_from_must_be_named_and_finished(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give --init RUN"):
        invoke("finetune", "vqa", "world")
    with pytest.raises(UserError, match=r"no config\.json here"):
        invoke("finetune", "vqa", "world", "--init", str(tmp_path))


def test_a_run_of_another_kind_is_named(runs: dict[str, tuple[Path, str]], pretrained: Path) -> None:
    with pytest.raises(UserError, match="is pre-trained only, and answers no vqa yet: vlmoe finetune vqa"):
        invoke("eval", str(pretrained), "vqa")
    with pytest.raises(UserError, match="is fine-tuned for nli, not for vqa"):
        invoke("predict", str(runs["nli"][0]), "vqa")
    with pytest.raises(UserError, match="is fine-tuned for nli, expected a pre-trained run"):
        load_pretrained(runs["nli"][0])


# ---------------------------------------------------------------------------------------------------------- resolution
def test_positions_are_interpolated_and_the_class_token_kept() -> None:
    position = torch.zeros(1, 1 + 16, 3)
    position[0, 0] = 7
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    position[0, 1:, 0], position[0, 1:, 1] = rows.flatten(), columns.flatten()
    larger = interpolate_positions(position, 1 + 64)
    assert larger.shape == (1, 65, 3)
    assert torch.equal(larger[0, 0], position[0, 0])
    grid = larger[0, 1:].view(8, 8, 3)
    inner = (torch.arange(8.0) - 0.5) / 2  # where the finer grid's centres lie on the coarse one
    assert torch.allclose(grid[2:-2, 4, 0], inner[2:-2], atol=0.09)
    assert torch.allclose(grid[4, 2:-2, 1], inner[2:-2], atol=0.09)
    assert interpolate_positions(position, 17) is position


def test_a_model_starts_from_the_weights_at_another_resolution_and_length(pretrained: Path) -> None:
    start = load_pretrained(pretrained)
    plan = load_finetune("vqa", "world", start.recipe, "x", ["model.image_size=96", "model.max_text=40"])
    assert plan.data.world.image_size == 96
    torch.manual_seed(1)
    task = build_task(plan, ("yes", "no"), start.text_tokenizer)
    drawn = task.backbone.text.position[:, 32:].clone()
    start_from(task, start.model)
    assert task.backbone.image.position.shape[1] == 65
    assert torch.equal(task.backbone.text.position[:, :32], start.model.backbone.text.position)
    assert torch.equal(task.backbone.text.position[:, 32:], drawn)
    assert torch.equal(task.backbone.text.tokens.weight, start.model.backbone.text.tokens.weight)


def test_a_model_of_other_sizes_is_refused(pretrained: Path) -> None:
    start = load_pretrained(pretrained)
    for change in ("model.width=64", "model.vision.experts=2", "model.depth=5"):
        plan = load_finetune("vqa", "world", start.recipe, "x", [change])
        with pytest.raises(UserError, match="cannot start from the pre-trained weights"):
            start_from(build_task(plan, ("yes",), start.text_tokenizer), start.model)


def test_parts_can_be_drawn_anew_at_the_size_they_have(pretrained: Path) -> None:
    start = load_pretrained(pretrained)
    plan = load_finetune("vqa", "world", start.recipe, "x", ["train.fresh=[text.tokens]"])
    task = build_task(plan, ("yes",), start.text_tokenizer)
    start_from(task, start.model, plan.train.fresh)
    ours, theirs = task.backbone.text.tokens.weight, start.model.backbone.text.tokens.weight
    assert (ours - theirs).abs().mean() > 0.5 * theirs.std()
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    assert torch.equal(task.backbone.image.position, start.model.backbone.image.position)
    with pytest.raises(UserError, match=r"train.fresh.*no 'text.words'; it has .*text.tokens"):
        start_from(task, start.model, ["text.words"])


def test_scratch_and_pretrained_differ_in_the_backbone_alone(
    runs: dict[str, tuple[Path, str]], pretrained: Path, tmp_path: Path
) -> None:
    said = finetune("classify", pretrained, tmp_path, "train.scratch=true")
    assert "from random weights" in said.replace("\n", " ")
    assert "from random weights" not in runs["classify"][1].replace("\n", " ")


@pytest.mark.parametrize(("task", "blind"), [("vqa", "image"), ("vqa", "text"), ("nli", "text"), ("caption", "image")])
def test_blind_runs(task: str, blind: str, pretrained: Path, tmp_path: Path) -> None:
    finetune(task, pretrained, tmp_path, f"data.blind={blind}")
    report = json.loads((tmp_path / "eval.json").read_text())
    assert "swapped" not in next(iter(report["splits"].values()))


def test_pictures_of_any_size_can_be_asked_about(runs: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    Image.new("L", (301, 77), 90).save(tmp_path / "wide.webp")
    invoke("predict", str(runs["classify"][0]), "classify", "--image", str(tmp_path / "wide.webp"))


def test_a_kept_checkpoint_is_scored_beside_the_model(pretrained: Path, runs: dict[str, tuple[Path, str]]) -> None:
    before = (pretrained / "eval.json").read_text()
    invoke("eval", str(pretrained), "--step", "2", "--samples", "16", "--device", "cpu")  # the last one: the same model
    assert json.loads((pretrained / "eval-step-2.json").read_text()) == json.loads(before)
    assert (pretrained / "eval.json").read_text() == before
    folder, _ = runs["vqa"]
    invoke("eval", str(folder), "--step", "4", "--samples", "8", "--device", "cpu")
    found = json.loads((folder / "eval-step-4.json").read_text())
    weights = load_file(folder / "checkpoints" / "step-4" / "model.safetensors")
    kept = load_step(folder, 4, torch.device("cpu"))
    assert isinstance(kept, Finetuned)
    assert all(torch.equal(kept.model.state_dict()[name], value) for name, value in weights.items())
    again = evaluate_task(folder, device="cpu", samples=8, trained=kept, tag="-again")
    assert found == json.loads(json.dumps(again))


@pytest.mark.parametrize("step", ["7", "-1"])
def test_a_step_that_is_not_kept_is_refused(pretrained: Path, step: str) -> None:
    with pytest.raises(UserError, match=rf"no checkpoint of step {step}: kept are 2"):
        invoke("eval", str(pretrained), "--step", step)


def test_a_kept_checkpoint_of_another_task_is_refused(pretrained: Path, runs: dict[str, tuple[Path, str]]) -> None:
    with pytest.raises(UserError, match="is fine-tuned for vqa, not for nli"):
        invoke("eval", str(runs["vqa"][0]), "nli", "--step", "4")
    with pytest.raises(UserError, match="pre-trained only"):
        invoke("eval", str(pretrained), "nli", "--step", "2")
