"""A model folder that is not as it was written does not load, or loads the very same model."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import vlmoe
from tests.tasks.world import built, pretraining, recipe
from vlmoe.config import UserError, read_sealed
from vlmoe.data.text_tokenizer import train_wordpiece
from vlmoe.data.visual_tokenizer import VQTokenizer
from vlmoe.tasks.export import Finetuned, ModelFileError, Pretrained, export, is_finetuned, seal
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train import checkpoint

FLIPS = 100
FILES = ("model.safetensors", "config.json", "text.json", "tokenizer.json", "visual.json", "visual.safetensors")
TEXTS = ["a red square", "a blue square", "two green discs"] * 3


def written(folder: Path, seed: int = 0) -> Path:
    """A run's folder with tokenizers and a model."""
    torch.manual_seed(seed)
    plan = pretraining()
    m = plan.model
    m.width = m.heads = 4
    visual = VQTokenizer(m.image_size, m.patch, m.codes, 4, 4)
    visual.save(folder / "tokenizers")
    train_wordpiece(TEXTS[seed:], 200).save(folder / "tokenizers")
    export(MaskedDataModelling(m, visual), plan, folder / "tokenizers", folder / "model")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("run"))


def same(a: object, b: object) -> bool:
    assert isinstance(a, Pretrained) and isinstance(b, Pretrained)
    assert isinstance(a.visual_tokenizer, VQTokenizer) and isinstance(b.visual_tokenizer, VQTokenizer)
    ours, theirs = ({**x.model.state_dict(), **x.visual_tokenizer.state_dict()} for x in (a, b))  # type: ignore[union-attr]
    words = [x.text_tokenizer.encode_batch([*TEXTS, "square red"]) for x in (a, b)]
    return a.recipe == b.recipe and words[0] == words[1] and all(torch.equal(ours[k], theirs[k]) for k in ours)


def flipped(path: Path, rng: random.Random) -> bytes:
    """The file with one bit turned over, on the disk; returns what it was."""
    content = path.read_bytes()
    place = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    path.write_bytes(changed)
    return content


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_changes_a_number(name: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    file, rng, refused = tmp_path / "model" / name, random.Random(name), 0
    before = vlmoe.load(run)
    for _ in range(FLIPS):
        content = flipped(file, rng)
        try:
            assert same(vlmoe.load(tmp_path), before)
        except UserError as error:
            refused += str(tmp_path / "model") in str(error)
        file.write_bytes(content)
    assert refused == FLIPS if name != "config.json" else refused > FLIPS / 2  # the rest fell on white space
    assert same(vlmoe.load(tmp_path), before)


@pytest.mark.parametrize("name", FILES)
def test_truncated_missing_or_swapped_files(name: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    other = written(tmp_path / "other", seed=1) / "model" / name
    file = tmp_path / "model" / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        vlmoe.load(tmp_path)
    file.write_bytes(content + b"\0" * 8)
    with pytest.raises(UserError, match=name):
        vlmoe.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=name):
        vlmoe.load(tmp_path)
    if other.read_bytes() != content:
        file.write_bytes(other.read_bytes())
        with pytest.raises(UserError, match=r"altered|has .* bytes"):
            vlmoe.load(tmp_path)


def test_a_change_on_purpose_is_sealed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "model" / "config.json"
    config.write_text(config.read_text().replace('"about": ""', '"about": "by hand"'))
    with pytest.raises(ModelFileError, match=rf"config.json: its content.*altered.*vlmoe seal {config.parent}"):
        vlmoe.load(tmp_path / "run")
    assert config in seal(tmp_path / "run")
    assert vlmoe.load(tmp_path / "run").recipe.about == "by hand"
    about = read_sealed(config)
    config.write_text(json.dumps(about))  # the digest taken out
    with pytest.raises(ModelFileError, match="has no sha256 of its content"):
        vlmoe.load(tmp_path / "run")
    with pytest.raises(ModelFileError, match="no model and no tokenizer here"):
        seal(tmp_path)


def test_a_model_written_before_there_were_digests_loads(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    for name in ("config.json", "text.json", "visual.json"):
        about = read_sealed(tmp_path / "model" / name)
        del about["files"]
        (tmp_path / "model" / name).write_text(json.dumps(about | ({"format": 1} if "format" in about else {})))
    assert same(vlmoe.load(tmp_path), vlmoe.load(run))


def test_a_fine_tuned_model_is_sealed_as_well(tmp_path: Path) -> None:
    plan = recipe("nli")
    task, words = built(plan)
    words.save(tmp_path / "tokenizers")
    export(task, plan, tmp_path / "tokenizers", tmp_path / "model", ("yes", "no", "maybe"))
    assert isinstance(vlmoe.load(tmp_path), Finetuned) and is_finetuned(tmp_path)
    rng = random.Random(0)
    for _ in range(20):
        content = flipped(tmp_path / "model" / "model.safetensors", rng)
        with pytest.raises(ModelFileError, match="altered"):
            vlmoe.load(tmp_path)
        (tmp_path / "model" / "model.safetensors").write_bytes(content)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"yes"', '"yea"'))
    for read in (vlmoe.load, is_finetuned):
        with pytest.raises(ModelFileError, match="altered"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_no_flipped_bit_changes_a_checkpoint(name: str, tmp_path: Path) -> None:
    from tests.train.toy import toy_task

    task = toy_task()
    optimizer = torch.optim.AdamW(task.parameters())
    state = checkpoint.State(3, 7, 1.25, 0.5, {"seed": 0}, logs={"metrics.jsonl": 12})
    folder = checkpoint.save(tmp_path, state, task, optimizer, keep=1)
    rng, refused = random.Random(name), 0
    for _ in range(FLIPS):
        content = flipped(folder / name, rng)
        other = toy_task(1)
        try:
            found = checkpoint.restore(folder, other, torch.optim.AdamW(other.parameters()))
            assert found == state
            assert all(torch.equal(v, task.state_dict()[k]) for k, v in other.state_dict().items())
        except checkpoint.CheckpointError as error:
            refused += str(folder) in str(error)
        (folder / name).write_bytes(content)
    assert refused > FLIPS / 2 if name == "state.json" else refused == FLIPS


def test_no_flipped_bit_changes_the_best_weights(tmp_path: Path) -> None:
    from tests.train.toy import toy_task

    task = toy_task()
    checkpoint.save_weights(tmp_path, task)
    rng, refused = random.Random(0), 0
    for _ in range(FLIPS):
        content = flipped(tmp_path / "model.safetensors", rng)
        other = toy_task(1)
        try:
            checkpoint.load_weights(tmp_path, other)
            assert all(torch.equal(v, task.state_dict()[k]) for k, v in other.state_dict().items())
        except checkpoint.CheckpointError:
            refused += 1
        (tmp_path / "model.safetensors").write_bytes(content)
    assert refused > FLIPS / 2
