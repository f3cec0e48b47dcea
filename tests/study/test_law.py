"""The scaling law on runs of a law that is known, and the plan that is made of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vlmoe.cli import app
from vlmoe.config import from_mapping, load_recipe, to_mapping
from vlmoe.model import sizes
from vlmoe.study.declare import StudyError
from vlmoe.study.law import HIGH, check, configurations, fit
from vlmoe.study.plan import make_plan, parse_size, undetermined, warning
from vlmoe.study.recount import CHARGE
from vlmoe.study.speed import Speeds

BASE = ["model.width=64", "model.heads=4", "model.depth=4"]
NOISE = 0.004
REFITS = 60


def truth(n: float, e: float, d: float) -> float:
    return 0.5 + 0.9 * (n / 1.4e5) ** -0.35 * e**-0.15 + 1.1 * (d / 1e6) ** -0.3


def runs(seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    rng, found = np.random.default_rng(1), []
    for n in (5e4, 1e5, 2e5, 4e5):
        for e in (1.0, 4.0, 12.0):
            for d in (2e5, 8e5, 3.2e6):
                for seed in seeds:
                    side = "dense" if e == 1 else "sparse"
                    model = "moe" if e > 1 else "dense"
                    found.append({
                        "run": f"{model}-{n:g}-{e:g}-{d:g}-{seed}", "stage": "main", "status": "done", "side": side,
                        "model": f"{model}-{n:g}-{e:g}", "seed": seed, "steps": int(d / 1e3), "params_active": n,
                        "width": n, "depth": 4, "expansion": e, "tokens": d,
                        "flops": 6 * n * d, "flops_per_second": 2e9 if e == 1 else 1e9,
                        "loss": truth(n, e, d) * np.exp(NOISE * rng.standard_normal()),
                    })  # fmt: skip
    return found


RUNS = runs()
SHAPES = [
    {"kind": "pair", "samples": 32.0, "text": 24.0, "real": 512.0, "words": 200.0, "patches": 460.8},
    {"kind": "image", "samples": 8.0, "text": 0.0, "real": 0.0, "words": 0.0, "patches": 115.2},
    {"kind": "text", "samples": 8.0, "text": 24.0, "real": 128.0, "words": 19.2, "patches": 0.0},
]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    recipe = load_recipe("characters", [*BASE, "model.vision.sparse=all", "model.text.sparse=all"])
    models = {r["model"]: {"model": to_mapping(recipe)["model"]} for r in RUNS}
    dense = load_recipe("characters", [*BASE, "model.vision.sparse=none", "model.text.sparse=none"])
    return {
        "runs": RUNS, "recipe": to_mapping(dense), "base": "characters", "machine": {"device_name": "a machine"},
        "models": models, "sweep": {"dense": {"best": 2e-3, "width": 64, "width_power": -0.5}},
        "declared": {"expert_power": 0.5}, "shapes": SHAPES, "charge": CHARGE,
    }  # fmt: skip


def test_a_known_law_is_recovered() -> None:
    law = fit(RUNS, "additive", REFITS)
    assert law.parameters["alpha"] == pytest.approx(0.35, abs=0.04)
    assert law.parameters["beta"] == pytest.approx(0.3, abs=0.03)
    assert law.parameters["gamma"] == pytest.approx(0.15, abs=0.02)
    point = {"params_active": 1.5e5, "expansion": 6.0, "tokens": 1e6}
    (guess,) = law.predict([point])
    assert guess["low"] < truth(1.5e5, 6, 1e6) < guess["high"]
    assert guess["loss"] == pytest.approx(truth(1.5e5, 6, 1e6), rel=0.005)
    assert guess["high"] / guess["low"] < 1.03
    assert fit(RUNS, refits=5).form == "additive"  # the richer form predicts left-out models no better


def test_held_out_runs_fall_into_their_interval() -> None:
    found = check(RUNS, "additive", REFITS)
    assert found is not None
    fitted = {r["run"] for r in RUNS} - {f["run"] for f in found["runs"]}
    assert len(fitted) == found["fitted"]
    most = max(r["flops"] for r in RUNS if r["run"] in fitted)
    assert all(r["flops"] >= most for r in RUNS if r["run"] not in fitted)  # it extrapolates in compute
    assert len(found["runs"]) >= 10
    out = {(r["width"], r["steps"]) for r in RUNS if r["run"] not in fitted}
    assert not [r for r in RUNS if r["run"] in fitted and (r["width"], r["steps"]) in out]  # nor a twin of one
    assert found["inside"] >= 0.8
    assert found["mean_error"] < 0.01


def test_a_run_gone_wrong_does_not_bend_the_law() -> None:
    broken = [r | {"loss": 3 * r["loss"]} if i == 20 else r for i, r in enumerate(RUNS)]
    law = fit(broken, "additive", refits=5)
    (guess,) = law.predict([{"params_active": 1.5e5, "expansion": 6.0, "tokens": 1e6}])
    assert guess["loss"] == pytest.approx(truth(1.5e5, 6, 1e6), rel=0.01)


def test_experts_that_cost_loss_are_seen_as_such() -> None:
    worse = [r | {"loss": truth(r["params_active"], 1 / r["expansion"], r["tokens"])} for r in RUNS]
    assert fit(worse, "additive", refits=5).parameters["gamma"] == pytest.approx(-0.15, abs=0.03)


def test_refits_draw_whole_configurations() -> None:
    """Seeds of a configuration enter and leave a refit together: with all seeds equal, runs and configurations give the
    same refits, and a copy of every run changes no interval."""
    groups = configurations(RUNS)
    assert len(groups) == len(RUNS) // 2  # two seeds of each
    for places in groups:
        assert len({(RUNS[i]["model"], RUNS[i]["steps"]) for i in places}) == 1
        assert {RUNS[i]["seed"] for i in places} == {0, 1}
    copies = [r | {"seed": 10 + r["seed"], "run": r["run"] + "-copy"} for r in RUNS]
    once, twice = (fit(rows, "additive", 20).as_dict()["intervals"] for rows in (RUNS, [*RUNS, *copies]))
    for name in once:  # drawn one by one, twice the runs would make intervals narrower by the root of 2
        assert twice[name] == pytest.approx(once[name], rel=1e-3, abs=1e-5)


def test_what_ends_at_a_bound_of_the_fit_is_marked() -> None:
    """Runs of one size do not determine what size is worth; runs without a floor push the best loss to none."""
    sure = fit(RUNS, "additive", 20)
    assert sure.at_bound() == []
    assert "alpha" not in sure.as_dict()["intervals_at_bound"]
    steep = [r | {"loss": 1.0 + (r["params_active"] / 5e4) ** -6.0 + (r["tokens"] / 2e5) ** -0.5} for r in RUNS]
    found = fit(steep, "additive", 20).as_dict()
    assert "alpha" in found["at_bound"]  # 6 is beyond the bound of 3
    assert found["parameters"]["alpha"] == pytest.approx(HIGH["alpha"])
    assert "high" in found["intervals_at_bound"]["alpha"]
    assert "alpha ended there" in undetermined(found).replace("alpha, best", "alpha")
    assert "alpha" in check(steep, "additive", 5)["at_bound"]  # type: ignore[index]
    assert undetermined({"at_bound": [], "intervals_at_bound": {}}) == ""


def test_too_few_runs_are_no_law() -> None:
    with pytest.raises(StudyError, match="there are 6"):
        fit([r for r in RUNS if r["tokens"] < 3e6 and r["params_active"] == 5e4])


def test_extrapolation_is_flagged() -> None:
    law = fit(RUNS, "additive", refits=5)
    inside = {"params_active": 1e5, "expansion": 4.0, "tokens": 1e6, "flops": 6e11}
    assert law.outside(inside) == {}
    far = law.outside(inside | {"tokens": 3.2e7, "params_active": 1e4})
    assert far == {"tokens": pytest.approx(10), "params_active": pytest.approx(5)}


# ----------------------------------------------------------------------------------------------------------------- plan
def test_the_plan_takes_the_best_that_fits(report: dict[str, Any]) -> None:
    roomy = make_plan(report, 1e13, 1e9, refits=REFITS)
    best = roomy["recommended"]
    assert best["expansion"] > 2  # in this law experts help
    assert best["flops"] == pytest.approx(1e13, rel=0.01)
    assert best["low"] < best["loss"] < best["high"]
    assert roomy["alternatives"][0]["why"] == "best dense model"
    assert roomy["alternatives"][0]["loss"] > best["loss"]
    assert best["seconds"] == pytest.approx(1e13 / 1e9, rel=0.01)  # sparse runs made 1e9 FLOPs a second
    assert roomy["alternatives"][0]["learning_rate"] == pytest.approx(
        2e-3 * (roomy["alternatives"][0]["width"] / 64) ** -0.5
    )


def test_a_plan_counts_texts_as_long_as_the_study_had_them(report: dict[str, Any]) -> None:
    half = ["data.batch={pair: 16, image: 4, text: 4}"]  # of what the shapes have
    best = make_plan(report, 1e13, 1e9, half, refits=5)["recommended"]
    m = from_mapping(report["recipe"]).model
    seen = 20 * (1 + (m.image_size // m.patch) ** 2)  # of images and pairs
    assert best["tokens"] == best["steps"] * (seen + (512 + 128) / 2)
    short = make_plan(report, 1e13, 1e9, [*half, "model.max_text=10"], refits=5)["recommended"]
    assert short["tokens"] == short["steps"] * (seen + 20 * 10)  # of pairs and texts
    with pytest.raises(StudyError, match="does not say how long its texts were"):
        make_plan({k: v for k, v in report.items() if k not in ("shapes", "charge")}, 1e13, 1e9, refits=5)


def test_speed_depends_on_side_and_size() -> None:
    rows = [r | {"flops_per_second": r["params_active"] * (1e4 if r["side"] == "dense" else 5e3)} for r in RUNS]
    measured, given = Speeds(rows, None), Speeds(rows, 1e12)
    assert measured.of("dense", 7e4) == pytest.approx(7e8)  # between 5e4 and 1e5
    assert measured.of("sparse", 7e4) == pytest.approx(3.5e8)
    assert measured.of("dense", 1e9) == pytest.approx(4e9)  # beyond: that of the largest
    assert (given.of("dense", 7e4), given.of("sparse", 7e4)) == (1e12, pytest.approx(5e11))
    with pytest.raises(StudyError, match="no finished dense run"):
        Speeds([r for r in rows if r["side"] == "sparse"], None)


def test_memory_is_obeyed(report: dict[str, Any]) -> None:
    roomy = make_plan(report, 1e13, 1e9, refits=5)
    limit = 0.5 * roomy["recommended"]["memory"]
    tight = make_plan(report, 1e13, limit, refits=5)
    for candidate in [tight["recommended"], *tight["alternatives"]]:
        assert candidate["memory"] <= limit
    assert tight["recommended"]["loss"] >= roomy["recommended"]["loss"]
    assert tight["too_large"] > roomy["too_large"]
    with pytest.raises(StudyError, match="smallest candidate needs"):
        make_plan(report, 1e13, 1e5, refits=5)


def test_the_plan_says_when_it_extrapolates(report: dict[str, Any]) -> None:
    far = make_plan(report, 1e14, 1e10, refits=5)
    most = max(r["flops"] for r in RUNS)
    assert far["recommended"]["outside"]["flops"] == pytest.approx(1e14 / most, rel=0.01)
    assert "Extrapolates: " in warning(far["recommended"])
    near = make_plan(report, 1e12, 1e9, refits=5)
    assert "flops" not in near["recommended"]["outside"]


def test_the_printed_run_is_the_recommended_model(report: dict[str, Any]) -> None:
    found = make_plan(report, 1e13, 1e9, ["data.batch.pair=16"], refits=5, flops_per_second=1e12, devices=2)
    recipe = load_recipe("characters", found["overrides"])
    best = found["recommended"]
    assert sizes(recipe.model).params_total == best["params_total"]
    assert recipe.train.expert_lr == pytest.approx((recipe.model.vision.router.k / recipe.model.vision.experts) ** 0.5)
    assert (recipe.model.width, recipe.train.steps, recipe.data.batch.pair) == (best["width"], best["steps"], 16)
    assert best["seconds"] == pytest.approx(2 * 1e13 / 2e12, rel=0.01)  # two devices; sparse takes twice as long


def test_plan_as_a_command(report: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(report))
    words = ["plan", "--flops", "1e13", "--memory", "0.5GB", "--study", str(tmp_path)]
    result = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("recommended", "best dense model", "vlmoe pretrain characters", "Extrapolates", "FLOPs/s"):
        assert text in result.output, text
    for wrong, message in (
        (["--memory", "0.5GB", "--study", str(tmp_path)], "--flops is missing"),
        (["--flops", "1e13", "--memory", "much", "--study", str(file)], "80GB or 64GiB"),
        (["--flops", "1e13", "--memory", "1GB", "--study", str(tmp_path / "none")], "no such file"),
        (["--flops", "1e13", "--memory", "1GB"], "--study is missing"),
        (
            ["--flops", "1e13", "--memory", "1GB", "--study", str(file), "model.widht=3"],
            "the study's recipe: unknown key",
        ),
    ):
        failed = CliRunner().invoke(app, ["plan", *wrong])
        assert failed.exit_code != 0
        assert message in str(failed.exception)


def test_sizes_with_units() -> None:
    assert parse_size("80GB", "--memory") == 8e10
    assert parse_size("64 GiB", "--memory") == 64 * 2**30
    assert parse_size("1e18", "--flops") == 1e18
    for wrong in ("0", "-1GB", "80XB", ""):
        with pytest.raises(StudyError):
            parse_size(wrong, "--memory")
