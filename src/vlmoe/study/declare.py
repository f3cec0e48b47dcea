"""What a study compares, read from YAML: a grid of dense and sparse models, run lengths, seeds and a budget.

Every axis of a `Grid` may be a list; the grid is the product of all of them. Reading is strict: an unknown key or an
impossible value is a `UserError` that names it.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmoe.config import TASKS, UserError, home, override_value, read_yaml

AXES = ("width", "depth", "experts", "k", "granularity", "shared", "expert_size", "placement", "layers")
PLACEMENTS = ("vision", "text", "both")
EQUAL = "equal"
LIKE = "like"  # names the study whose keys count where this one has none


class StudyError(UserError):
    """A study that cannot be done as declared; the message names the key."""


@dataclass
class Grid:
    """Models. An axis that is not given stays as the recipe has it; of a sparse model, k, granularity and shared are 1,
    1 and 0 then, and the rest what stands here.

    width, depth: of the model. experts, k, granularity, shared (experts): of each sparse layer, see `ModalityConfig`.
    expert_size: over the dense layer's; "equal": such that a token's hidden units are those of the dense layer.
    placement: sparse for vision, text or both. layers: a `sparse` pattern, for example all, odd or last.
    steps, tokens_per_parameter, seeds: instead of the study's. worlds: names of those that these models are trained in;
    empty: all. set: overrides of the recipe for these models.
    """

    name: str = ""  # empty: made of the axes
    width: Any = None
    depth: Any = None
    experts: Any = 8
    k: Any = 1
    granularity: Any = 1
    shared: Any = 0
    expert_size: Any = EQUAL
    placement: Any = "both"
    layers: Any = "odd"
    steps: list[int] = field(default_factory=list)
    tokens_per_parameter: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    worlds: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)


@dataclass
class World:
    """Data to compare models in, as changes to the recipe. concepts: how many things there are to know in it; None: in
    the embedded world those that training shows. bits: that it takes to know them; None: concepts x log2(concepts),
    what tells each from all others."""

    name: str = ""
    concepts: int | None = None
    bits: float | None = None
    set: list[str] = field(default_factory=list)

    @property
    def bits_needed(self) -> float | None:
        if self.bits is not None or not self.concepts:
            return self.bits
        return self.concepts * math.log2(self.concepts)


@dataclass
class Sweep:
    """A small search for each side's learning rate, at a small scale. The best rate is carried to a model of another
    width by `rate * (width / sweep's width) ** width_power`. No rates: everything trains with the recipe's. Of a
    study's worlds it is searched in the first that `dense` names, or else in the first of all, for all of them."""

    rates: list[float] = field(default_factory=list)
    steps: int = 0
    seeds: list[int] = field(default_factory=lambda: [0])
    dense: Grid = field(default_factory=Grid)
    sparse: Grid = field(default_factory=Grid)
    width_power: float = -0.5


@dataclass
class Downstream:
    """Fine-tuning of chosen models, each at its longest run: names of variants, or "ablation" for its four."""

    tasks: list[str] = field(default_factory=list)
    recipe: str = "world"
    models: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)


@dataclass
class Headline:
    """The comparison that is to carry the claim, chosen before it runs. model: of the sparse ones, without its world's
    name. world: of the study's, empty where it has none. steps: a length of the dense twin; None: its longest."""

    model: str = ""
    world: str = ""
    steps: int | None = None


@dataclass
class Budget:
    """What a study may use, over all its launches. hours: on the clock. flops: of training. None: no limit."""

    hours: float | None = None
    flops: float | None = None


@dataclass
class Study:
    """equal: "per_token": every sparse model must cost what the dense one of its width and depth costs per token,
    within `tolerance`, and all train for the same steps. "total": every model trains for as many steps as give the
    total FLOPs of `reference` after each of `steps`. "steps": the same steps, whatever they cost. reference: a dense
    model's name; empty: the first. steps or tokens_per_parameter: run lengths; the latter are tokens of training,
    padding not counted, over the parameters per token of the dense model that a model is compared with, embeddings not
    counted. worlds: everything is done in each of them, and models are compared within one; none: in the recipe's.
    extends: the folder of an earlier study on the same recipe, whose finished runs join the report; its learning rate
    does not, set `train.lr`. expert_power: see `grid.expert_lr`. jobs: runs at a time, each with one thread.

    decay_share: of every run's steps those in which its learning rate falls in a straight line, after a constant one;
    None: the recipe's schedule. With it the lengths of a model are branches of one training: each run goes on from
    where the next shorter one began its decay, and is the same to the bit as if it had been trained from nothing."""

    name: str = ""
    about: str = ""
    recipe: str = "characters"
    set: list[str] = field(default_factory=list)
    equal: str = "per_token"
    tolerance: float = 0.05
    reference: str = ""
    extends: str = ""
    expert_power: float = 0.5
    steps: list[int] = field(default_factory=list)
    tokens_per_parameter: list[float] = field(default_factory=list)
    worlds: list[World] = field(default_factory=list)
    decay_share: float | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    dense: list[Grid] = field(default_factory=list)
    sparse: list[Grid] = field(default_factory=list)
    ablation: Grid | None = None
    sweep: Sweep = field(default_factory=Sweep)
    downstream: Downstream = field(default_factory=Downstream)
    budget: Budget = field(default_factory=Budget)
    headline: Headline | None = None
    jobs: int = 1


