"""The recipe: one typed description of a run, read from YAML and command-line overrides.

A recipe is a tree of plain dataclasses. Reading is strict: an unknown key, a wrong type or an impossible value is a
`RecipeError` that names the key, what it got and what it wanted. Anyone may import this module; it imports nothing of
ours.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(ValueError):
    """Something a user can put right; the command line prints it as one line. Every error meant for users is one."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message names the key and what was expected."""


# --------------------------------------------------------------------------------------------------------------- model
@dataclass
class RouterConfig:
    """How tokens choose experts, and the losses that keep the choice healthy (see `vlmoe.moe.MoELayer`)."""

    k: int = 1
    renormalize: bool = False  # divide the k gates by their sum
    noise: float = 1.0  # std of the training noise on the logits, in units of 1/E (V-MoE: 1.0; 0 turns it off)
    capacity_factor: float | None = None  # None: dropless
    capacity_factor_eval: float | None = None
    priority: str = "batch"  # batch: largest gates keep their place; arrival: first come, first served
    balance: float = 0.01  # weight of the Switch/GShard balance loss
    importance: float = 0.0  # weight of V-MoE's importance loss
    load: float = 0.0  # weight of V-MoE's load loss
    z: float = 0.001  # weight of the router z-loss
    backend: str = "auto"  # auto, loop, padded, grouped


@dataclass
class ModalityConfig:
    """The feed-forward side of one modality."""

    sparse: str = "none"  # none, all, odd (every other block, starting with the second), even, last, or "1,3,5"
    experts: int = 8
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass
class ModelConfig:
    """The Multiway backbone. Sizes are the model's own; tokenizers must fit `vocabulary` and `codes`."""

    width: int = 192
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    activation: str = "gelu"  # gelu, relu, swiglu
    image_size: int = 48  # pixels, square
    patch: int = 8  # pixels, square
    max_text: int = 48  # tokens, with start and end
    vocabulary: int = 2048  # rows of the text embedding
    codes: int = 256  # visual vocabulary
    attention: str = "shared"  # shared (VLMo, VL-MoE) or split by modality (BEiT-3)
    vl_ffn: int = 2  # the top blocks in which a pair's tokens share one dense VL-FFN
    sub_ln: bool = False  # extra LayerNorm inside attention and feed-forward (Magneto, BEiT-3)
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0
    recompute: bool = False  # activation checkpointing, block by block
    vision: ModalityConfig = field(default_factory=ModalityConfig)
    text: ModalityConfig = field(default_factory=ModalityConfig)


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass
class WorldConfig:
    """The embedded world's dial: from a world a tiny model learns in minutes to one that keeps a large model busy."""

    image_size: int = 48  # pixels; set equal to model.image_size
    concepts: int = 40  # how many things can stand in a scene: ten handwritten digits first, then characters
    max_objects: int = 2  # 1 to 4 objects in a scene
    colours: int = 8
    languages: list[str] = field(default_factory=lambda: ["en"])
    captions_in_text: float = 0.5  # share of text-only samples that describe a scene nobody shows


@dataclass
class SourceConfig:
    """One source of samples. `kind` is what it yields: image, text or pair."""

    type: str = "world"  # world, shards, folder, parquet
    kind: str = "pair"  # image, text, pair
    path: str = ""  # shards: brace or glob pattern of .tar files; folder: directory; parquet: file or glob
    weight: float = 1.0
    image_column: str = "image"  # parquet
    text_column: str = "text"  # parquet, and the key in a shard's .json


@dataclass
class BatchConfig:
    """Samples of each kind in one micro-batch; 0 leaves the kind out."""

    image: int = 32
    text: int = 32
    pair: int = 64


@dataclass
class MaskingConfig:
    """Masked shares as published for BEiT-3."""

    text: float = 0.15  # of the tokens of text-only samples
    pair_text: float = 0.5  # of the tokens of a pair's text
    patches: float = 0.4  # of the patches, in blocks
    min_block: int = 2  # smallest block, in patches


@dataclass
class TextTokenizerConfig:
    type: str = "corpus"  # corpus (trained on the run's texts), hf (tokenizer.json), sentencepiece (.model)
    path: str = ""  # of the file for hf and sentencepiece
    samples: int = 20000  # texts that corpus training reads


