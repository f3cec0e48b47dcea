"""A whole study on a tiny grid: cut short by its budget, then finished; with a run that fails."""

import csv
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlmoe.cli import app
from vlmoe.config import Recipe, load_recipe, to_mapping
from vlmoe.data.loader import held_out
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.evaluate.masked import losses
from vlmoe.model.flops import Shape
from vlmoe.study import compare, run
from vlmoe.study.collect import finished
from vlmoe.study.declare import Budget, StudyError, load_study
from vlmoe.study.declare import to_mapping as study_mapping
from vlmoe.study.extend import check, left_to_do
from vlmoe.study.grid import count, make_plan
from vlmoe.study.measure import data_shapes
from vlmoe.study.plan import read_report
from vlmoe.study.recount import COUNTED, recount
from vlmoe.study.report import headline
from vlmoe.study.schedule import IMPORTED, Job, Meter, run_jobs
from vlmoe.study.worker import held_out_scores
from vlmoe.tasks.export import load_pretrained
from vlmoe.train.pretrain import prepare_text_tokenizer

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL = [
    "model.width=32", "model.heads=2", "model.depth=2", "model.codes=32", "data.text_tokenizer.samples=300",
    "data.visual_tokenizer.steps=3", "data.batch={pair: 4, image: 1, text: 1}", "data.workers=0", "train.warmup=2",
    "eval={samples: 16, batch: 16}", "train.watch_every=0",
]  # fmt: skip
STUDY = f"""
about: A study for a test.
recipe: characters
set: {json.dumps(SMALL)}
steps: [3, 6]
tolerance: 0.1
dense: [{{width: 32}}]
sparse:
  - {{name: broken, experts: 4, steps: [3], set: [data.visual_tokenizer.path=/nowhere]}}
  - {{name: fine, experts: 4, granularity: 2, shared: 2, layers: all}}
jobs: 2
"""


