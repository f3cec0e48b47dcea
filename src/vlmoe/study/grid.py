"""From a declared study to models and runs: recipes, equal compute, the order of work."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmoe.config import ModalityConfig, ModelConfig, Recipe, load_recipe, to_mapping
from vlmoe.data.world.concepts import in_play
from vlmoe.model.accounting import Account, account
from vlmoe.model.flops import Flops, Shape
from vlmoe.model.parameters import hidden_size
from vlmoe.study.declare import AXES, EQUAL, Grid, Headline, Study, StudyError, World, members

SIDES = ("vision", "text")
ABLATION = ("dense", "text", "vision", "both")


@dataclass
class Model:
    """One column of the comparison. kind: its name but for the world's. settings: what tells it apart. twin: the dense
    model it is compared with, itself for a dense one. recipe: but for seed, steps, learning rate and folder.
    saturation: lengths in tokens per parameter, which `count` turns into steps. fixed_rate: its own learning rate,
    which no sweep changes."""

    kind: str
    side: str
    settings: dict[str, Any]
    recipe: Recipe
    steps: list[int]
    seeds: list[int]
    world: World
    saturation: list[float] = field(default_factory=list)
    twin: str = ""
    fixed_rate: bool = False
    account: Account | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.world.name}" if self.world.name else self.kind

    @property
    def cost(self) -> Account:
        assert self.account is not None, f"{self.name}: not accounted yet"
        return self.account


@dataclass(frozen=True)
class Run:
    """rate: learning rate; None: known when the sweep is done. tokens, flops: of its training from nothing, padding not
    counted in the tokens; flops are those charged, padding to all layers alike (`Account.charge`). decay_steps: the
    last ones, in which the rate falls in a straight line; 0: the recipe's schedule."""

    id: str
    stage: str  # sweep, main
    model: str
    side: str
    seed: int
    steps: int
    rate: float | None
    tokens: float
    flops: float
    decay_steps: int = 0

    @property
    def branching(self) -> int:
        """The last step of the constant rate, at which longer runs branch off; 0 where there is none."""
        return self.steps - self.decay_steps if self.decay_steps else 0


@dataclass
class Plan:
    """models: by name, those of the sweep apart. bases: the study's own recipe in each world, "" where it declares
    none. worlds: the study's, or the recipe's own, with how much there is to know. ablation: row -> model. runs: in the
    order in which they are begun."""

    study: Study
    models: dict[str, Model]
    sweep: dict[str, Model]
    ablation: dict[str, str]
    bases: dict[str, Recipe]
    worlds: list[World]
    runs: list[Run] = field(default_factory=list)

    def model(self, run: Run) -> Model:
        return (self.sweep if run.stage == "sweep" else self.models)[run.model]

    @property
    def fine_tuned(self) -> list[str]:
        """The models that tasks start from, by name."""
        declared = self.study.downstream
        names = [n for m in declared.models for n in (self.ablation.values() if m == "ablation" else [m])]
        return list(dict.fromkeys(names)) if declared.tasks else []


def make_plan(study: Study) -> Plan:
    """The models of a study. Raises StudyError or RecipeError where one cannot be built."""
    named = study.worlds or [World()]
    plan = Plan(study, {}, {}, {}, {w.name: load_recipe(study.recipe, [*study.set, *w.set]) for w in named}, [])
    plan.worlds += [_with_concepts(w, plan.bases[w.name]) for w in named]
    for world in plan.worlds:
        for side, axes in (("dense", ("width", "depth")), ("sparse", AXES)):
            for grid in getattr(study, side):
                for one in members(grid, axes) if world.name in (grid.worlds or [world.name]) else ():
                    _add(plan.models, _model(plan, world, one, side))
    if study.ablation is not None:
        plan.ablation = _ablation(plan, _first_world(plan, study.ablation), study.ablation)
    for model in plan.models.values():
        model.twin = _twin(plan, model)
    if study.headline is not None:
        _check_headline(plan, study.headline)
    if study.sweep.rates:
        for side in ("dense", "sparse"):
            grid = getattr(study.sweep, side)
            model = _model(plan, _first_world(plan, study.sweep.dense), next(members(grid)), side)
            plan.sweep[side] = replace(
                model, kind=f"sweep-{side}", steps=[study.sweep.steps], saturation=[], seeds=study.sweep.seeds
            )
    return plan


