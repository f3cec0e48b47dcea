"""Recipes are read strictly: every mistake is an error that names the key, what it got and what it wanted."""

from pathlib import Path

import pytest

from vlmoe.config import (
    Recipe,
    RecipeError,
    flat,
    from_mapping,
    known_keys,
    load_recipe,
    recipe_names,
    sparse_blocks,
    to_mapping,
    to_yaml,
    with_later_keys,
)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_say_what_they_are(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert "Command: vlmoe pretrain" in recipe.about
    assert recipe.run.dir == f"runs/{name}"


def test_the_papers_recipes_are_packaged() -> None:
    assert {"demo", "base_32e", "base_dense", "large_dense"} <= set(recipe_names())


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"train": {"stesp": 3}}, ["train.stesp", "did you mean 'train.steps'"]),
        ({"steps": 3}, ["'steps'", "did you mean 'train.steps'"]),
        ({"model": {"vision": {"router": {"capacity": 1.0}}}}, ["model.vision.router.capacity", "capacity_factor"]),
        ({"data": {"sources": [{"kin": "pair"}]}}, ["data.sources[0].kin", "data.sources[0].kind"]),
        ({"data": {"sources": [{"weight": "heavy"}]}}, ["data.sources[0].weight", "'heavy'", "a number"]),
        ({"train": {"steps": "many"}}, ["train.steps", "'many'", "a whole number"]),
        ({"train": {"steps": 1.5}}, ["train.steps", "1.5", "a whole number"]),
        ({"train": {"compile": "perhaps"}}, ["train.compile", "'perhaps'", "true or false"]),
        ({"model": 3}, ["'model'", "got 3", "a group of keys"]),
        ({"data": {"sources": 3}}, ["data.sources", "got 3"]),
        ({"model": {"heads": 5}}, ["model.heads", "got 5", "a divisor of model.width"]),
        ({"model": {"vision": {"sparse": "some"}}}, ["model.vision.sparse", "'some'", "odd"]),
        ({"model": {"vision": {"sparse": "1,9"}}}, ["model.vision.sparse", "below 6"]),
        ({"model": {"text": {"router": {"k": 9}}}}, ["model.text.router.k", "got 9", "1 to model.text.experts (8)"]),
        ({"data": {"batch": {"image": 0, "text": 0, "pair": 0}}}, ["data.batch", "at least one kind"]),
        ({"data": {"sources": [{"kind": "pair"}], "batch": {"image": 4}}}, ["data.batch.image", "no image source"]),
        ({"data": {"sources": [{"type": "shards", "kind": "pair"}]}}, ["data.sources[0].path"]),
        ({"model": {"text": {"router": {"load": 0.1, "noise": 0}}}}, ["model.text.router.noise", "load loss"]),
        ({"train": {"warmup": -1}}, ["train.warmup", "got -1", "not below 0"]),
        ({"eval": {"samples": 0}}, ["eval.samples", "at least 2"]),
        ({"data": {"masking": {"patches": 1.0}}}, ["data.masking.patches", "between 0 and 1"]),
    ],
)
def test_a_mistake_is_named(mistake: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        from_mapping(mistake)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "cosine"])
def test_one_expert_a_token_with_renormalised_gates_is_refused(side: str, router: str) -> None:
    gates = {"type": router, "k": 1, "renormalize": True}
    base = {"sparse": "odd", "router": gates}
    with pytest.raises(RecipeError, match=rf"key 'model\.{side}\.router\.renormalize' got True, wanted false, because"):
        from_mapping({"model": {side: base}})
    from_mapping({"model": {side: base | {"granularity": 2}}})
    from_mapping({"model": {side: base | {"sparse": "none"}}})
    for key, value in {"type": "hash", "k": 2, "renormalize": False}.items():
        from_mapping({"model": {side: base | {"router": gates | {key: value}}}})
    for other in ("expert_choice", "soft"):
        from_mapping({"model": {side: base | {"router": gates | {"type": other}}}})