def budget(file: Path, shapes: list[list[Shape]]) -> float:
    """FLOPs for all runs but the last, counting those of three steps as 1, those of six as 2: of 7, 4.4, of which the
    broken one uses none."""
    plan = make_plan(load_study(str(file)))
    count(plan, {"": shapes})
    return 4.4 * min(run.flops for run in plan.runs)


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, ["study", *words], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder; output and report of both launches; when each run was finished, as files have it."""
    folder = tmp_path_factory.mktemp("study")
    file, out = folder / "mine.yaml", folder / "out"
    file.write_text(STUDY)
    found: dict[str, Any] = {"file": file, "out": out}
    base = load_recipe("characters", SMALL)
    found["shapes"] = data_shapes(base, prepare_text_tokenizer(base, folder / "tokenizers", Console(quiet=True)))
    found["budget"] = budget(file, found["shapes"])
    for name, limit in (("first", found["budget"]), ("second", "null")):
        found[name] = invoke(str(file), f"budget.flops={limit}", "--out", str(out))
        found[f"{name} report"] = json.loads((out / "study.json").read_text())
        found[f"{name} times"] = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")}
    return found


def status(report: dict[str, Any]) -> dict[str, str]:
    return {row["run"]: row["status"] for row in report["runs"]}


def test_what_the_budget_does_not_pay_for_is_not_run(launches: dict[str, Any]) -> None:
    rows = launches["first report"]["runs"]
    left_out = [r["run"] for r in rows if r["status"] == "not run"]
    assert left_out == ["fine-6-seed0"]
    assert sum(r["flops"] for r in rows if r["status"] == "done") <= launches["budget"] < sum(r["flops"] for r in rows)
    assert "1 of 5 not done, the budget is used up" in " ".join(launches["first report"]["notes"])
    assert "1 left out" in launches["first"]


def test_the_list_of_runs_and_their_time_come_before_the_runs(launches: dict[str, Any]) -> None:
    said = launches["first"]
    before, after = said.split("runs: 5 of 5 to do")
    for model in ("dense-w32-d2", "broken", "fine"):
        assert model in before
    assert "5 runs, 5 to do" in before and "with 2 at a time" in before
    assert "Budget: " in before and "what does not fit is left out" in before
    assert "seed0: done" in after
    assert "5 runs, 1 to do" in launches["second"]  # the failed one is not tried again unasked


def test_another_declaration_in_the_folder_is_refused(launches: dict[str, Any]) -> None:
    out = launches["out"]
    then = (out / "study.yaml").read_text()
    words = [str(launches["file"]), "dense=[{width: 32, set: [train.lr=0.1]}]", "--out", str(out)]
    result = CliRunner().invoke(app, ["study", *words])
    assert result.exit_code != 0
    assert "holds a run of another declaration (recipe.train.lr: 0.002 there, 0.1 now)" in str(result.exception)
    assert (out / "study.yaml").read_text() == then  # what is there stays what it says


def test_a_recipe_may_describe_itself_anew(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"recipe": {"about": "an hour on a laptop", "train": {"lr": 0.1}}}
    Job("one", tmp_path, spec).write()
    (tmp_path / "metrics.jsonl").touch()
    spec["recipe"]["about"] = "half an hour on a laptop"
    Job("one", tmp_path, spec).check()
    spec["recipe"]["train"] = {"lr": 0.2}
    with pytest.raises(StudyError, match=r"recipe\.train\.lr: 0\.1 there, 0\.2 now"):
        Job("one", tmp_path, spec).check()


def test_a_second_launch_does_what_is_left_and_only_that(launches: dict[str, Any]) -> None:
    before, after = launches["first times"], launches["second times"]
    assert before
    assert {run: after[run] for run in before} == before
    assert len(after) == 4
    done = {run for run, what in status(launches["second report"]).items() if what == "done"}
    assert done == {"dense-w32-d2-3-seed0", "dense-w32-d2-6-seed0", "fine-3-seed0", "fine-6-seed0"}


def test_a_failed_run_is_recorded_and_the_others_go_on(launches: dict[str, Any]) -> None:
    (row,) = (r for r in launches["second report"]["runs"] if r["model"] == "broken")
    assert row["status"] == "failed"
    assert "/nowhere" in row["error"]
    assert row["loss"] is None
    out = launches["out"]
    for name in ("study.md", "study.html", "runs.csv"):
        assert "/nowhere" in (out / name).read_text(), name


def test_the_report_says_which_words_are_learned(launches: dict[str, Any]) -> None:
    done = [row for row in launches["second report"]["runs"] if row["status"] == "done"]
    for row in done:
        classes = {key.removeprefix("seen:") for key in row if key.startswith("seen:")}
        assert {"name", "kind", "colour", "place"} <= classes
        assert all(0 <= row[f"{view}:{word}"] <= 1 for view in ("seen", "blind") for word in classes)
    row = next(r for r in done if r["run"] == "fine-6-seed0")
    text = (launches["out"] / "study.md").read_text().partition("## Words by class")[2].partition("## ")[0]
    head, cells = (
        [c.strip() for c in line.split("|")] for line in text.splitlines() if line.startswith(("| model", "| fine"))
    )
    assert cells[head.index("colour")] == f"{100 * row['seen:colour']:.0f} / {100 * row['blind:colour']:.0f}"
    with (launches["out"] / "runs.csv").open() as lines:
        written = {r["run"]: r for r in csv.DictReader(lines)}
    assert float(written["fine-6-seed0"]["seen:colour"]) == row["seen:colour"]


def test_the_report_says_what_texts_alone_have_taught(launches: dict[str, Any]) -> None:
    (row,) = (r for r in launches["second report"]["runs"] if r["run"] == "fine-6-seed0")
    trained = load_pretrained(launches["out"] / "runs" / "fine-6-seed0")
    texts = held_out(trained.recipe, trained.text_tokenizer, "val", "text", 0, trained.recipe.eval.samples)
    assert row["loss_texts"] == pytest.approx(losses(trained.model, [texts])["mlm"], rel=1e-5)
    classes = [key for key in row if key.startswith("text:")]  # of few samples: which, is chance
    assert classes and all(0 <= row[key] <= 1 for key in classes)
    text = (launches["out"] / "study.md").read_text()
    assert "## Words of texts by class" in text
    models = text.partition("## Models and lengths")[2].partition("## ")[0]
    assert f"{row['loss_texts']:.3f}" in models


def test_a_study_goes_on_where_another_ended(launches: dict[str, Any], tmp_path: Path) -> None:
    """Longer runs of its own beside the earlier study's finished ones, in every table; those are not done again."""
    longer = ["steps=[6, 9]", "sparse.0.name=other", "sparse.0.set=[]", "sparse.0.steps=[9]"]
    file = str(launches["file"])
    invoke(file, *longer, f"extends={launches['out']}", "--out", str(tmp_path / "longer"))
    report = json.loads((tmp_path / "longer" / "study.json").read_text())
    before = {row["run"]: row for row in launches["second report"]["runs"] if row["status"] == "done"}
    rows = {row["run"]: row for row in report["runs"]}
    assert set(rows) == {*before, "dense-w32-d2-9-seed0", "other-9-seed0", "fine-9-seed0"}
    assert all(rows[run] == row for run, row in before.items())
    assert [e["lengths"] for e in report["saved"]] == [3]  # of the model fine, the only sparse one of several lengths
    with (tmp_path / "longer" / "runs.csv").open() as lines:
        assert {row["run"] for row in csv.DictReader(lines)} == set(rows)
    assert f"4 runs are those of {launches['out']}" in (tmp_path / "longer" / "study.md").read_text()
    made = {path.name for path in (tmp_path / "longer" / "runs").iterdir()}
    assert made == {"dense-w32-d2-9-seed0", "other-9-seed0", "fine-9-seed0"}