def _first_world(plan: Plan, grid: Grid) -> World:
    """Of those that a grid names, or of all."""
    return next(w for w in plan.worlds if w.name in (grid.worlds or [w.name]))


def _with_concepts(world: World, base: Recipe) -> World:
    """With the number of things that training shows, where the study does not say it and the embedded world knows."""
    told = world.concepts is not None or world.bits is not None
    if told or any(source.type != "world" for source in base.data.sources):
        return world
    return replace(world, concepts=sum(not concept.unseen for concept in in_play(base.data.world)))


def _check_headline(plan: Plan, headline: Headline) -> None:
    named = [(m.kind, m.world.name) for m in plan.models.values() if m.side == "sparse"]
    if (headline.model, headline.world) not in named:
        known = ", ".join(f"{kind} in {world}" if world else kind for kind, world in named)
        wanted = f"{headline.model!r} in the world {headline.world!r}"
        raise StudyError(f"key 'headline' names {wanted}, which is no sparse model of the study: there are {known}")


def reference_of(plan: Plan, world: World) -> Model:
    """The dense model of a world whose total compute others get. Raises StudyError where there is none."""
    dense = [m for m in plan.models.values() if m.side == "dense" and m.world == world]
    found = next((m for m in dense if m.kind == (plan.study.reference or m.kind)), None)
    if found is None:
        names = ", ".join(m.kind for m in dense) or "none"
        where = f" in the world '{world.name}'" if world.name else ""
        raise StudyError(
            f"key 'reference' got {plan.study.reference!r}, wanted a dense model of the study{where}: {names}"
        )
    return found


def _model(plan: Plan, world: World, grid: Grid, side: str) -> Model:
    study, m = plan.study, plan.bases[world.name].model
    width, depth = grid.width or m.width, grid.depth or m.depth
    changes = [f"model.width={width}", f"model.depth={depth}"]
    if width != m.width and width * m.heads % m.width == 0:  # heads of the same width
        changes.append(f"model.heads={width * m.heads // m.width}")
    settings: dict[str, Any] = {"width": width, "depth": depth}
    if side == "dense":
        changes += [f"model.{s}.sparse=none" for s in SIDES]
    else:
        size = _expert_size(grid, replace(m, width=width))
        changes.append(f"train.expert_lr={expert_lr(grid, study.expert_power)!r}")
        for s in SIDES:
            on = grid.placement in (s, "both")
            changes += [
                f"model.{s}.sparse={grid.layers if on else 'none'}", f"model.{s}.experts={grid.experts}",
                f"model.{s}.router.k={grid.k}", f"model.{s}.granularity={grid.granularity}",
                f"model.{s}.shared_experts={grid.shared}", f"model.{s}.expert_size={size!r}",
            ]  # fmt: skip
            if grid.k * grid.granularity == 1:  # one gate divided by itself is 1: the router would learn nothing
                changes.append(f"model.{s}.router.renormalize=false")
        settings |= {a: getattr(grid, a) for a in ("experts", "k", "granularity", "shared", "placement", "layers")}
        settings["expert_size"] = size
    recipe = load_recipe(study.recipe, [*study.set, *world.set, *changes, *grid.set])
    own = grid if grid.steps or grid.tokens_per_parameter else study
    fixed = any(change.startswith("train.lr=") for change in grid.set)
    return Model(
        grid.name or _name(side, settings), side, settings, recipe, list(own.steps), list(grid.seeds or study.seeds),
        world, list(own.tokens_per_parameter), fixed_rate=fixed,
    )  # fmt: skip


def expert_lr(side: Grid | ModalityConfig, power: float) -> float:
    """Factor on the learning rate of routed experts, (k / E) ** power. An expert sees the share k / E of the tokens;
    Adam's best rate falls with the root of the batch (Malladi et al. 2022), so the power is 0.5, or 0 for one rate."""
    k = side.k if isinstance(side, Grid) else side.router.k
    return (k / side.experts) ** power


