"""Values that have the right type and cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmoe.config.finetune import TASKS, FinetuneRecipe
from vlmoe.config.schema import (
    LEAST_BYTE_VOCABULARY,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    Recipe,
    RecipeError,
    SourceConfig,
    TrainConfig,
    WorldConfig,
    sparse_blocks,
)

Need = Callable[[bool, str, Any, str], None]
LEAST_CELL = 12  # pixels along the edge of a cell of the world's grid


def validate(recipe: Recipe | FinetuneRecipe, origin: str = "recipe") -> None:
    """Refuse values that have the right type and cannot work. Raises RecipeError naming the key."""

    def need(ok: bool, key: str, value: Any, wanted: str) -> None:
        if not ok:
            raise RecipeError(f"{origin}: key '{key}' got {value!r}, wanted {wanted}")

    need(0 <= recipe.seed < 1 << 63, "seed", recipe.seed, "a whole number from 0 to below 2**63")
    _model(recipe.model, need)
    _train(recipe.train, need)
    if isinstance(recipe, FinetuneRecipe):
        _finetune(recipe, need)
    else:
        _data(recipe.data, recipe.model, need)
        for f in ("samples", "batch"):
            need(getattr(recipe.eval, f) > 1, f"eval.{f}", getattr(recipe.eval, f), "at least 2")
        need(recipe.eval.every >= 0, "eval.every", recipe.eval.every, "a number of steps, or 0 for never")


def _model(m: ModelConfig, need: Need) -> None:
    for key in ("width", "depth", "heads", "image_size", "patch", "max_text", "vocabulary", "codes"):
        need(getattr(m, key) > 0, f"model.{key}", getattr(m, key), "a positive number")
    need(m.width % m.heads == 0, "model.heads", m.heads, f"a divisor of model.width ({m.width})")
    need(m.image_size % m.patch == 0, "model.patch", m.patch, f"a divisor of model.image_size ({m.image_size})")
    need(m.patch_stem in {"linear", "conv"}, "model.patch_stem", m.patch_stem, "linear or conv")
    need(m.stem_channels > 0, "model.stem_channels", m.stem_channels, "a positive number")
    need(m.attention in {"shared", "split"}, "model.attention", m.attention, "shared or split")
    need(m.activation in {"gelu", "relu", "swiglu"}, "model.activation", m.activation, "gelu, relu or swiglu")
    need(0 <= m.vl_ffn <= m.depth, "model.vl_ffn", m.vl_ffn, f"0 to model.depth ({m.depth})")
    need(0 <= m.drop_path < 1, "model.drop_path", m.drop_path, "a share from 0 to below 1")
    need(m.common_experts >= 0, "model.common_experts", m.common_experts, "a number not below 0")
    alike = all(getattr(m.vision, f) == getattr(m.text, f) for f in ("granularity", "expert_size"))
    need(m.common_experts == 0 or alike, "model.common_experts", m.common_experts,
         "0, because experts of different granularity or size cannot be common")  # fmt: skip
    for name, side in (("vision", m.vision), ("text", m.text)):
        router, key = side.router, f"model.{name}.router"
        try:
            sparse_blocks(side.sparse, m.depth)
        except ValueError as error:
            need(False, f"model.{name}.sparse", side.sparse, str(error))
        need(side.experts > 0, f"model.{name}.experts", side.experts, "a positive number")
        need(0 <= side.expert_dropout < 1, f"model.{name}.expert_dropout", side.expert_dropout, "from 0 to below 1")
        for f in ("granularity", "shared_experts"):
            low = 1 if f == "granularity" else 0
            need(getattr(side, f) >= low, f"model.{name}.{f}", getattr(side, f), f"a number not below {low}")
        need(side.expert_size > 0, f"model.{name}.expert_size", side.expert_size, "a positive number")
        m_, hidden = side.granularity, round(int(m.width * m.mlp_ratio) * side.expert_size)
        need(hidden > 0 and hidden % m_ == 0, f"model.{name}.granularity", m_,
             f"a divisor of the hidden size ({hidden})")  # fmt: skip
        types = ("softmax", "sigmoid", "cosine", "expert_choice", "hash", "soft")
        need(router.type in types, f"{key}.type", router.type, ", ".join(types))
        need(1 <= router.k <= side.experts + m.common_experts, f"{key}.k", router.k,
             f"1 to model.{name}.experts ({side.experts})")  # fmt: skip
        alone = router.k * m_ == 1 and router.type in ("softmax", "sigmoid", "cosine") and side.sparse != "none"
        need(not (alone and router.renormalize), f"{key}.renormalize", router.renormalize,
             f"false, because a token takes one expert ({key}.k times granularity is 1): one gate divided by itself is "
             "1 whatever the router says, so the router would get no gradient from the task")  # fmt: skip
        need(router.slots >= 1, f"{key}.slots", router.slots, "a positive number")
        scopes = ("pass", "micro", "step", "global")
        need(router.balance_over in scopes, f"{key}.balance_over", router.balance_over, ", ".join(scopes))
        limit = (side.experts + m.common_experts) * m_
        need(router.global_experts is None or 1 <= router.global_experts <= limit, f"{key}.global_experts",
             router.global_experts, f"1 to the number of experts ({limit}), or null for all")  # fmt: skip
        need(not (m.common_experts and router.type == "soft"), "model.common_experts", m.common_experts,
             "0, because soft routing mixes within a modality")  # fmt: skip
        priorities = ("batch", "arrival", "first_batch", "first_arrival")
        need(router.priority in priorities, f"{key}.priority", router.priority, ", ".join(priorities))
        backends = {"auto", "loop", "padded", "grouped"}
        need(router.backend in backends, f"{key}.backend", router.backend, "auto, loop, padded or grouped")
        for f in ("capacity_factor", "capacity_factor_eval"):
            value = getattr(router, f)
            need(value is None or value > 0, f"{key}.{f}", value, "a positive number, or null for dropless")
        for f in ("noise", "balance", "importance", "load", "z", "local_entropy", "global_entropy", "bias_rate"):
            need(getattr(router, f) >= 0, f"{key}.{f}", getattr(router, f), "a number not below 0")
        need(router.load == 0 or router.noise > 0, f"{key}.noise", router.noise,
             f"a number above 0, because the load loss ({key}.load) is defined by the noise")  # fmt: skip


def _data(d: DataConfig, m: ModelConfig, need: Need) -> None:
    for i, source in enumerate(d.sources):
        key = f"data.sources[{i}]"
        types = {"world", "shards", "folder", "parquet", "arrow"}
        need(source.type in types, f"{key}.type", source.type, "world, shards, folder, parquet or arrow")
        need(source.kind in {"image", "text", "pair"}, f"{key}.kind", source.kind, "image, text or pair")
        need(source.type == "world" or bool(source.path), f"{key}.path", source.path, "the path of the data")
        need(source.weight > 0, f"{key}.weight", source.weight, "a positive number")
        need(source.turns in {"answer", "all"}, f"{key}.turns", source.turns, "answer or all")
        _reading(source, key, need)
    _held_out(d, need)
    for f in ("readers", "buffer", "attempts"):
        need(getattr(d.stream, f) > 0, f"data.stream.{f}", getattr(d.stream, f), "a positive number")
    need(d.stream.cache_gb >= 0, "data.stream.cache_gb", d.stream.cache_gb, "a number not below 0")
    kinds = {source.kind for source in d.sources}
    sizes = {kind: getattr(d.batch, kind) for kind in ("image", "text", "pair")}
    need(any(sizes.values()), "data.batch", sizes, "at least one kind above 0")
    for kind, size in sizes.items():
        need(size >= 0, f"data.batch.{kind}", size, "a number not below 0")
        need(size == 0 or kind in kinds, f"data.batch.{kind}", size, f"0, because data.sources has no {kind} source")
    if any(source.type == "world" for source in d.sources):
        _world(d.world, m, need)
    for f in ("text", "pair_text"):
        value = getattr(d.masking, f)
        need(0 < value <= 1, f"data.masking.{f}", value, "a share above 0 and up to 1")
    need(0 < d.masking.patches < 1, "data.masking.patches", d.masking.patches, "a share between 0 and 1")
    need(
        0 <= d.masking.pair_patches < 1,
        "data.masking.pair_patches",
        d.masking.pair_patches,
        "a share from 0 to below 1",
    )
    shown = [s.type for s in d.sources if s.kind != "text" and sizes[s.kind]]
    _augment(d.augment, "world" in shown, need)
    need(not d.augment.on or d.visual_tokenizer.type != "codes", "data.augment", _changed(d.augment),
         "nothing, because stored visual codes belong to the images as they are")  # fmt: skip
    need(0 <= d.max_bad_share <= 1, "data.max_bad_share", d.max_bad_share, "a share from 0 to 1")
    need(d.workers >= 0, "data.workers", d.workers, "a number not below 0")
    tok, vis = d.text_tokenizer, d.visual_tokenizer
    need(tok.type in {"corpus", "hf", "sentencepiece"}, "data.text_tokenizer.type", tok.type,
         "corpus, hf or sentencepiece")  # fmt: skip
    need(tok.type == "corpus" or bool(tok.path), "data.text_tokenizer.path", tok.path,
         "the tokenizer's file, folder, or name on the hub")  # fmt: skip
    need(not tok.byte_fallback or tok.type == "corpus", "data.text_tokenizer.byte_fallback", tok.byte_fallback,
         "false, because a tokenizer that is there already has its own rule")  # fmt: skip
    need(not tok.byte_fallback or m.vocabulary >= LEAST_BYTE_VOCABULARY, "model.vocabulary", m.vocabulary,
         f"at least {LEAST_BYTE_VOCABULARY}, because data.text_tokenizer.byte_fallback takes 256")  # fmt: skip
    for f in ("dim", "width", "steps", "batch"):
        need(getattr(vis, f) > 0, f"data.visual_tokenizer.{f}", getattr(vis, f), "a positive number")
    need(vis.type in {"vq", "codes"}, "data.visual_tokenizer.type", vis.type, "vq or codes")


def _augment(a: AugmentConfig, world: bool, need: Need) -> None:
    need(a.crop is None or 0 < a.crop <= 1, "data.augment.crop", a.crop, "a share above 0 and up to 1, or null")
    need(a.ratio >= 1, "data.augment.ratio", a.ratio, "a number not below 1")
    for f in ("brightness", "contrast", "saturation", "flip"):
        need(0 <= getattr(a, f) <= 1, f"data.augment.{f}", getattr(a, f), "a number from 0 to 1")
    need(0 <= a.hue <= 0.5, "data.augment.hue", a.hue, "a number from 0 to 0.5")
    need(not (world and a.on), "data.augment", _changed(a),
         "nothing, because captions and questions of the embedded world state places and colours")  # fmt: skip


def _changed(a: AugmentConfig) -> dict[str, Any]:
    return {f: getattr(a, f) for f in vars(a) if getattr(a, f) != getattr(AugmentConfig, f)}


def _reading(source: SourceConfig, key: str, need: Need) -> None:
    need(source.read in {"random", "stream", "resample"}, f"{key}.read", source.read, "random, stream or resample")
    need(source.read == "random" or source.type in {"shards", "parquet"}, f"{key}.read", source.read,
         f"random, because {source.type} is not read as a stream")  # fmt: skip
    weights = source.shard_weights
    need(not weights or source.read == "resample", f"{key}.shard_weights", weights,
         f"none, because with `read: {source.read}` each shard comes as often as any other")  # fmt: skip
    need(all(0 <= weight < float("inf") for weight in weights.values()), f"{key}.shard_weights", weights,
         "numbers not below 0")  # fmt: skip


def _held_out(d: DataConfig, need: Need) -> None:
    """What each source holds out, and that each kind has something to train on and something to be scored on."""
    shares: dict[tuple[str, str], float] = {}
    for i, source in enumerate(d.sources):
        key, share = f"data.sources[{i}].held_out", source.held_out
        need(0 <= share <= 1, key, share, "a share from 0 to 1")
        if source.type == "world":
            need(share == 0.01, key, share, "nothing, because the world makes its held-out samples")
        first = shares.setdefault((source.type, source.path), share)
        need(share == first, key, share, f"{first}, as another source of the same files has")
    for kind in ("image", "text", "pair"):
        of_kind = [s.held_out if s.type != "world" else 0.01 for s in d.sources if s.kind == kind]
        if of_kind and getattr(d.batch, kind):
            need(min(of_kind) < 1, f"data.batch.{kind}", getattr(d.batch, kind),
                 f"0, because all {kind} sources are held out (held_out: 1)")  # fmt: skip
            need(max(of_kind) > 0, f"data.batch.{kind}", getattr(d.batch, kind),
                 f"0, because no {kind} source holds samples out to score the run on: held_out above 0, or a source "
                 "with held_out: 1")  # fmt: skip


def _world(world: WorldConfig, m: ModelConfig, need: Need) -> None:
    need(
        world.image_size == m.image_size, "data.world.image_size", world.image_size,
        f"model.image_size ({m.image_size})",
    )  # fmt: skip
    check_scenes(world, need)
    for f in ("concepts", "icons", "facts"):
        need(getattr(world, f) >= 0, f"data.world.{f}", getattr(world, f), "a number not below 0")
    need(world.concepts + world.icons > 0, "data.world.concepts", world.concepts, "at least 1 where icons is 0")


def check_scenes(world: WorldConfig, need: Need) -> None:
    """What a world's scenes can be like."""
    need(world.grid in {1, 2, 3}, "data.world.grid", world.grid, "1, 2 or 3")
    least = LEAST_CELL * world.grid
    wanted = f"at least {least} pixels where grid is {world.grid}: smaller glyphs are illegible"
    need(world.image_size >= least, "data.world.image_size", world.image_size, wanted)
    most = min(4, world.grid**2)
    wanted = f"1 to {most} where grid is {world.grid}"
    need(1 <= world.max_objects <= most, "data.world.max_objects", world.max_objects, wanted)
    forms = {"sentences", "names", "codes"}
    need(world.captions in forms, "data.world.captions", world.captions, "sentences, names or codes")
    wanted = "a share from 0 to below 1"
    held_out = world.held_out_scenes
    need(0 <= held_out < 1, "data.world.held_out_scenes", held_out, wanted)
    several = f"sentences: there are up to {world.max_objects} objects (data.world.max_objects)"
    need(world.captions == "sentences" or world.max_objects == 1, "data.world.captions", world.captions, several)


