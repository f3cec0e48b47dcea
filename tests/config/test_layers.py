"""A recipe on top of another: what it leaves out is the other's; what was meant for other data is not taken along."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmoe.cli import app
from vlmoe.config import RecipeError, from_mapping, load_finetune, load_recipe, override, recipe_names, to_mapping
from vlmoe.config.layers import read_layers, stack

MINE = "sources: [{kind: pair, type: folder, path: photos}]"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_what_is_left_out_is_the_other_recipes(tmp_path: Path) -> None:
    found = load_recipe(write(tmp_path / "mine.yaml", "like: demo\nmodel: {width: 64, vision: {experts: 4}}\n"))
    demo = load_recipe("demo")
    expected = to_mapping(demo) | {"name": "mine", "about": "", "run": {"dir": "runs/mine"}}
    expected["model"] |= {"width": 64}
    expected["model"]["vision"] |= {"experts": 4}
    assert to_mapping(found) == expected
    shown = CliRunner().invoke(app, ["recipe", "show", str(tmp_path / "mine.yaml"), "seed=3"]).output
    assert load_recipe(write(tmp_path / "shown.yaml", shown)) == load_recipe(str(tmp_path / "mine.yaml"), ["seed=3"])


def test_lists_are_replaced_and_overrides_come_last(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.yaml",
        "like: base_32e\ndata: {sources: [{kind: text, type: folder, path: x}]}\ntrain: {keep_at: [3]}\n",
    )
    found = load_recipe(path, ["train.keep_at=[5]", "model.depth=3"])
    assert [s.kind for s in found.data.sources] == ["text"]
    assert (found.train.keep_at, found.model.depth, found.model.width) == ([5], 3, 768)


def test_paths_start_from_the_file_that_names_them_and_runs_can_be_named(tmp_path: Path) -> None:
    write(tmp_path / "a" / "low.yaml", "like: demo\nseed: 5\ntrain: {steps: 7}\n")
    write(tmp_path / "a" / "runs" / "old" / "recipe.yaml", "like: ../../low.yaml\nname: old\nrun: {dir: runs/old}\n")
    found = load_recipe(write(tmp_path / "b" / "top.yaml", "like: ../a/runs/old\nseed: 6\n"))
    assert (found.seed, found.train.steps, found.model.width) == (6, 7, 128)
    assert (found.name, found.run.dir) == ("top", "runs/top")  # else it would train on in the other's folder


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"top": "like: demos"}, ["top.yaml", "'like'", "did you mean 'demo'"]),
        ({"top": "like: other.yaml"}, ["top.yaml", "'like'", "other.yaml: no such file"]),
        ({"top": "like: [demo]"}, ["top.yaml", "'like'", "['demo']", "name or file"]),
        ({"top": "like: ''"}, ["top.yaml", "'like'", "name or file"]),
        ({"top": "like: top.yaml"}, ["top.yaml", "'like' leads back"]),
        ({"top": "like: b.yaml", "b": "like: c.yaml", "c": "like: ./b.yaml"}, ["'like' leads back", "c.yaml -> "]),
        ({"top": "like: b.yaml", "b": "train: {stesp: 1}"}, ["b.yaml", "train.stesp", "did you mean 'train.steps'"]),
        ({"top": "like: b.yaml", "b": "train: {steps: many}"}, ["b.yaml", "train.steps", "a whole number"]),
        ({"top": "like: b.yaml", "b": "- a"}, ["b.yaml", "expected a mapping"]),
        ({"top": "model: {like: demo}"}, ["model.like"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_file_that_says_it(
    files: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    for name, text in files.items():
        write(tmp_path / f"{name}.yaml", text)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(tmp_path / "top.yaml"))
    for word in words:
        assert word in str(error.value)


def test_like_is_no_override() -> None:
    with pytest.raises(RecipeError, match="'like' is a key of a recipe's file"):
        load_recipe("demo", ["like=base_32e"])


# ------------------------------------------------------------------------------------------------------- batches
def sizes_of(recipe: str, *overrides: str) -> dict[str, int]:
    return vars(load_recipe(recipe, list(overrides)).data.batch)


def test_kinds_without_a_source_are_no_part_of_the_batch(tmp_path: Path) -> None:
    alone = write(tmp_path / "alone.yaml", f"data: {{{MINE}}}\n")
    assert sizes_of(alone) == {"image": 0, "text": 0, "pair": 64}
    like = write(tmp_path / "like.yaml", f"like: demo\ndata: {{{MINE}, batch: {{pair: 8}}}}\n")
    assert sizes_of(like) == {"image": 0, "text": 0, "pair": 8}
    assert sizes_of(write(tmp_path / "above.yaml", "like: like.yaml\nseed: 3\n")) == sizes_of(like)
    assert sizes_of("demo", "data.sources=[{kind: image}]") == {"image": 4, "text": 0, "pair": 0}
    assert sizes_of("demo", "data.sources.0.kind=text") == {"image": 4, "text": 4, "pair": 0}
    stored = to_mapping(load_recipe("demo"))
    assert vars(override(stored, ["data.sources=[{kind: pair}]"], "stored").data.batch)["text"] == 0
    assert sizes_of("demo") == {"image": 4, "text": 4, "pair": 64}


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (f"data: {{{MINE}, batch: {{text: 4}}}}", []),
        (f"like: demo\ndata: {{{MINE}, batch: {{text: 4}}}}", []),
        (f"like: demo\ndata: {{{MINE}}}", ["data.batch.text=4"]),
        (f"data: {{{MINE}, batch: {{text: 4}}}}", ["train.steps=3"]),
        ("like: demo", ["data.batch.text=4", "data.sources=[{kind: pair}]"]),
        ("like: demo", ["data={sources: [{kind: pair}], batch: {text: 4}}"]),
    ],
)
def test_a_batch_that_the_user_asked_for_without_a_source_is_refused(
    text: str, overrides: list[str], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"'data\.batch\.text' got 4, wanted 0, because data\.sources has no text"):
        load_recipe(write(tmp_path / "mine.yaml", text), overrides)


@pytest.mark.parametrize(
    "word", ["data=3", "data.sources=3", "data.sources=[3]", "data.batch=3", "data.sources=[{kind: [a]}]"]
)
def test_nonsense_in_overrides_is_still_named(word: str) -> None:
    with pytest.raises(RecipeError, match="data"):
        load_recipe("demo", [word])


# -------------------------------------------------------------------------------------------------------- experts
def test_a_recipe_that_says_nothing_of_experts_is_sparse(tmp_path: Path) -> None:
    found = load_recipe(write(tmp_path / "mine.yaml", "train: {steps: 3}\n"))
    assert (found.model.vision.sparse, found.model.text.sparse, found.model.text.experts) == ("odd", "odd", 8)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_say_themselves_where_they_are_sparse(name: str) -> None:
    said = stack(read_layers(name)[0]).model
    assert said.vision.sparse == said.text.sparse
    assert (said.vision.sparse == "none") == ("dense" in name)


def test_stored_recipes_say_every_key_and_stay_what_they_were() -> None:
    stored = json.loads(json.dumps(to_mapping(load_recipe("base_dense"))))
    assert stored["model"]["vision"]["sparse"] == "none"
    assert from_mapping(stored) == load_recipe("base_dense")
    results = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*/study.json"))
    assert results
    for file in results:
        for side in ("vision", "text"):
            assert "sparse" in json.loads(file.read_text())["recipe"]["model"][side], file


# ----------------------------------------------------------------------------------------------------- fine-tuning
def test_fine_tuning_recipes_inherit_task_by_task(tmp_path: Path) -> None:
    start = load_recipe("characters")
    world = load_finetune("vqa", "world", start, "runs/characters")
    path = write(tmp_path / "mine.yaml", "like: world\ntrain: {lr: 0.5}\ntasks: {nli: {train: {lr: 0.25}}, vqa: {}}\n")
    mine = {task: load_finetune(task, path, start, "runs/characters") for task in ("vqa", "nli")}
    assert (mine["vqa"].train.lr, mine["nli"].train.lr) == (0.5, 0.25)
    assert mine["vqa"].eval == world.eval
    with pytest.raises(RecipeError, match="no recipe 'worlds': did you mean 'world'"):
        load_finetune("vqa", write(tmp_path / "bad.yaml", "like: worlds\n"), start, "")
    with pytest.raises(RecipeError, match=r"bad\.yaml: tasks\.vqa: unknown key 'train\.rl'"):
        load_finetune("vqa", write(tmp_path / "bad.yaml", "like: world\ntasks: {vqa: {train: {rl: 1}}}\n"), start, "")
    with pytest.raises(RecipeError, match=r"key 'tasks\.vqa' got 3, wanted a group of keys"):
        load_finetune("vqa", write(tmp_path / "bad.yaml", "tasks: {vqa: 3}\n"), start, "")