def _expert_size(grid: Grid, config: ModelConfig) -> float:
    """With "equal": m / (m k + s), so that m k chosen experts and s shared ones together are as wide as the dense
    layer."""
    if grid.expert_size != EQUAL:
        return float(grid.expert_size)
    hidden, parts = hidden_size(config), grid.granularity * grid.k + grid.shared
    if hidden % parts:
        raise StudyError(
            f"experts of equal compute: a dense layer of {hidden} hidden units cannot be cut into {parts} equal parts "
            f"(granularity {grid.granularity} x k {grid.k} + {grid.shared} shared); choose others, or give expert_size"
        )
    return grid.granularity / parts


def _name(side: str, s: dict[str, Any]) -> str:
    if side == "dense":
        return f"dense-w{s['width']}-d{s['depth']}"
    fine = f"-g{s['granularity']}" if s["granularity"] > 1 else ""
    shared = f"-s{s['shared']}" if s["shared"] else ""
    where = {"both": "", "vision": "-vision", "text": "-text"}[s["placement"]]
    layers = "-" + str(s["layers"]).replace(",", "+")
    return f"moe-e{s['experts']}-k{s['k']}{fine}{shared}{where}{layers}-w{s['width']}-d{s['depth']}"


def _add(models: dict[str, Model], model: Model) -> str:
    """Put a model in, or its lengths and seeds to the equal one that is there. Returns the name it has there."""
    new = _identity(model)
    for other in models.values():
        if _identity(other) == new:
            other.steps = sorted({*other.steps, *model.steps})
            other.saturation = sorted({*other.saturation, *model.saturation})
            other.seeds = list(dict.fromkeys([*other.seeds, *model.seeds]))
            return other.name
    if model.name in models:
        raise StudyError(f"two different models have the name '{model.name}'; give them names of their own")
    models[model.name] = model
    return model.name


def _identity(model: Model) -> dict[str, Any]:
    mapping = to_mapping(model.recipe) | {"world": model.world.name}
    if model.side == "dense":  # what a router would be like changes nothing
        mapping["model"]["vision"] = mapping["model"]["text"] = None
    return mapping


def _ablation(plan: Plan, world: World, grid: Grid) -> dict[str, str]:
    """The paper's four rows: dense, experts for text, for vision, for both."""
    found = {}
    for row in ABLATION:
        one = next(members(replace(grid, placement="both" if row == "dense" else row)))
        if row == "dense":
            model = _model(plan, world, replace(one, name="", set=[]), "dense")
        else:
            named = replace(one, name=f"{one.name}-{row}" if one.name else "")
            model = _model(plan, world, named, "sparse")
        found[row] = _add(plan.models, model)
    return found


def _twin(plan: Plan, model: Model) -> str:
    reference = reference_of(plan, model.world).name
    if model.side == "dense":
        return model.name
    for other in plan.models.values():
        same = all(other.settings[a] == model.settings[a] for a in ("width", "depth")) and other.world == model.world
        if same and other.side == "dense":
            return other.name
    if plan.study.equal == "per_token":
        w, d = model.settings["width"], model.settings["depth"]
        raise StudyError(f"{model.name}: no dense model of width {w} and depth {d} to compare with; add it to 'dense'")
    return reference


# ------------------------------------------------------------------------------------------------------- equal compute
def count(plan: Plan, shapes: Mapping[str, Sequence[Sequence[Shape]]]) -> None:
    """Account for every model on batches as its world's data has them (a list of shapes for each micro-batch), check
    that compute is equal where it must be, and list the runs.

    Raises StudyError where a sparse model costs more or less than the dense one it is compared with.
    """
    for model in [*plan.models.values(), *plan.sweep.values()]:
        model.account = mean_account(model.recipe, shapes[model.world.name])
    for model in plan.models.values():
        tokens = [ratio * plan.models[model.twin].cost.sizes.params_active for ratio in model.saturation]
        model.steps = sorted({*model.steps, *(max(1, round(t / model.cost.tokens)) for t in tokens)})
    study = plan.study
    if study.equal == "per_token":
        for model in plan.models.values():
            ratio = model.cost.charge_per_token / plan.models[model.twin].cost.charge_per_token
            if abs(ratio - 1) > study.tolerance:
                raise StudyError(
                    f"{model.name}: training costs {ratio:.3f} times the FLOPs per token of {model.twin}, wanted 1 "
                    f"within {study.tolerance:.0%}: choose expert_size, set a larger tolerance, or equal=total, or "
                    "equal=steps, with which what each costs is charged in the comparison"
                )
    plan.runs = _runs(plan)