def test_all_seeds_are_charged_by_the_batches_of_one(
    launches: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers of other seeds cut texts to other lengths, and a model would have two prices in one table."""
    folder, report = tmp_path / "earlier", launches["second report"]
    folder.mkdir()
    assert report["counted_seed"] == 0
    seeds: list[int] = []

    def noted(base: Recipe, folder: Path, seed: int, console: Console) -> TextTokenizer:
        seeds.append(seed)
        raise StudyError("enough is known")

    monkeypatch.setattr(run, "text_tokenizer", noted)
    for about in ({}, {"counted_seed": 7}):
        old = {key: value for key, value in report.items() if key != "counted_seed"}
        (folder / "study.json").write_text(json.dumps(old | about))
        later = load_study(str(launches["file"]), ["seeds=[3]", f"extends={folder}"])
        with pytest.raises(StudyError, match="enough"):
            run.study(later, tmp_path / "later", console=Console(quiet=True))
    assert seeds == [0, 7]


def test_runs_are_done_again_at_another_rate_or_where_tasks_start_from_them(launches: dict[str, Any]) -> None:
    report = launches["second report"]

    def left(*overrides: str) -> list[str]:
        plan = make_plan(load_study(str(launches["file"]), [f"extends={launches['out']}", *overrides]))
        count(plan, dict.fromkeys(plan.bases, launches["shapes"]))
        return [run.id for run in left_to_do(plan, report)]

    assert left() == ["broken-3-seed0"]  # it failed there
    assert left("sparse.1.set=[train.lr=0.01]") == ["broken-3-seed0", "fine-3-seed0", "fine-6-seed0"]
    tasks = ("downstream.tasks=[vqa]", "downstream.models=[dense-w32-d2]")
    assert left(*tasks) == ["dense-w32-d2-3-seed0", "dense-w32-d2-6-seed0", "broken-3-seed0"]


@pytest.mark.parametrize(
    ("name", "committed"), [("world-longer", "study-world"), ("world-names-widths", "study-world-names-longer")]
)
def test_a_packaged_study_goes_on_from_committed_results(name: str, committed: str) -> None:
    """Reports of before recipes had today's keys, too."""
    declared = load_study(name, [f"extends={RESULTS / committed}"])
    models = {m.name: {"model": to_mapping(m.recipe)["model"]} for m in make_plan(declared).models.values()}
    recipe = to_mapping(load_recipe(declared.recipe, declared.set))
    about = {"declared": study_mapping(declared), "recipe": recipe, "models": models}
    check(read_report(RESULTS / committed), about)
    about["recipe"]["seed"] += 1
    with pytest.raises(StudyError, match="recipe, key 'seed'"):
        check(read_report(RESULTS / committed), about)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("set.8=train.warmup=3", "recipe, key 'train.warmup' is 2 there and 3 here"),
        ("sparse.1.experts=8", "model fine, key 'model.text.experts' is 4 there and 8 here"),
        ("sparse.1.set=[train.weight_decay=0.3]", "model fine, key 'train.weight_decay' is 0.0 there and 0.3 here"),
        ("expert_power=0", "key 'expert_power' is 0.5 there and 0.0 here"),
        ("extends=/nowhere", "/nowhere: no such file"),
    ],
)
def test_a_study_that_cannot_be_extended_is_refused(
    launches: dict[str, Any], tmp_path: Path, change: str, said: str
) -> None:
    words = [str(launches["file"]), f"extends={launches['out']}", change, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["study", *words])
    assert result.exit_code != 0
    assert said in str(result.exception)
    assert not (tmp_path / "runs").exists()