@dataclass
class VisualTokenizerConfig:
    type: str = "vq"  # vq (trained on the run's images), codes (precomputed codes stored beside each image)
    path: str = ""  # a trained tokenizer's folder to reuse; empty: train one for the run
    dim: int = 16  # of a codebook vector
    width: int = 64
    steps: int = 600
    batch: int = 64
    lr: float = 2e-3


@dataclass
class DataConfig:
    sources: list[SourceConfig] = field(
        default_factory=lambda: [SourceConfig(kind="image"), SourceConfig(kind="text"), SourceConfig(kind="pair")]
    )
    world: WorldConfig = field(default_factory=WorldConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    visual_tokenizer: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)
    workers: int = 1
    max_bad_share: float = 0.01  # the run fails when more than this share of samples had to be skipped
    max_pixels: int = 64_000_000  # larger images are refused before they are decoded


# --------------------------------------------------------------------------------------------------------------- train
@dataclass
class TrainConfig:
    steps: int = 1000
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 100  # steps
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 3.0  # largest gradient norm; 0 turns clipping off
    accumulate: int = 1  # micro-batches in a step
    device: str = "auto"  # auto, cpu, cuda
    precision: str = "auto"  # auto: bf16 autocast on CUDA, fp32 elsewhere; or fp32, bf16
    compile: bool = False
    log_every: int = 1
    checkpoint_every: int = 500
    keep: int = 2  # newest checkpoints kept


@dataclass
class EvalConfig:
    samples: int = 512  # held-out samples of each split
    batch: int = 64
    pictures: int = 6  # completions shown beside their picture


@dataclass
class RunConfig:
    dir: str = ""  # the run's folder; running again with the same folder resumes. Empty: runs/NAME


@dataclass
class Recipe:
    name: str = ""
    about: str = ""  # what it is, its command, time, hardware and the score it reached
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# ------------------------------------------------------------------------------------------------------------- reading
def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    folder = resources.files("vlmoe.recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(recipe: str, overrides: list[str] | None = None) -> Recipe:
    """Read a packaged recipe by name or a YAML file by path, then apply `key=value` overrides.

    Raises:
        RecipeError: no such recipe, unreadable YAML, unknown key, wrong type or impossible value.
    """
    text, name = _read(recipe)
    try:
        given = OmegaConf.create(text)
    except Exception as error:  # the YAML parser's own errors carry line and column
        raise RecipeError(f"recipe {recipe}: not valid YAML: {error}") from None
    if not isinstance(given, DictConfig):
        raise RecipeError(f"recipe {recipe}: expected a mapping of keys at the top, got {type(given).__name__}")
    for override in overrides or []:
        key, sep, value = override.partition("=")
        if not sep or not key:
            raise RecipeError(f"override '{override}': expected key=value, for example train.steps=100")
        try:
            OmegaConf.update(given, key, OmegaConf.create(f"v: {value}").v if value else "", merge=True)
        except Exception as error:
            raise RecipeError(f"override '{override}': {_first_line(error)}") from None
    return from_mapping(OmegaConf.to_container(given), origin=recipe, name=name)  # type: ignore[arg-type]


def from_mapping(given: dict[str, Any], origin: str = "recipe", name: str = "") -> Recipe:
    """Build a recipe from plain nested dicts (YAML or JSON), as strictly as `load_recipe`."""
    _check_keys(given, Recipe, "", origin)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), given)
        recipe: Recipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_explain(error, given)}") from None
    recipe.name = recipe.name or name
    recipe.run.dir = recipe.run.dir or f"runs/{recipe.name or 'run'}"
    validate(recipe, origin)
    return recipe


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested dicts, fit for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(recipe))  # type: ignore[return-value]


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read(recipe: str) -> tuple[str, str]:
    packaged = resources.files("vlmoe.recipes") / f"{recipe}.yaml"
    if "/" not in recipe and packaged.is_file():
        return packaged.read_text(encoding="utf-8"), recipe
    path = Path(recipe)
    if path.is_dir() and (path / "recipe.yaml").is_file():  # a run's folder stands for the recipe it was made with
        path = path / "recipe.yaml"
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except FileNotFoundError:
            raise RecipeError(f"recipe {recipe}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {recipe}: cannot be read: {error}") from None
    close = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise RecipeError(
        f"no recipe '{recipe}': {hint}packaged recipes are {', '.join(recipe_names())}; or give a .yaml file's path"
    )