def mean_account(recipe: Recipe, shapes: Sequence[Sequence[Shape]]) -> Account:
    """The account of a recipe whose step is the mean over these micro-batches; memory is that of the largest."""
    each = [account(recipe, batch) for batch in shapes]
    largest = max(each, key=lambda a: a.memory.peak)
    mean = copy.copy(largest)
    mean.step = Flops.sum(a.step for a in each).scaled(1 / len(each))
    mean.charge = Flops.sum(a.charge for a in each).scaled(1 / len(each))
    mean.tokens = sum(a.tokens for a in each) / len(each)  # type: ignore[assignment]
    return mean


def _runs(plan: Plan) -> list[Run]:
    study, runs = plan.study, []
    for side, model in plan.sweep.items():
        for rate in study.sweep.rates:
            runs += [_run(study, model, "sweep", side, seed, study.sweep.steps, rate) for seed in study.sweep.seeds]
    main = []
    for model in plan.models.values():
        for seed in model.seeds:
            reference = reference_of(plan, model.world)
            for length in model.steps:
                steps = length
                if study.equal == "total":
                    steps = max(1, round(length * reference.cost.charge.total / model.cost.charge.total))
                own = None if plan.sweep and not model.fixed_rate else model.recipe.train.lr
                main.append((model.seeds.index(seed), _run(study, model, "main", model.name, seed, steps, own)))
    # All models for their first seed before any for its second: a study cut short is a smaller study.
    return runs + [run for _, run in sorted(main, key=lambda pair: pair[0])]


def _run(study: Study, model: Model, stage: str, name: str, seed: int, steps: int, rate: float | None) -> Run:
    tag = f"-lr{rate:g}" if stage == "sweep" else ""
    return Run(
        f"{model.name}{tag}-{steps}-seed{seed}", stage, name, model.side, seed, steps, rate,
        steps * model.cost.tokens, steps * model.cost.charge.total, _decay_steps(study, model, steps),
    )  # fmt: skip


def _decay_steps(study: Study, model: Model, steps: int) -> int:
    """So that the constant rate ends where the autopilot looks, which then looks at the same steps in every branch."""
    if study.decay_share is None:
        return 0
    train = model.recipe.train
    every = train.guard.every if train.guard.on else 1
    constant = (steps - round(study.decay_share * steps)) // every * every
    if constant < max(1, train.warmup):
        raise StudyError(
            f"key 'decay_share': of {model.name}'s {steps} steps {constant} would come before the decay, wanted at "
            f"least train.warmup ({train.warmup}): choose longer runs, a smaller share or a shorter warm-up"
        )
    return steps - constant


def carried_rate(plan: Plan, model: Model, best: dict[str, float]) -> float:
    """The learning rate of a model: its side's best of the sweep, carried over by width."""
    if model.fixed_rate or model.side not in best:
        return model.recipe.train.lr
    sweep = plan.sweep[model.side].settings["width"]
    return best[model.side] * (model.settings["width"] / sweep) ** plan.study.sweep.width_power


def recipe_of(plan: Plan, run: Run, rate: float, folder: str, tokenizers: str, branch_from: str = "") -> Recipe:
    """The whole recipe of a run. branch_from: the checkpoint of a shorter one that it goes on from."""
    recipe = copy.deepcopy(plan.model(run).recipe)
    recipe.name, recipe.seed, recipe.run.dir = run.id, run.seed, folder
    recipe.train.steps, recipe.train.lr = run.steps, rate
    if run.decay_steps:
        recipe.train.schedule, recipe.train.decay_steps = "constant_decay", run.decay_steps
        recipe.train.keep_at, recipe.branch_from = [run.branching] if run.stage == "main" else [], branch_from
    else:
        recipe.train.warmup = min(recipe.train.warmup, max(1, run.steps // 5))
    recipe.train.min_lr = min(recipe.train.min_lr, rate)
    if recipe.data.visual_tokenizer.type == "vq" and not recipe.data.visual_tokenizer.path:
        recipe.data.visual_tokenizer.path = tokenizers
    recipe.eval.pictures = 0
    return recipe