def _train(t: TrainConfig, need: Need) -> None:
    for f in ("steps", "log_every", "checkpoint_every", "keep", "accumulate"):
        need(getattr(t, f) > 0, f"train.{f}", getattr(t, f), "a positive number")
    need(all(step > 0 for step in t.keep_at), "train.keep_at", t.keep_at, "a list of steps, for example [800, 1600]")
    for f in ("lr", "expert_lr", "router_lr"):
        need(getattr(t, f) > 0, f"train.{f}", getattr(t, f), "a positive number")
    wanted = "a positive number, or null for width over inputs"
    need(t.patch_lr is None or t.patch_lr > 0, "train.patch_lr", t.patch_lr, wanted)
    for f in ("min_lr", "warmup", "clip", "weight_decay"):
        need(getattr(t, f) >= 0, f"train.{f}", getattr(t, f), "a number not below 0")
    need(t.schedule in {"cosine", "constant_decay"}, "train.schedule", t.schedule, "cosine or constant_decay")
    room = max(0, t.steps - t.warmup)
    need(t.schedule == "cosine" or 0 < t.decay_steps <= room, "train.decay_steps", t.decay_steps,
         f"1 to the steps after the warm-up ({room})")  # fmt: skip
    for f in ("beta1", "beta2"):
        need(0 <= getattr(t, f) < 1, f"train.{f}", getattr(t, f), "a number from 0 to below 1")
    g = t.guard
    for f in ("every", "patience", "dead_after"):
        need(getattr(g, f) > 0, f"train.guard.{f}", getattr(g, f), "a positive number of steps")
    need(g.max_roll_backs >= 0, "train.guard.max_roll_backs", g.max_roll_backs, "a number not below 0")
    need(g.spike > 0, "train.guard.spike", g.spike, "a positive number")
    need(0 < g.collapse <= 1, "train.guard.collapse", g.collapse, "a share above 0, at most 1")
    need(g.max_pressure >= 1, "train.guard.max_pressure", g.max_pressure, "a number not below 1")
    need(t.watch_every >= 0, "train.watch_every", t.watch_every, "a number of steps, or 0 for never")
    need(t.precision in {"auto", "fp32", "bf16"}, "train.precision", t.precision, "auto, fp32 or bf16")