def test_overrides_reach_any_depth_and_are_checked() -> None:
    recipe = load_recipe("demo", ["train.steps=7", "model.vision.router.capacity_factor=1.25", "run.dir=out/x"])
    assert (recipe.train.steps, recipe.model.vision.router.capacity_factor, recipe.run.dir) == (7, 1.25, "out/x")
    assert load_recipe("demo", ["model.vision.router.capacity_factor=null"]).model.vision.router.capacity_factor is None
    assert load_recipe("demo", ["data.sources.0.weight=3"]).data.sources[0].weight == 3
    with pytest.raises(RecipeError, match=r"did you mean 'train\.steps'"):
        load_recipe("demo", ["train.step=7"])
    with pytest.raises(RecipeError, match="expected key=value"):
        load_recipe("demo", ["--steps"])


def test_recipe_by_path_and_by_wrong_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 3}\n")
    assert load_recipe(str(path)).train.steps == 3
    with pytest.raises(RecipeError, match="did you mean 'base_dense'"):
        load_recipe("base_dens")
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path / "other.yaml"))
    path.write_text("train: [1, 2\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: not valid YAML"):
        load_recipe(str(path))
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="expected a mapping"):
        load_recipe(str(path))


def test_a_recipe_survives_yaml_and_json(tmp_path: Path) -> None:
    recipe = load_recipe("base_32e", ["seed=5"])
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(str(path)) == recipe
    assert from_mapping(to_mapping(recipe)) == recipe
    assert load_recipe(str(tmp_path)) == recipe  # a run's folder stands for its recipe


def test_recipes_share_no_value_that_can_change() -> None:
    """Defaults are made once; what a run does to its recipe, or to the mapping it writes, stays there."""
    first, mapping = from_mapping({}), to_mapping(from_mapping({}))
    for recipe in (first, from_mapping(mapping)):
        recipe.model.vision.router.k = 7
        recipe.data.sources[0].shard_weights["a"] = 1.0
        recipe.data.sources.append(recipe.data.sources[0])
        recipe.data.masking.words.append("red")
    written = to_mapping(first)
    written["train"]["keep_at"].append(3)
    assert first.train.keep_at == []
    assert to_mapping(from_mapping({})) == mapping


def test_known_keys_are_the_dataclass_tree() -> None:
    keys = known_keys()
    assert {"run.dir", "train.steps", "train.checkpoint_every", "seed", "model.text.router.z"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert isinstance(Recipe().data.batch.pair, int)


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [("none", set()), ("all", {0, 1, 2, 3}), ("odd", {1, 3}), ("even", {0, 2}), ("last", {3}), ("0,2", {0, 2})],
)
def test_sparse_blocks(pattern: str, blocks: set[int]) -> None:
    assert sparse_blocks(pattern, 4) == blocks


def test_sources_of_before_a_key_was_there_are_as_they_were() -> None:
    now = {"data.sources[0].kind": "pair", "data.sources[0].turns": "answer", "data.sources[0].held_out": 0.01}
    now |= {"data.sources[0].read": "random", "data.sources[0].shard_weights": {}, "data.stream.readers": 8}
    then = {"data.sources[0].kind": "pair"}
    assert with_later_keys(then, now) == now
    later = {"kind": "pair", "turns": "answer", "held_out": 0.01, "images": "", "read": "random", "shard_weights": {}}
    as_lists = with_later_keys({"data.sources": [{"kind": "pair"}]}, {"data.sources": []})
    assert as_lists["data.sources"] == [later]
    assert with_later_keys({"r.data.sources": [{"kind": "pair"}]}, {}, "r.") == {"r.data.sources": [later]}
    changed = with_later_keys({"data.sources[0].turns": "all"}, now)
    assert changed["data.sources[0].turns"] == "all"


def test_recipes_stored_before_images_could_be_changed_and_bytes_be_tokens_change_neither() -> None:
    now = flat(to_mapping(Recipe()))
    new = ("data.augment.", "data.text_tokenizer.byte_fallback")
    then = {key: value for key, value in now.items() if not key.startswith(new)}
    assert len(then) == len(now) - 8
    assert with_later_keys(then, now) == now