def _check_keys(given: Any, schema: type, prefix: str, origin: str) -> None:
    """Refuse unknown keys with the nearest known one; OmegaConf would only say that the key is not in the struct."""
    if not isinstance(given, dict):
        raise RecipeError(
            f"{origin}: key '{prefix.rstrip('.')}' got {given!r}, wanted a group of keys: "
            + ", ".join(f.name for f in fields(schema))
        )
    known = {f.name: _schema_of(f) for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            everywhere = {path.rsplit(".", 1)[-1]: path for path in known_keys()}
            close = difflib.get_close_matches(str(key), known, n=1)
            elsewhere = everywhere.get(str(key))
            if close:
                hint = f"did you mean '{prefix}{close[0]}'?"
            elif elsewhere:
                hint = f"did you mean '{elsewhere}'?"
            else:
                hint = f"known here: {', '.join(known)}"
            raise RecipeError(f"{origin}: unknown key '{prefix}{key}': {hint}")
        inner = known[key]
        if inner is not None and isinstance(value, list):
            for i, item in enumerate(value):
                _check_keys(item, inner, f"{prefix}{key}[{i}].", origin)
                _check_item(item, inner, f"{prefix}{key}[{i}].", origin)
        elif inner is not None:
            _check_keys(value, inner, f"{prefix}{key}.", origin)


def _check_item(item: dict[str, Any], schema: type, prefix: str, origin: str) -> None:
    """Types of one element of a list of groups: OmegaConf's own error would not say which element."""
    try:
        OmegaConf.merge(OmegaConf.structured(schema), item)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_explain(error, item, prefix)}") from None


def _schema_of(f: Any) -> type | None:
    """The dataclass below a field (a group, or a list of groups), or None for a plain value."""
    name = str(f.type)
    inner = globals().get(name.removeprefix("list[").removesuffix("]"))
    return inner if is_dataclass(inner) and isinstance(inner, type) else None