def _finetune(recipe: FinetuneRecipe, need: Need) -> None:
    d, s, t, c = recipe.data, recipe.sparse, recipe.train, recipe.caption
    need(recipe.task in TASKS, "task", recipe.task, ", ".join(TASKS))
    need(d.type in {"world", "files"}, "data.type", d.type, "world or files")
    _augment(d.augment, d.type == "world", need)
    if d.type == "world":
        _world(d.world, recipe.model, need)
    else:
        need(bool(d.train.file), "data.train.file", d.train.file, "the training examples' file")
        need(bool(d.eval), "data.eval", d.eval, "a list of splits to evaluate, the first to stop by")
        for i, files in enumerate(d.eval):
            need(bool(files.file), f"data.eval[{i}].file", files.file, "the split's file")
        names = [files.name or "val" for files in d.eval]
        need(len(set(names)) == len(names), "data.eval", names, "a different name for each split")
    blind = {"none", "text"} if recipe.task == "nli" else {"none", "image", "text"}
    if recipe.task in {"classify", "retrieval"}:
        blind = {"none"}
    if recipe.task == "caption":
        blind = {"none", "image"}
    need(d.blind in blind, "data.blind", d.blind, f"{' or '.join(sorted(blind))} for {recipe.task}")
    need(d.limit is None or d.limit > 0, "data.limit", d.limit, "a positive number, or null for all")
    for f in ("answers", "batch"):
        need(getattr(d, f) > 0, f"data.{f}", getattr(d, f), "a positive number")
    need(d.workers >= 0, "data.workers", d.workers, "a number not below 0")
    need(0 <= d.max_bad_share <= 1, "data.max_bad_share", d.max_bad_share, "a share from 0 to 1")
    policies = ("all", "freeze_routers", "freeze_experts", "experts_only")
    need(s.train in policies, "sparse.train", s.train, ", ".join(policies))
    for f in ("epochs", "warmup_epochs"):
        value = getattr(t, f)
        need(value is None or value > 0, f"train.{f}", value, "a positive number, or null")
    need(0 < t.layer_decay <= 1, "train.layer_decay", t.layer_decay, "a number above 0, up to 1")
    need(t.head_lr > 0, "train.head_lr", t.head_lr, "a positive number")
    for f in ("validate_every", "patience"):
        need(getattr(t, f) >= 0, f"train.{f}", getattr(t, f), "a number not below 0")
    for f in ("samples", "validate", "batch"):
        need(getattr(recipe.eval, f) > 0, f"eval.{f}", getattr(recipe.eval, f), "a positive number")
    need(0 < c.mask < 1, "caption.mask", c.mask, "a share between 0 and 1")
    need(c.beam > 0, "caption.beam", c.beam, "a positive number")
    room = recipe.model.max_text - 2
    need(0 <= c.max_length <= room, "caption.max_length", c.max_length, f"0 to model.max_text - 2 ({room})")
    need(0 <= c.min_length <= room, "caption.min_length", c.min_length, f"0 to model.max_text - 2 ({room})")
