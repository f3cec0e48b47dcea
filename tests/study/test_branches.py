"""A study of two worlds, whose lengths are branches of one training: lengthened, with a run that fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.study.test_study import SMALL, invoke
from vlmoe.cli import app
from vlmoe.config import from_mapping, load_recipe
from vlmoe.data.duplicates import seen_in_training
from vlmoe.data.loader import held_out
from vlmoe.data.text_tokenizer import load_text_tokenizer
from vlmoe.evaluate.masked import losses
from vlmoe.evaluate.names import name_scores
from vlmoe.study.declare import Budget, StudyError, load_study
from vlmoe.study.extend import check
from vlmoe.study.grid import count, make_plan
from vlmoe.study.measure import data_shapes
from vlmoe.study.plan import read_report
from vlmoe.study.run import declared_part
from vlmoe.study.schedule import RESULT, Job, Meter, expected_seconds, run_jobs
from vlmoe.study.work import Work, checkpoint_of, drop_branched, job_of, trunk_of
from vlmoe.tasks.export import load_pretrained
from vlmoe.train.checkpoint import steps_in
from vlmoe.train.pretrain import prepare_text_tokenizer, pretrain
from vlmoe.train.runlog import read_lines

pytestmark = pytest.mark.usefixtures("no_plots")
BASE = "characters"
BRANCHED = [*SMALL, "train.guard.every=2"]
STUDY = f"""
recipe: {BASE}
set: {json.dumps(BRANCHED)}
steps: [10, 20]
decay_share: 0.2
tolerance: 0.1
worlds:
  - {{name: few, concepts: 20, set: [data.world.concepts=20]}}
  - {{name: many, concepts: 60, set: [data.world.concepts=60]}}
dense: [{{width: 32, steps: [10]}}]
sparse:
  - {{name: broken, experts: 4, worlds: [few], set: [data.visual_tokenizer.path=/nowhere]}}
  - {{name: fine, experts: 4, granularity: 2, shared: 2, layers: all, worlds: [few]}}
jobs: 2
"""


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study of two lengths, and the same with three of them."""
    folder = tmp_path_factory.mktemp("branches")
    file, out = folder / "mine.yaml", folder / "out"
    file.write_text(STUDY)
    found: dict[str, Any] = {"out": out, "file": file}
    found["dry"] = invoke(str(file), "--dry-run", "--out", str(out))
    for name, words in (("first", []), ("second", ["steps=[10,20,30]"])):
        found[name] = invoke(str(file), *words, "--out", str(out))
        found[f"{name} report"] = json.loads((out / "study.json").read_text())
        found[f"{name} times"] = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("runs/*/result.json")}
        found[f"{name} kept"] = {p.name: steps_in(p / "checkpoints") for p in out.glob("runs/*")}
    return found


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in report["runs"]}