def test_rows_are_what_the_runs_are(launches: dict[str, Any]) -> None:
    out, report = launches["out"], launches["second report"]
    (row,) = (r for r in report["runs"] if r["run"] == "fine-6-seed0")
    trained = load_pretrained(out / "runs" / "fine-6-seed0")
    assert held_out_scores(trained, trained.recipe)["loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert row["loss"] == pytest.approx(row["loss_words"] + row["loss_patches"])
    assert row["flops"] == pytest.approx(row["tokens"] * row["flops_per_token"])
    assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
    assert row["memory_predicted"] == pytest.approx(row["memory_bytes"], rel=0.05)
    built = sum(p.numel() for p in trained.model.backbone.parameters())
    assert row["params_total"] == built
    tokenizers = {
        (out / "runs" / r / "tokenizers" / "visual.safetensors").read_bytes() for r in launches["second times"]
    }
    assert len(tokenizers) == 1


def test_tables_and_pages_hold_the_same(launches: dict[str, Any]) -> None:
    out, report = launches["out"], launches["second report"]
    lines = list(csv.DictReader((out / "runs.csv").open()))
    table = pq.read_table(out / "runs.parquet").to_pylist()
    for row, line, record in zip(report["runs"], lines, table, strict=True):
        assert line["run"] == record["run"] == row["run"]
        assert record["loss"] == row["loss"]
        assert float(line["flops"]) == pytest.approx(row["flops"])
        assert line["error"] == (row["error"] or "")
    (saved,) = report["saved"]  # of the one sparse model with two lengths
    assert saved["model"] == "fine"
    assert saved["flops"]["factor"] > 0
    for name in ("study.png", "saved.png", "map-fine.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    for words in ("Compute saved at equal loss", "fine", "How it was counted", "router and dispatch"):
        assert words in page
        assert words in (out / "study.md").read_text()
    assert "needs at least 8 finished runs" in page  # no law of four runs


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("study-*")), ids=lambda folder: folder.name)
def test_committed_reports_say_what_their_runs_say(folder: Path) -> None:
    report = read_report(folder)
    assert recount(report) is report  # padding is charged alike
    rows = report["runs"]
    assert _plain(compare.compute_saved(rows)) == report["saved"]
    assert _plain(compare.frontiers(rows)) == report["frontier"]
    text = (folder / "study.md").read_text()
    for line in headline(report):
        assert line in text
    for row in finished(rows):
        model = report["models"][row["model"]]
        assert row["flops_per_token"] == pytest.approx(model["flops_per_token"])
        assert row["flops"] == pytest.approx(
            row["tokens"] * row["flops_per_token"] * (1 + row["repeated"] / row["steps"])
        )
        if row["placement"] in (None, "vision"):  # no experts for texts: none skips padding
            assert model["flops_per_token"] == model["flops_computed_per_token"]
        else:
            assert model["flops_per_token"] > model["flops_computed_per_token"]
    lines = {line["run"]: line for line in csv.DictReader((folder / "runs.csv").open())}
    assert {row["run"]: row["flops"] for row in rows} == {name: float(line["flops"]) for name, line in lines.items()}
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / picture).is_file()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_an_older_report_is_recounted_as_the_accounting_counts(launches: dict[str, Any]) -> None:
    """From what was computed, as reports of before had it, to what is charged: the same as the study's own figures."""
    report = launches["second report"]
    shares = {n: m["flops_computed_per_token"] / m["flops_per_token"] for n, m in report["models"].items()}
    assert shares["fine"] < 1
    before = {k: v for k, v in report.items() if k != "charge"} | {
        "models": {n: m | {"flops_per_token": m["flops_computed_per_token"]} for n, m in report["models"].items()},
        "runs": [r | {k: shares[r["model"]] * r[k] for k in COUNTED if r[k] is not None} for r in report["runs"]],
    }  # fmt: skip
    after = recount(before)
    for then, now in zip(report["runs"], after["runs"], strict=True):
        assert {k: now[k] for k in COUNTED} == pytest.approx({k: then[k] for k in COUNTED})
    for name, model in report["models"].items():
        for key in ("flops_per_token", "flops_computed_per_token"):
            assert after["models"][name][key] == pytest.approx(model[key])
    with pytest.raises(StudyError, match="does not say how long its texts were"):
        recount({k: v for k, v in before.items() if k != "shapes"})
    with pytest.raises(StudyError, match="does not describe its model"):
        recount(before | {"runs": [before["runs"][0] | {"model": "another", "width": 7}]})


class UntilItTrains(Meter):
    """A budget that ends when a job has made some steps, whatever the clock says."""

    def __init__(self, out: Path, log: Path) -> None:
        super().__init__(out, Budget())
        self.log = log

    @property
    def left(self) -> float:
        return 0.0 if self.log.is_file() and self.log.read_text().count("\n") >= 3 else 1e9


def test_what_jobs_need_can_be_imported() -> None:
    """The server that they are forked from passes over a module that is not there."""
    for name in IMPORTED:
        importlib.import_module(name)


def test_at_the_end_of_the_budget_a_run_is_stopped_and_can_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    dense = ["model.vision.sparse=none", "model.text.sparse=none"]
    recipe = load_recipe("characters", [*SMALL, *dense, "train.steps=1000000", f"run.dir={run}"])
    job = Job("endless", run, {"kind": "train", "recipe": to_mapping(recipe)}, flops=1e12, steps=1_000_000)
    said: list[str] = []
    meter = UntilItTrains(tmp_path, run / "metrics.jsonl")
    assert run_jobs([job], 1, meter, lambda event, left: said.append(event)) is None
    assert job.status == "stopped"
    assert said[-1] == "endless: stopped"
    assert 0 < job.share_done < 1e-3
    assert list((run / "checkpoints").glob("step-*"))
    assert not (run / "failed.json").exists()
    assert json.loads((tmp_path / "used.json").read_text())["seconds"] > 0
