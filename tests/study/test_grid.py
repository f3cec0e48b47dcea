"""What a declaration turns into: models, equal compute, runs, learning rates; and how mistakes in it are told."""

from pathlib import Path

import pytest
from rich.console import Console

from vlmoe.config import load_recipe
from vlmoe.model import Shape
from vlmoe.study.declare import StudyError, load_study, study_names
from vlmoe.study.grid import Plan, carried_rate, count, make_plan, recipe_of
from vlmoe.study.measure import data_shapes
from vlmoe.study.schedule import Job, expected_seconds
from vlmoe.train.pretrain import prepare_text_tokenizer

TEXT = """
recipe: characters
set: [model.width=64, model.heads=4, model.depth=2, model.vl_ffn=0]
steps: [100, 200]
seeds: [0, 1]
dense:
  - {width: [64, 96]}
"""
BATCHES = [[Shape("pair", 8, 24, 150, 60, 30), Shape("text", 2, 16, 30, 4)], [Shape("pair", 8, 16, 120, 50, 30)]]


def plan_of(tmp_path: Path, more: str = "", *overrides: str) -> Plan:
    file = tmp_path / "mine.yaml"
    file.write_text(TEXT + more)
    plan = make_plan(load_study(str(file), list(overrides)))
    count(plan, {"": BATCHES})
    return plan


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sparse:\n  - {experts: [4, 8], placement: [vision, both], layers: all}\ntolerance: 0.1\n")
    assert list(plan.models) == [
        "dense-w64-d2", "dense-w96-d2", "moe-e4-k1-vision-all-w64-d2", "moe-e4-k1-all-w64-d2",
        "moe-e8-k1-vision-all-w64-d2", "moe-e8-k1-all-w64-d2",
    ]  # fmt: skip
    assert plan.models["dense-w96-d2"].recipe.model.heads == 6  # heads keep their width
    text = plan.models["moe-e8-k1-vision-all-w64-d2"].recipe.model.text
    assert text.sparse == "none"
    assert plan.models["moe-e4-k1-all-w64-d2"].twin == "dense-w64-d2"
    assert len(plan.runs) == 6 * 2 * 2
    first = plan.runs[: len(plan.runs) // 2]
    assert {run.seed for run in first} == {0}  # everything once, before anything twice
    run = plan.runs[0]
    assert run.tokens == run.steps * (8 * 17 * 2 + 150 + 30 + 120) / 2  # padding is not counted
    assert run.flops == run.steps * plan.models[run.model].cost.charge.total


def test_experts_are_sized_to_cost_what_a_dense_layer_costs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sparse:\n  - {name: fine, experts: 8, granularity: 2, shared: 2, layers: all}\n")
    fine, dense = plan.models["fine"], plan.models["dense-w64-d2"]
    assert fine.settings["expert_size"] == 0.5
    for part in ("vision", "attention"):
        assert fine.cost.step.forward[part] == dense.cost.step.forward[part]
    assert fine.cost.step.forward["text"] < dense.cost.step.forward["text"]  # experts take no padding,
    for part in ("vision", "text", "vl", "attention"):
        assert fine.cost.charge.forward[part] == dense.cost.charge.forward[part]  # and are charged for it all the same
    assert fine.cost.step.forward["router"] > 0  # and is paid for:
    assert fine.cost.flops_per_token == fine.cost.step.total / fine.cost.tokens
    with pytest.raises(StudyError, match="128 hidden units cannot be cut into 3 equal parts"):
        plan_of(tmp_path, "sparse:\n  - {experts: 8, granularity: 2, shared: 1}\n")


def test_one_choice_of_one_gate_is_not_divided_by_itself(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sparse:\n  - {name: top1, experts: 4}\n  - {name: two, experts: 4, granularity: 2}\n")
    assert load_recipe("characters").model.text.router.renormalize
    assert not plan.models["top1"].recipe.model.text.router.renormalize
    assert plan.models["two"].recipe.model.text.router.renormalize


def test_unequal_compute_is_refused_or_made_equal(tmp_path: Path) -> None:
    top2 = "sparse:\n  - {name: top2, experts: 4, k: 2, expert_size: 1.0, layers: all}\n"
    with pytest.raises(StudyError, match=r"top2: training costs 1\.\d+ times the FLOPs per token of dense-w64-d2"):
        plan_of(tmp_path, top2)
    plan = plan_of(tmp_path, top2, "equal=total", "seeds=[0]")
    by_model: dict[str, list[float]] = {}
    for run in plan.runs:
        by_model.setdefault(run.model, []).append(run.flops)
    for flops in by_model.values():
        assert flops == pytest.approx(by_model["dense-w64-d2"], rel=0.01)
    steps = {run.model: run.steps for run in plan.runs}  # of the longest
    assert steps["top2"] < 180
    assert steps["dense-w96-d2"] < 120
    assert {run.steps for run in plan_of(tmp_path, top2, "equal=steps").runs} == {100, 200}


def test_the_ablation_shares_models_with_the_grid(tmp_path: Path) -> None:
    more = "sparse:\n  - {name: fine, experts: 4, layers: all}\nablation: {experts: 4, layers: all, seeds: [2]}\n"
    plan = plan_of(tmp_path, more)
    assert plan.ablation == {
        "dense": "dense-w64-d2", "text": "moe-e4-k1-text-all-w64-d2", "vision": "moe-e4-k1-vision-all-w64-d2",
        "both": "fine",
    }  # fmt: skip
    assert plan.models["fine"].seeds == [0, 1, 2]
    assert plan.models["moe-e4-k1-text-all-w64-d2"].seeds == [2]


def test_the_best_rate_is_carried_by_the_rule(tmp_path: Path) -> None:
    sweep = (
        "sweep: {rates: [1e-3, 2e-3], steps: 50, seeds: [0, 1], dense: {width: 64}, sparse: {width: 64, layers: all}}\n"
    )
    own = "sparse:\n  - {name: own, layers: all, set: [train.lr=7e-3]}\n  - {name: fine, layers: all, experts: 4}\n"
    plan = plan_of(tmp_path, own + sweep)
    tried = [run for run in plan.runs if run.stage == "sweep"]
    assert len(tried) == 2 * 2 * 2
    assert plan.runs[: len(tried)] == tried
    best = {"dense": 2e-3, "sparse": 1e-3}
    wide = plan.models["dense-w96-d2"]
    assert carried_rate(plan, wide, best) == pytest.approx(2e-3 * 1.5**-0.5)
    assert carried_rate(plan, plan.models["fine"], best) == 1e-3
    assert carried_rate(plan, plan.models["own"], best) == 7e-3
    run = next(r for r in plan.runs if r.model == "dense-w96-d2")
    assert run.rate is None  # not known before the sweep
    recipe = recipe_of(plan, run, 1e-3, "a/run", "some/tokenizers")
    assert (recipe.train.lr, recipe.train.steps, recipe.seed) == (1e-3, run.steps, run.seed)
    assert recipe.data.visual_tokenizer.path == "some/tokenizers"
    assert recipe.train.warmup <= run.steps / 5


def test_experts_get_a_rate_by_the_share_of_tokens_they_see(tmp_path: Path) -> None:
    more = "sparse:\n  - {experts: [4, 16], layers: all}\n  - {name: own, layers: all, set: [train.expert_lr=0.7]}\n"
    plan = plan_of(tmp_path, more + "tolerance: 0.2\n")
    found = {name: model.recipe.train.expert_lr for name, model in plan.models.items()}
    assert found == {
        "dense-w64-d2": 1.0, "dense-w96-d2": 1.0, "moe-e4-k1-all-w64-d2": 0.5, "moe-e16-k1-all-w64-d2": 0.25,
        "own": 0.7,
    }  # fmt: skip
    equal = plan_of(tmp_path, more + "tolerance: 0.2\n", "expert_power=0")
    assert equal.models["moe-e16-k1-all-w64-d2"].recipe.train.expert_lr == 1.0


def test_mistakes_name_the_key(tmp_path: Path) -> None:
    for more, message in (
        ("spars: []", r"unknown key 'spars': did you mean 'sparse'\?"),
        ("sparse:\n  - {expert: 4}", r"unknown key 'sparse\[0\].expert': did you mean 'sparse\[0\].experts'\?"),
        ("sparse:\n  - {experts: many}", r"key 'sparse\[0\].experts' got 'many', wanted a whole number"),
        ("sparse:\n  - {placement: audio}", r"wanted vision, text, both"),
        ("sparse:\n  - {depth: 5}", "no dense model of width 64 and depth 5"),
        ("sparse:\n  - {name: dense-w64-d2, layers: all}", "two different models have the name"),
        ("reference: big", "wanted a dense model of the study: dense-w64-d2, dense-w96-d2"),
        ("equal: luck", "wanted per_token, total or steps"),
        ("budget: {hours: -1}", r"budget\.hours"),
        ("jobs: x", "key 'jobs'"),
    ):
        with pytest.raises(StudyError, match=message):
            plan_of(tmp_path, more + "\n")
    with pytest.raises(StudyError, match="did you mean 'world'"):
        load_study("wold")
    with pytest.raises(StudyError, match="expected key=value"):
        load_study("tiny", ["jobs"])


def test_a_study_can_be_like_another(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(TEXT + "sweep: {rates: [1e-3], steps: 50}\nbudget: {hours: 3}\n")
    second.write_text(f"like: {first}\nset: [train.lr=1e-3]\nseeds: [2]\nsweep: {{rates: []}}\n")
    one, two = load_study(str(first)), load_study(str(second))
    assert (two.name, two.seeds, two.sweep.rates, two.sweep.steps) == ("second", [2], [], 50)
    assert (two.dense, two.steps, two.budget) == (one.dense, one.steps, one.budget)
    assert two.set == [*one.set, "train.lr=1e-3"]
    third = tmp_path / "third.yaml"
    for more, message in (
        ("like: wold", "did you mean 'world'"),
        ("like: 3", "key 'like' got 3, wanted the name or file of another study"),
        (f"like: {third}", "key 'like' got .* wanted the name or file of another study"),
        (f"like: {first}\nsedes: [1]", "third.yaml: unknown key 'sedes': did you mean 'seeds'"),
        (f"like: {first}\nset: train.lr=1", "third.yaml: key 'set' got 'train.lr=1', wanted a list"),
        (f"like: {first}\nsweep: 5", "third.yaml: key 'sweep'"),
    ):
        third.write_text(more + "\n")
        with pytest.raises(StudyError, match=message):
            load_study(str(third))


@pytest.mark.parametrize("name", study_names())
def test_packaged_studies_are_equal_in_compute(name: str, tmp_path: Path) -> None:
    declared = load_study(name)
    plan, base = make_plan(declared), load_recipe(declared.recipe, declared.set)
    tokenizer = prepare_text_tokenizer(base, tmp_path, Console(quiet=True))
    shapes = data_shapes(base, tokenizer, 8)  # padding as the data has it, for experts skip it
    count(plan, dict.fromkeys(plan.bases, shapes))
    assert plan.runs
    assert plan.study.budget.hours
    assert declared.extends in {"", *(f"runs/study-{other}" for other in study_names())}  # where `vlmoe study` puts it


def test_expected_time_fills_the_lanes(tmp_path: Path) -> None:
    jobs = [Job(str(s), tmp_path / str(s), {}, seconds=s) for s in (4.0, 3.0, 2.0, 1.0)]
    assert expected_seconds(jobs, 1) == 10
    assert expected_seconds(jobs, 2) == 5


WORLDS = """
worlds:
  - {name: few, concepts: 20, set: [data.world.concepts=20]}
  - {name: many, concepts: 60, bits: 500, set: [data.world.concepts=60, model.vocabulary=1024]}
sparse:
  - {name: fine, experts: 4, granularity: 2, shared: 2, layers: all}
  - {name: many-only, experts: 8, layers: all, worlds: [many]}
ablation: {name: top1, experts: 4, layers: all, worlds: [many]}
sweep: {rates: [1e-3, 2e-3], steps: 50, dense: {width: 64, worlds: [many]}, sparse: {experts: 4, layers: all}}
tolerance: 0.1
"""


def plan_of_worlds(tmp_path: Path, *overrides: str) -> Plan:
    file = tmp_path / "mine.yaml"
    file.write_text(TEXT + WORLDS)
    plan = make_plan(load_study(str(file), list(overrides)))
    count(plan, {"few": BATCHES, "many": BATCHES[:1]})
    return plan


def test_everything_is_done_in_each_world(tmp_path: Path) -> None:
    plan = plan_of_worlds(tmp_path)
    assert list(plan.models)[:3] == ["dense-w64-d2-few", "dense-w96-d2-few", "fine-few"]
    assert "many-only-many" in plan.models and "many-only-few" not in plan.models
    for name in ("fine-few", "fine-many"):
        world = name.rpartition("-")[2]
        assert plan.models[name].twin == f"dense-w64-d2-{world}"
        assert plan.models[name].recipe.data.world.concepts == {"few": 20, "many": 60}[world]
    assert plan.models["fine-many"].recipe.model.vocabulary == 1024
    assert plan.models["fine-few"].world.bits_needed == pytest.approx(20 * 4.32193, rel=1e-4)
    assert plan.models["fine-many"].world.bits_needed == 500
    assert plan.ablation["both"] == "top1-both-many"
    assert plan.sweep["sparse"].recipe.data.world.concepts == 60
    assert len({run.id for run in plan.runs}) == len(plan.runs)
    few, many = (plan.models[f"dense-w64-d2-{w}"].cost.tokens for w in ("few", "many"))
    assert few != many  # each by its own data


def test_lengths_may_be_tokens_per_parameter_of_the_dense_model(tmp_path: Path) -> None:
    plan = plan_of_worlds(tmp_path, "steps=[]", "tokens_per_parameter=[2, 5]", "sparse.1.steps=[7]")
    for name in ("dense-w96-d2-few", "fine-many"):
        model = plan.models[name]
        twin = plan.models[model.twin]
        sizes = twin.cost.sizes
        params = sizes.params_per_token - sizes.params_by_part["embeddings"]
        built = sizes.params_total - sizes.params_by_part["embeddings"]
        assert params == built  # of a dense model all are used
        assert model.steps == [round(ratio * params / model.cost.tokens) for ratio in (2, 5)]
    assert plan.models["many-only-many"].steps == [7]
    assert plan.models["fine-few"].steps == plan.models["dense-w64-d2-few"].steps


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tokens_per_parameter=[2]"], "key 'steps' got"),
        (["steps=[]"], "or else tokens_per_parameter"),
        (["sparse.0.worlds=[none]"], r"key 'sparse\[0\].worlds' got \['none'\], wanted names of the study's worlds"),
        (["worlds.0.name=a/b"], "key 'worlds' got"),
        (["worlds.0.name=many"], "a different name for each"),
        (["worlds.0.concepts=0"], r"key 'worlds\[0\].concepts' got 0"),
        (["worlds.0.icons=5"], r"unknown key 'worlds\[0\].icons'"),
        (["dense.0.tokens_per_parameter=[-1]"], r"key 'dense\[0\].tokens_per_parameter' got"),
        (["equal=total", "reference=dense-w80-d2"], "in the world 'few': dense-w64-d2, dense-w96-d2"),
    ],
)
def test_worlds_and_lengths_that_cannot_be_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        plan_of_worlds(tmp_path, *overrides)


def test_pairs_that_are_not_equal_are_charged_what_they_cost_where_the_study_says_so(tmp_path: Path) -> None:
    dear = "sparse:\n  - {name: wide-router, experts: 64, shared: 1, layers: all}\n"
    with pytest.raises(StudyError, match="or equal=steps, with which what each costs is charged"):
        plan_of(tmp_path, dear)
    plan = plan_of(tmp_path, dear, "equal=steps")
    runs = {run.model: run for run in plan.runs if run.steps == 200}
    ratio = runs["wide-router"].flops / runs["dense-w64-d2"].flops
    assert ratio > 1.05
    router = plan.models["wide-router"].cost.charge.forward["router"]
    assert router > 0
    assert ratio == pytest.approx(
        plan.models["wide-router"].cost.charge.total / plan.models["dense-w64-d2"].cost.charge.total
    )
