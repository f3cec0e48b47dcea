"""What a recipe may say, and what is refused before it is looked up or grows."""

import json
from pathlib import Path

import pytest

from vlmoe.config import RecipeError, UserError, from_mapping, home, init_of, load_finetune, load_recipe, override
from vlmoe.study.declare import load_study

SECRET = "hunter2-do-not-print"
LOOKED_UP = ["${oc.env:SECRET}", "a ${oc.env:SECRET} b", "${seed}", "${oc.decode:'1'}", "\\${seed}", "${", "${{}}"]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> object:
    monkeypatch.setenv("SECRET", SECRET)
    yield
    assert SECRET not in "".join(capfd.readouterr())


def refused(error: pytest.ExceptionInfo[UserError], *named: str) -> None:
    assert SECRET not in str(error.value)
    for name in (*named, "'${' is not read here"):
        assert name in str(error.value)


@pytest.mark.parametrize("value", LOOKED_UP)
def test_interpolation_is_refused_wherever_a_recipe_is_read(value: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    for key, text in {
        "about": f"about: {json.dumps(value)}",
        "run.dir": f"run: {{dir: {json.dumps(value)}}}",
        "data.sources[0].path": f"data: {{sources: [{{type: shards, path: {json.dumps(value)}}}]}}",
        "train.steps": f"train: {{steps: {json.dumps(value)}}}",
        "model": f"model: {json.dumps(value)}",
    }.items():
        file.write_text(text)
        with pytest.raises(RecipeError) as error:
            load_recipe(str(file))
        refused(error, str(file), key)
        with pytest.raises(RecipeError) as error:
            load_finetune("nli", str(file), load_recipe("demo"), "run")
        refused(error, str(file), key)
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", [f"about={value}"])
    refused(error, "about")
    with pytest.raises(RecipeError) as error:
        from_mapping({"about": value}, origin="config.json")
    refused(error, "config.json", "about")
    with pytest.raises(RecipeError) as error:
        override({"name": "x"}, [f"about={value}"], "study.json")
    refused(error, "about")
    with pytest.raises(RecipeError) as error:
        init_of("world", [f"init={value}"])
    refused(error, "init")
    with pytest.raises(RecipeError) as error:
        load_finetune("nli", "world", load_recipe("demo"), value)
    refused(error, "init")


@pytest.mark.parametrize("value", LOOKED_UP)
def test_interpolation_is_refused_in_studies(value: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    for key, text in {
        "about": f"about: {json.dumps(value)}",
        "set[0]": f"set: [{json.dumps(value)}]",
        "like": f"like: {json.dumps(value)}",
        "sparse[0].name": f"sparse: [{{name: {json.dumps(value)}}}]",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load_study(str(file))
        refused(error, str(file), key)
    with pytest.raises(UserError) as error:
        load_study("tiny", [f"about={value}"])
    refused(error, "about")


BOMB = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100000 values"),
        ("about: !!python/object/apply:os.getcwd []", "tag"),
        ("about: !name x", "line 1: tag '!name'"),
        ("about: *nothing", "alias '[*]nothing' stands for nothing"),
        ("about: &a [*a]", "alias '[*]a' stands for nothing"),
        ("about: " + "[" * 4000, "more than 50 levels"),
        ("about: " + "{a: " * 4000, "more than 50 levels"),
        ("a" * (1 << 21), "at most 1048576"),
        ("name: [", "not valid YAML"),
        ("- 1", "expected a mapping of keys at the top"),
        ("name: a\nname: b", "not valid YAML"),
        ("about: \x00", "not valid YAML"),
    ],
)
def test_yaml_that_is_large_or_strange(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    for read in (load_recipe, load_study):
        with pytest.raises(UserError, match=message) as error:
            read(str(file))
        assert str(file) in str(error.value)


def test_anchors_are_for_everyone(tmp_path: Path) -> None:
    file = tmp_path / "fine.yaml"
    file.write_text("model: {vision: &side {sparse: all, router: {k: 2}}, text: {<<: *side, experts: 4}}")
    model = load_recipe(str(file)).model
    assert (model.text.sparse, model.text.router.k, model.text.experts, model.vision.experts) == ("all", 2, 4, 8)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    sources = "data.sources=[{type: shards, kind: pair, path: '~/d/{0..3}.tar'}]"
    batch = ["data.batch.image=0", "data.batch.text=0"]
    tokenizers = ["data.text_tokenizer.path=~/t.json", "data.visual_tokenizer.path=~/v"]
    recipe = load_recipe("demo", ["run.dir=~/runs/x", "init=~/a", sources, *batch, *tokenizers])
    assert (recipe.run.dir, recipe.init) == ("/home/x/runs/x", "/home/x/a")
    assert recipe.data.sources[0].path == "/home/x/d/{0..3}.tar"
    assert recipe.data.text_tokenizer.path == "/home/x/t.json"
    assert recipe.data.visual_tokenizer.path == "/home/x/v"
    files = "{file: ~/q.json, annotations: ~/a.json, images: ~/i}"
    changes = [f"data.train={files}", f"data.eval=[{files}]", "data.type=files"]
    tuned = load_finetune("vqa", "base", load_recipe("demo"), "~/run", changes)
    for split in (tuned.data.train, tuned.data.eval[0]):
        assert (split.file, split.annotations, split.images) == ("/home/x/q.json", "/home/x/a.json", "/home/x/i")
    assert tuned.init == "/home/x/run"
    assert load_study("tiny", ["extends=~/s"]).extends == "/home/x/s"
    assert load_recipe("demo", ["about=~ is a tilde", "run.dir=a/~b"]).run.dir == "a/~b"
    with pytest.raises(RecipeError, match=r"key 'run.dir': ~nobody-here/x: there is no home folder ~nobody-here"):
        load_recipe("demo", ["run.dir=~nobody-here/x"])
    assert home("./~x") == "./~x"


@pytest.mark.parametrize("seed", [-1, 1 << 63, 10**40])
def test_seeds_out_of_range_are_named(seed: int) -> None:
    with pytest.raises(RecipeError, match=r"key 'seed' got .*wanted a whole number from 0 to below 2\*\*63"):
        load_recipe("demo", [f"seed={seed}"])
    with pytest.raises(RecipeError, match="key 'seed'"):
        load_finetune("nli", "world", load_recipe("demo"), "run", [f"seed={seed}"])
    for key in ("seeds", "sweep.seeds", "ablation.seeds"):
        with pytest.raises(UserError, match=f"key '{key}' got"):
            load_study("tiny", [f"{key}=[0,{seed}]", "sweep.rates=[1e-3]", "sweep.steps=1"])


def test_the_largest_seed() -> None:
    assert load_recipe("demo", [f"seed={(1 << 63) - 1}"]).seed == (1 << 63) - 1