def study_names() -> list[str]:
    """Names of the packaged studies."""
    folder = resources.files("vlmoe.recipes") / "study"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_study(study: str, overrides: list[str] | None = None) -> Study:
    """Read a packaged study by name or a YAML file by path, then apply `key=value` overrides.

    With `like: OTHER`, keys that the file leaves out are those of the study OTHER, and its `set` is added to OTHER's.

    Raises StudyError: no such study, unreadable YAML, unknown key, impossible value.
    """
    given, name = _given(study)
    for override in overrides or []:
        key, sep, _ = override.partition("=")
        if not sep or not key:
            raise StudyError(f"override '{override}': expected key=value, for example jobs=2")
        read = override_value(override, StudyError)
        try:
            OmegaConf.update(given, key, read, merge=True)
        except Exception as error:
            raise StudyError(f"override '{override}': {str(error).splitlines()[0]}") from None
    mapping: Any = OmegaConf.to_container(given)
    _check_keys(mapping, Study, "", study)
    try:
        found: Study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Study), mapping))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise StudyError(f"study {study}: key '{error.full_key}': {str(error).splitlines()[0]}") from None
    found.name = found.name or name
    found.extends = home(found.extends)
    _check(found, study)
    return found


def to_mapping(study: Study) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(study))  # type: ignore[return-value]


def members(grid: Grid, axes: tuple[str, ...] = AXES) -> Iterator[Grid]:
    """Every model of a grid: one `Grid` each, whose axes are single values. A name that stands for several models gets
    the axes that tell them apart."""
    values = {a: v if isinstance(v := getattr(grid, a), list) else [v] for a in axes}
    varied = [axis for axis in axes if len(values[axis]) > 1]
    for point in itertools.product(*values.values()):
        chosen = dict(zip(values, point, strict=True))
        suffix = "".join(f"-{LABELS[axis]}{chosen[axis]}" for axis in varied)
        yield replace(grid, **chosen, name=grid.name + suffix if grid.name else "")


LABELS = {
    "width": "w", "depth": "d", "experts": "e", "k": "k", "granularity": "g", "shared": "s", "expert_size": "h",
    "placement": "", "layers": "",
}  # fmt: skip


def _given(study: str, within: tuple[str, ...] = ()) -> tuple[DictConfig, str]:
    """What a study's file says on top of the one it is like, and the study's name."""
    text, name = _read(study)
    given = read_yaml(text, f"study {study}", StudyError)
    if not isinstance(given, DictConfig):
        raise StudyError(f"study {study}: expected a mapping of keys at the top, got {type(given).__name__}")
    like = given.pop(LIKE, None)
    if like is None:
        return given, name
    if not isinstance(like, str) or like in (*within, study):
        raise StudyError(f"study {study}: key '{LIKE}' got {like!r}, wanted the name or file of another study")
    other, _ = _given(like, (*within, study))
    added = given.pop("set", ListConfig([]))
    if not isinstance(added, ListConfig):
        raise StudyError(f"study {study}: key 'set' got {added!r}, wanted a list of changes to the recipe")
    return OmegaConf.merge(other, given, {"set": [*other.get("set", []), *added]}), name  # type: ignore[return-value]