def known_keys(schema: type = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    keys: list[str] = []
    for f in fields(schema):
        inner = _schema_of(f)
        if inner is None or str(f.type).startswith("list["):
            keys.append(prefix + f.name)
        else:
            keys += known_keys(inner, f"{prefix}{f.name}.")
    return keys


def _explain(error: OmegaConfBaseException, given: dict[str, Any], prefix: str = "") -> str:
    key = str(error.full_key or error.key or "?")
    wanted = getattr(error.ref_type, "__name__", None) or str(error.ref_type or "another type")
    found = OmegaConf.select(OmegaConf.create(given), key, default=None) if key != "?" else None
    return f"key '{prefix}{key}' got {found!r}, wanted {_wanted(prefix + key) or wanted}"


def _wanted(key: str) -> str | None:
    """The declared type of a dotted key, in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    schema: type | None = Recipe
    declared = ""
    for part in key.replace("[", ".[").split("."):
        if part.startswith("[") or schema is None:
            continue
        match = next((f for f in fields(schema) if f.name == part), None)
        if match is None:
            return None
        declared, schema = str(match.type), _schema_of(match)
    base = declared.removesuffix(" | None")
    return words.get(base, base) + (" or null" if base != declared else "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---------------------------------------------------------------------------------------------------------- validation
def validate(recipe: Recipe, origin: str = "recipe") -> None:
    """Refuse values that have the right type and cannot work. Raises RecipeError naming the key."""

    def need(ok: bool, key: str, value: Any, wanted: str) -> None:
        if not ok:
            raise RecipeError(f"{origin}: key '{key}' got {value!r}, wanted {wanted}")

    m, d, t = recipe.model, recipe.data, recipe.train
    for key in ("width", "depth", "heads", "image_size", "patch", "max_text", "vocabulary", "codes"):
        need(getattr(m, key) > 0, f"model.{key}", getattr(m, key), "a positive number")
    need(m.width % m.heads == 0, "model.heads", m.heads, f"a divisor of model.width ({m.width})")
    need(m.image_size % m.patch == 0, "model.patch", m.patch, f"a divisor of model.image_size ({m.image_size})")
    need(m.attention in {"shared", "split"}, "model.attention", m.attention, "shared or split")
    need(m.activation in {"gelu", "relu", "swiglu"}, "model.activation", m.activation, "gelu, relu or swiglu")
    need(0 <= m.vl_ffn <= m.depth, "model.vl_ffn", m.vl_ffn, f"0 to model.depth ({m.depth})")
    need(0 <= m.drop_path < 1, "model.drop_path", m.drop_path, "a share from 0 to below 1")
    for name in ("vision", "text"):
        side: ModalityConfig = getattr(m, name)
        router, key = side.router, f"model.{name}.router"
        try:
            sparse_blocks(side.sparse, m.depth)
        except ValueError as error:
            raise RecipeError(f"{origin}: key 'model.{name}.sparse' got {side.sparse!r}, wanted {error}") from None
        need(side.experts > 0, f"model.{name}.experts", side.experts, "a positive number")
        need(1 <= router.k <= side.experts, f"{key}.k", router.k, f"1 to model.{name}.experts ({side.experts})")
        need(router.priority in {"batch", "arrival"}, f"{key}.priority", router.priority, "batch or arrival")
        backends = {"auto", "loop", "padded", "grouped"}
        need(router.backend in backends, f"{key}.backend", router.backend, "auto, loop, padded or grouped")
        for f in ("capacity_factor", "capacity_factor_eval"):
            value = getattr(router, f)
            need(value is None or value > 0, f"{key}.{f}", value, "a positive number, or null for dropless")
        for f in ("noise", "balance", "importance", "load", "z"):
            need(getattr(router, f) >= 0, f"{key}.{f}", getattr(router, f), "a number not below 0")
    for i, source in enumerate(d.sources):
        key = f"data.sources[{i}]"
        types = {"world", "shards", "folder", "parquet"}
        need(source.type in types, f"{key}.type", source.type, "world, shards, folder or parquet")
        need(source.kind in {"image", "text", "pair"}, f"{key}.kind", source.kind, "image, text or pair")
        need(source.type == "world" or bool(source.path), f"{key}.path", source.path, "the path of the data")
        need(source.weight > 0, f"{key}.weight", source.weight, "a positive number")
    kinds = {source.kind for source in d.sources}
    sizes = {kind: getattr(d.batch, kind) for kind in ("image", "text", "pair")}
    need(any(sizes.values()), "data.batch", sizes, "at least one kind above 0")
    for kind, size in sizes.items():
        need(size >= 0, f"data.batch.{kind}", size, "a number not below 0")
        need(size == 0 or kind in kinds, f"data.batch.{kind}", size, f"0, because data.sources has no {kind} source")
    if any(source.type == "world" for source in d.sources):
        need(
            d.world.image_size == m.image_size, "data.world.image_size", d.world.image_size,
            f"model.image_size ({m.image_size})",
        )  # fmt: skip
        need(1 <= d.world.max_objects <= 4, "data.world.max_objects", d.world.max_objects, "1 to 4")
    for f in ("text", "pair_text", "patches"):
        value = getattr(d.masking, f)
        need(0 < value < 1, f"data.masking.{f}", value, "a share between 0 and 1")
    need(0 <= d.max_bad_share <= 1, "data.max_bad_share", d.max_bad_share, "a share from 0 to 1")
    need(d.workers >= 0, "data.workers", d.workers, "a number not below 0")
    tok, vis = d.text_tokenizer, d.visual_tokenizer
    need(tok.type in {"corpus", "hf", "sentencepiece"}, "data.text_tokenizer.type", tok.type,
         "corpus, hf or sentencepiece")  # fmt: skip
    need(tok.type == "corpus" or bool(tok.path), "data.text_tokenizer.path", tok.path, "the tokenizer file's path")
    need(vis.type in {"vq", "codes"}, "data.visual_tokenizer.type", vis.type, "vq or codes")
    for f in ("steps", "log_every", "checkpoint_every", "keep", "accumulate"):
        need(getattr(t, f) > 0, f"train.{f}", getattr(t, f), "a positive number")
    need(t.lr > 0, "train.lr", t.lr, "a positive number")
    need(t.precision in {"auto", "fp32", "bf16"}, "train.precision", t.precision, "auto, fp32 or bf16")


def sparse_blocks(pattern: str, depth: int) -> frozenset[int]:
    """Block indices that a `sparse` pattern names. Raises ValueError saying what is accepted."""
    named = {
        "none": range(0),
        "all": range(depth),
        "odd": range(1, depth, 2),
        "even": range(0, depth, 2),
        "last": range(depth - 1, depth),
    }
    if pattern in named:
        return frozenset(named[pattern])
    wanted = f"{', '.join(named)} or block numbers below {depth} like '1,3'"
    try:
        blocks = frozenset(int(part) for part in pattern.split(","))
    except ValueError:
        raise ValueError(wanted) from None
    if not blocks or min(blocks) < 0 or max(blocks) >= depth:
        raise ValueError(wanted)
    return blocks