def test_a_branch_has_the_weights_and_the_log_of_a_run_from_nothing(launches: dict[str, Any], tmp_path: Path) -> None:
    """Of a run that goes on from one that itself went on from another."""
    folder = launches["out"] / "runs" / "fine-few-30-seed0"
    recipe = from_mapping(json.loads((folder / "job.json").read_text())["recipe"])
    steps = recipe.train.steps
    assert recipe.branch_from
    assert (recipe.train.schedule, recipe.train.decay_steps) == ("constant_decay", steps // 5)
    recipe.branch_from, recipe.train.keep_at, recipe.run.dir = "", [], str(tmp_path)
    pretrain(recipe)
    timing = {"tokens_per_second", "seconds", "wait_share"}
    logs = [
        [{k: v for k, v in r.items() if k not in timing} for r in read_lines(f / "metrics.jsonl")]
        for f in (folder, tmp_path)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == steps
    for name in ("model/model.safetensors", f"checkpoints/step-{steps}/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_rows_say_what_a_run_would_cost_alone(launches: dict[str, Any]) -> None:
    found = rows(launches["second report"])
    began = {run: row["began_at"] for run, row in found.items() if row["status"] == "done"}
    assert began == {
        "dense-w32-d2-few-10-seed0": 0,
        "dense-w32-d2-many-10-seed0": 0,
        "fine-few-10-seed0": 0,
        "fine-few-20-seed0": 8,
        "fine-few-30-seed0": 16,
    }
    for run, row in found.items():
        if row["status"] == "done":
            assert row["flops"] == pytest.approx(row["steps"] * found[row["model"] + "-10-seed0"]["flops"] / 10), run
    assert found["fine-few-20-seed0"]["seconds"] > found["fine-few-10-seed0"]["seconds"] * 0.5


def test_finished_runs_are_not_done_again(launches: dict[str, Any]) -> None:
    before, after = launches["first times"], launches["second times"]
    assert len(before) == 4
    assert len(after) == 5
    assert {run: after[run] for run in before} == before


def test_only_checkpoints_that_may_be_gone_on_from_are_kept(launches: dict[str, Any]) -> None:
    assert launches["first kept"]["fine-few-10-seed0"] == [10]
    assert launches["first kept"]["fine-few-20-seed0"] == [16, 20]  # 16: for longer runs
    assert launches["second kept"]["fine-few-20-seed0"] == [20]
    assert launches["second kept"]["fine-few-30-seed0"] == [24, 30]


def test_the_branches_of_a_failed_run_fail_with_it(launches: dict[str, Any]) -> None:
    found = rows(launches["first report"])
    assert "/nowhere" in found["broken-few-10-seed0"]["error"]
    why = found["broken-few-20-seed0"]["error"]
    assert why.startswith("not begun: broken-few-10-seed0, from whose step-8 it was to go on, failed: ")
    assert "/nowhere" in why


def test_the_list_of_runs_says_what_is_computed(launches: dict[str, Any]) -> None:
    """Steps: of each dense model 10; of each other 10, and 20 from the eighth on, which would be 30 alone."""
    plain = " ".join(launches["dry"].split())
    computed, alone = (
        float(re.search(pattern, plain)[1])  # type: ignore[index]
        for pattern in (r"6 to do, ([\d.]+)G FLOPs in all", r"would take ([\d.]+)G FLOPs")
    )
    assert computed / alone == pytest.approx(64 / 80, rel=0.02)


def test_a_length_that_comes_later_goes_on_from_what_is_kept(tmp_path: Path) -> None:
    """Lengths 10, 20, 30 of one model and seed, in every state of the shorter ones."""
    file = tmp_path / "mine.yaml"
    file.write_text(STUDY)
    declared = load_study(str(file), ["steps=[30,10,20]"])
    plan = make_plan(declared)
    base = load_recipe(BASE, BRANCHED)
    shapes = data_shapes(base, prepare_text_tokenizer(base, tmp_path / "tokenizers", Console(quiet=True)))
    count(plan, {"few": shapes, "many": shapes})
    work = Work(plan, tmp_path, 1, Console(quiet=True), Meter(tmp_path, Budget()), {}, 0)
    short, middle, long = sorted((r for r in plan.runs if r.model == "fine-few"), key=lambda r: r.steps)
    assert (trunk_of(work, short), trunk_of(work, middle), trunk_of(work, long)) == (None, short, middle)
    assert job_of(work, long).start == tmp_path / "runs" / middle.id / "checkpoints" / "step-16"
    for run in (short, middle):
        work.folder(run).mkdir(parents=True)
        (work.folder(run) / RESULT).write_text('{"process_seconds": 3, "seconds": 2}')
    assert trunk_of(work, long) is None  # both are done and kept nothing
    checkpoint_of(work, short).mkdir(parents=True)
    assert trunk_of(work, long) == short
    assert job_of(work, long).flops == pytest.approx(long.flops * 22 / 30)
    drop_branched(work)
    assert not checkpoint_of(work, short).exists()  # the middle one needs it no more
    (work.folder(long) / "checkpoints" / "step-20").mkdir(parents=True)  # begun, then stopped
    (work.folder(long) / "events.jsonl").write_text('{"event": "branched", "step": 16}\n')
    (work.folder(long) / "metrics.jsonl").write_text('{"step": 23}\n')
    job = job_of(work, long)
    assert (job.began_at, job.ready, job.status, job.share_done) == (16, True, "stopped", 0.5)
    assert job.flops == pytest.approx(long.flops * 14 / 30)


def test_a_job_waits_for_the_checkpoint_it_begins_with_and_counts_its_own_steps(tmp_path: Path) -> None:
    start = tmp_path / "trunk" / "checkpoints" / "step-8"
    job = Job("branch", tmp_path / "branch", {}, seconds=6, flops=12, steps=20, began_at=8, start=start)
    trunk = Job("trunk", tmp_path / "trunk", {}, seconds=10, flops=10, steps=10)
    assert not job.ready
    assert expected_seconds([trunk, job], 2) == pytest.approx(14)  # 8 for the eight steps, then 6
    assert expected_seconds([job], 2) == 6  # nobody is to make it: as if it were there
    said: list[str] = []
    assert run_jobs([job], 1, Meter(tmp_path, Budget()), lambda event, left: said.append(event)) is None
    assert job.status == "to do"
    assert not any(said)  # left out
    assert not job.orphaned
    trunk.folder.mkdir()
    (trunk.folder / "failed.json").write_text('{"error": "out of memory"}')
    assert job.orphaned
    start.mkdir(parents=True)  # it failed after that, in its decay
    assert job.ready and not job.orphaned
    (job.folder / "metrics.jsonl").write_text('{"step": 8}\n')
    assert job.status == "to do"
    (job.folder / "metrics.jsonl").write_text('{"step": 8}\n{"step": 14}\n')
    assert job.share_done == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("decay_share=1", "key 'decay_share' got 1.0, wanted a share between 0 and 1"),
        (
            "decay_share=0.9",
            "of dense-w32-d2-few's 10 steps 0 would come before the decay, wanted at least train.warmup",
        ),
    ],
)
def test_a_share_that_leaves_no_room_is_refused(tmp_path: Path, change: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(STUDY)
    result = CliRunner().invoke(app, ["study", str(file), change, "--out", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert said in str(result.exception)


def test_worlds_have_data_and_tokenizers_of_their_own(launches: dict[str, Any]) -> None:
    out, found = launches["out"], rows(launches["second report"])
    few, many = (found[f"dense-w32-d2-{world}-10-seed0"] for world in ("few", "many"))
    assert (few["world"], few["concepts"], many["world"], many["concepts"]) == ("few", 20, "many", 60)
    assert few["bits_needed"] == pytest.approx(20 * 4.3219, rel=1e-4)
    assert few["bits_held"] == 2 * few["params_active"]
    assert few["tokens_per_parameter"] == pytest.approx(few["tokens"] / few["params_active"])
    for row in (few, many):
        recipe = load_pretrained(out / "runs" / row["run"]).recipe
        assert recipe.data.world.concepts == row["concepts"]
        assert recipe.data.visual_tokenizer.path == str(out / "tokenizers" / row["world"] / "seed-0")
    assert found["fine-few-30-seed0"]["twin"] == "dense-w32-d2-few"
    assert "a law is of one world" in (out / "study.md").read_text()


def test_the_map_is_drawn_of_what_is_done(launches: dict[str, Any]) -> None:
    (point,) = launches["second report"]["map"]
    assert (point["kind"], point["world"], point["steps"]) == ("fine", "few", 10)
    assert (launches["out"] / "map-fine.png").read_bytes().startswith(b"\x89PNG")
    assert "## Where sparsity pays: fine" in (launches["out"] / "study.md").read_text()


def test_recall_and_what_was_never_shown_are_scored_apart(launches: dict[str, Any]) -> None:
    row = rows(launches["second report"])["fine-few-30-seed0"]
    trained = load_pretrained(launches["out"] / "runs" / row["run"])
    recipe, count = trained.recipe, trained.recipe.eval.samples
    assert row["val:loss"] == row["loss"]
    apart = held_out(recipe, trained.text_tokenizer, "font", "pair", 0, count, True)
    assert row["font:loss"] == pytest.approx(losses(trained.model, [apart])["sum"], rel=1e-5)
    names = name_scores(trained.model, [apart], trained.text_tokenizer.mask_id)
    assert names is not None
    assert row["font:names"] == names["seen"]["accuracy"]
    assert row["evaluation_seconds"] > 0
    text = (launches["out"] / "study.md").read_text().partition("## Recall and generalisation")[2].partition("## ")[0]
    assert "recall: known things in new scenes" in text
    assert f"| {row['font:loss']:.3f} |" in text
    found = launches["second report"]["duplicates"]
    base = load_recipe(BASE, [*BRANCHED, "data.world.concepts=60"])
    assert found["many"]["splits"] == seen_in_training(base, ["val", "font"], count, 10)
    assert "In the world many, of the held-out pairs that are scored, so many occur in training" in text


def test_a_study_that_goes_on_has_the_same_worlds_and_schedule(launches: dict[str, Any]) -> None:
    """Worlds of its own it may have; those of the same name must be the same."""
    out = launches["out"]
    earlier = read_report(out)
    shapes = data_shapes(load_recipe(BASE, BRANCHED), load_text_tokenizer(out / "tokenizers/few/seed-0"))

    def checked(*overrides: str) -> None:
        plan = make_plan(load_study(str(launches["file"]), ["steps=[40]", f"extends={out}", *overrides]))
        count(plan, dict.fromkeys(plan.bases, shapes))
        check(earlier, declared_part(plan))

    checked()
    checked("worlds.1.name=another", "worlds.1.set=[data.world.concepts=70]")
    with pytest.raises(StudyError, match=r"recipe of many, key 'data\.world\.concepts' is 60 there and 70 here"):
        checked("worlds.1.set=[data.world.concepts=70]")
    with pytest.raises(StudyError, match=r"key 'decay_share' is 0\.2 there and 0\.3 here"):
        checked("decay_share=0.3")