def _read(study: str) -> tuple[str, str]:
    packaged = resources.files("vlmoe.recipes") / "study" / f"{study}.yaml"
    if "/" not in study and packaged.is_file():
        return packaged.read_text(encoding="utf-8"), study
    path = Path(home(study))
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except (OSError, UnicodeDecodeError) as error:
            raise StudyError(f"study {study}: cannot be read: {error}") from None
    names = study_names()
    close = difflib.get_close_matches(study, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise StudyError(f"no study '{study}': {hint}packaged studies are {', '.join(names)}; or give a .yaml file's path")


def _check_lengths(prefix: str, of: Study | Grid, need: Callable[[bool, str, Any, str], None]) -> None:
    for key in ("steps", "tokens_per_parameter"):
        lengths = getattr(of, key)
        need(all(length > 0 for length in lengths), prefix + key, lengths, "positive numbers")
    both = bool(of.steps and of.tokens_per_parameter)
    need(not both, f"{prefix}steps", of.steps, "none beside tokens_per_parameter, or the other way round")


def _check_worlds(study: Study, need: Callable[[bool, str, Any, str], None]) -> None:
    names = [world.name for world in study.worlds]
    plain = all(re.fullmatch(r"[\w.+-]+", name) for name in names) and len(set(names)) == len(names)
    need(plain, "worlds", names, "a different name for each, of letters, digits and ._+-")
    for i, world in enumerate(study.worlds):
        for key in ("concepts", "bits"):
            value = getattr(world, key)
            need(value is None or value > 0, f"worlds[{i}].{key}", value, "a positive number, or null")


def _check_seeds(key: str, seeds: list[int], need: Callable[[bool, str, Any, str], None]) -> None:
    for seed in seeds:
        need(0 <= seed < 1 << 63, key, seed, "whole numbers from 0 to below 2**63")


GROUPS: dict[str, Any] = {
    "dense": Grid, "sparse": Grid, "ablation": Grid, "sweep": Sweep, "downstream": Downstream, "budget": Budget,
    "worlds": World, "headline": Headline,
}  # fmt: skip


def _check_keys(given: Any, schema: type, prefix: str, origin: str) -> None:
    if not isinstance(given, dict):
        raise StudyError(f"study {origin}: key '{prefix.rstrip('.')}' got {given!r}, wanted a group of keys")
    known = [f.name for f in fields(schema)]
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known here: {', '.join(known)}"
            raise StudyError(f"study {origin}: unknown key '{prefix}{key}': {hint}")
        if key in GROUPS and value is not None and not (schema is Grid and key == "worlds"):
            for i, item in enumerate(value if isinstance(value, list) else [value]):
                _check_keys(item, GROUPS[key], f"{prefix}{key}{f'[{i}]' if isinstance(value, list) else ''}.", origin)


def _check(study: Study, origin: str) -> None:
    def need(ok: bool, key: str, value: Any, wanted: str) -> None:
        if not ok:
            raise StudyError(f"study {origin}: key '{key}' got {value!r}, wanted {wanted}")

    need(bool(study.dense), "dense", study.dense, "at least one dense model to compare with")
    need(study.equal in {"per_token", "total", "steps"}, "equal", study.equal, "per_token, total or steps")
    need(study.tolerance > 0, "tolerance", study.tolerance, "a share above 0, for example 0.05")
    need(bool(study.steps) != bool(study.tokens_per_parameter), "steps", study.steps,
         "run lengths, for example [300, 600, 1200], or else tokens_per_parameter")  # fmt: skip
    _check_lengths("", study, need)
    _check_worlds(study, need)
    share = study.decay_share
    need(share is None or 0 < share < 1, "decay_share", share, "a share between 0 and 1, for example 0.2, or null")
    need(bool(study.seeds), "seeds", study.seeds, "at least one seed")
    _check_seeds("seeds", study.seeds, need)
    need(study.expert_power >= 0, "expert_power", study.expert_power, "a number not below 0, for example 0.5")
    need(study.jobs >= 1, "jobs", study.jobs, "a positive number")
    for f in ("hours", "flops"):
        value = getattr(study.budget, f)
        need(value is None or value > 0, f"budget.{f}", value, "a positive number, or null for no limit")
    grids = [(f"{side}[{i}]", g) for side in ("dense", "sparse") for i, g in enumerate(getattr(study, side))]
    grids += [("ablation", study.ablation)] if study.ablation else []
    if study.sweep.rates:
        need(min(study.sweep.rates) > 0, "sweep.rates", study.sweep.rates, "positive learning rates")
        need(study.sweep.steps > 0, "sweep.steps", study.sweep.steps, "a positive number")
        grids += [("sweep.dense", study.sweep.dense), ("sweep.sparse", study.sweep.sparse)]
    _check_seeds("sweep.seeds", study.sweep.seeds, need)
    names = [world.name for world in study.worlds]
    for key, grid in grids:
        _check_seeds(f"{key}.seeds", grid.seeds, need)
        _check_lengths(f"{key}.", grid, need)
        need(set(grid.worlds) <= set(names), f"{key}.worlds", grid.worlds, f"names of the study's worlds: {names}")
        for one in members(grid):
            need(one.placement in PLACEMENTS, f"{key}.placement", one.placement, ", ".join(PLACEMENTS))
            need(one.expert_size == EQUAL or isinstance(one.expert_size, (int, float)), f"{key}.expert_size",
                 one.expert_size, f"a number, or '{EQUAL}'")  # fmt: skip
            for axis in ("width", "depth", "experts", "k", "granularity", "shared"):
                value = getattr(one, axis)
                whole = isinstance(value, int) and not isinstance(value, bool)
                need(whole or (value is None and axis in ("width", "depth")), f"{key}.{axis}", value, "a whole number")
    for task in study.downstream.tasks:
        need(task in TASKS, "downstream.tasks", task, ", ".join(TASKS))
