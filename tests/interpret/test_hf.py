"""Models of transformers from a folder: reading, feeding, tables, and what is said where it cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
import transformers

from tests.interpret.hf_tiny import BASE, MIXTRAL, SPECIAL, build, processor, tokenizer
from vlmoe.config import UserError
from vlmoe.interpret.findings import find
from vlmoe.interpret.hf import Adapter, HFSubject, load_hf, read_images, read_texts, register
from vlmoe.interpret.hf.adapters import ADAPTERS

TEXTS = ["the red dog sees 42 birds, near 17 trees.", "a cat sleeps", "two trees and two dogs run near the cat"]


def saved(name: str, folder: Path, **extra: Any) -> Path:
    model: Any = build(name)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for what in extra.values():
        what.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("mixtral", tmp_path_factory.mktemp("hf") / "mixtral")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "c.PNG"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    (folder / "note.txt").write_text("not an image")
    return folder


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


# -------------------------------------------------------------------------------------------------------------- reading
def test_a_saved_text_model_is_the_same_from_its_folder(mixtral: Path) -> None:
    loaded, made = load_hf(mixtral), HFSubject(build("mixtral"), tokenizer())
    for one, other in zip(loaded.batches(TEXTS, size=2), made.batches(TEXTS, size=2), strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(loaded.run(one).logits, made.run(other).logits)
    assert next(loaded.model.parameters()).dtype == torch.float32


def test_a_saved_model_that_sees_is_the_same_from_its_folder(tmp_path: Path, images: Path) -> None:
    loaded = load_hf(saved("qwen3_vl_moe", tmp_path, images=processor("qwen3_vl_moe")), image_size=32)
    made = HFSubject(build("qwen3_vl_moe"), tokenizer(), processor("qwen3_vl_moe"), image_size=32)
    one, other = (s.batches(TEXTS, read_images(images))[0] for s in (loaded, made))
    assert one.samples == ["00001 a", "00002 b", "00003 c"] and one.kind == "pair"
    assert one.grids == [(4, 4)] * 3 and one.images[0] is not None and one.images[0].shape == (32, 32, 3)
    assert torch.equal(loaded.run(one).logits, made.run(other).logits)
    assert loaded.batches(TEXTS)[0].kind == "text"


def test_half_precision_is_read_as_float32_on_a_cpu(tmp_path: Path) -> None:
    model: Any = build("olmoe").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert next(load_hf(tmp_path).model.parameters()).dtype == torch.float32


def test_four_bit_experts_are_unpacked(tmp_path: Path) -> None:
    """GPT-OSS is published with MXFP4 experts: 32 values share a power of two, each is one of 16."""
    keys: dict[str, Any] = {**BASE, **MIXTRAL, "intermediate_size": 32, "head_dim": 8}
    config = transformers.GptOssConfig(**keys)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    weights, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [n for n in weights if n.endswith(("gate_up_proj", "down_proj"))]:
        E, inner, outer = weights.pop(name).shape
        blocks, scales = (E, outer, inner // 32, 16), (E, outer, inner // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(122, 125, scales, generator=generator, dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    told = json.loads((tmp_path / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(told))

    subject = load_hf(tmp_path)
    low = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([low, -low])
    name = "model.layers.1.mlp.experts.down_proj"
    packed, scale = weights[f"{name}_blocks"], weights[f"{name}_scales"].float() - 127
    pairs = torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], dim=-1)
    expected = (pairs.flatten(3) * scale.exp2()[..., None]).flatten(2).transpose(1, 2)
    got = dict(subject.model.named_parameters())[name]
    assert torch.equal(got, expected)
    seen: list[Any] = []
    with subject.sites[0].watch(seen.append):
        subject.run(subject.batches(TEXTS)[0])
    assert len(seen) == 1 and seen[0].expert_NK.shape[1] == 2


# --------------------------------------------------------------------------------------------------------------- tables
def test_losses_are_those_of_transformers(mixtral: Path) -> None:
    subject = load_hf(mixtral)
    batch = subject.batches(TEXTS)[0]
    losses_R = subject.losses(batch)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = subject.model(**batch.inputs, labels=labels).loss
    assert np.nanmean(losses_R) == pytest.approx(float(expected), rel=1e-5)
    table = subject.tokens(batch)
    firsts = np.flatnonzero(np.diff(table.sample_R, prepend=-1))
    assert np.isnan(losses_R[firsts]).all()
    assert np.isnan(losses_R).sum() == len(TEXTS) + (~table.valid_R).sum()


def test_a_loss_stands_at_the_token_it_predicts(mixtral: Path) -> None:
    """Another last word changes the loss of that word alone."""
    subject = load_hf(mixtral)
    a, b = (subject.batches([text])[0] for text in ("the dog", "the cat"))
    one, other = subject.losses(a), subject.losses(b)
    assert one[1:-1] == pytest.approx(other[1:-1]) and one[-1] != pytest.approx(other[-1])


def test_tokens_are_in_words(mixtral: Path) -> None:
    subject = load_hf(mixtral)
    (batch,) = subject.batches(TEXTS)
    table = subject.tokens(batch)
    assert table.kind == "text" and set(table.modality_R) == {"text"}
    assert table.samples == ["00001", "00002", "00003"]
    first = (table.sample_R == 0) & table.valid_R
    assert list(table.text_R[first][:6]) == ["<s>", "t", "he", " red", " dog", " sees"]
    assert "".join(table.text_R[first]) == f"<s>{TEXTS[0]}"
    classes = dict(zip(table.text_R[first], table.factors["token_class"][first], strict=True))
    assert classes["<s>"] == "special" and classes[" dog"] == "word" and classes[","] == "punctuation"
    assert {kind for word, kind in classes.items() if word.strip().isdigit()} == {"number"}
    assert list(table.factors["place"][first][:11]) == ["first"] + ["early"] * 8 + ["later"] * 2
    assert not any(table.factors["place"][~table.valid_R]) and not any(table.text_R[~table.valid_R])


def test_a_sentencepiece_token_keeps_its_space() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "▁the": 1, "▁dog": 2, "s": 3}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="<pad>", continuing_subword_prefix=""))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    subject = HFSubject(
        build("mixtral"), transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    )
    assert subject.tokenizer.decode([2]) == "dog"
    assert list(subject.tokens(subject.batches(["the dogs"])[0]).text_R) == [" the", " dog", "s"]


def test_long_texts_are_cut(mixtral: Path) -> None:
    subject = load_hf(mixtral, max_tokens=5)
    assert subject.batches(TEXTS)[0].inputs["input_ids"].shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3_vl_moe", "Qwen3VLProcessor"),
        ("glm4v_moe", "Glm4vProcessor"),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeProcessor"),
    ],
)
def test_pairs_are_laid_out_as_the_models_processor_does(
    name: str, kind: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(transformers, kind)
    monkeypatch.setattr(whole, "check_argument_for_proper_class", lambda *_: None)  # its reader of videos: torchvision
    own = whole(processor(name), tokenizer(), object())
    subject = HFSubject(build(name), tokenizer(), processor(name), image_size=32)
    (batch,) = subject.batches(TEXTS[:1], read_images(images)[:1])
    told = [f"<image_start><image><image_end>{TEXTS[0]}"]
    expected = own(text=told, images=[batch.images[0]], return_tensors="pt")
    assert set(batch.inputs) == set(expected)
    for key, value in expected.items():
        assert torch.equal(batch.inputs[key], value), key


# ------------------------------------------------------------------------------------------------------------- findings
@pytest.mark.parametrize("name", ["mixtral", "qwen3_vl_moe"])
def test_findings_come_out(name: str, images: Path) -> None:
    sees = name == "qwen3_vl_moe"
    subject = HFSubject(build(name), tokenizer(), processor(name) if sees else None, image_size=32)
    batches = subject.batches(TEXTS * 4, read_images(images) * 4 if sees else None, size=5)
    found = find(subject, batches, shown=3, permutations=10)
    assert [site["name"] for site in found["sites"]] == ["0", "1"]
    tables = [subject.tokens(batch) for batch in batches]
    for site in found["use"]:
        assert found["use"][site]["tokens"] == sum(int(table.valid_R.sum()) for table in tables)
        assert {"token_class", "place", "word"} <= set(found["information"][site])
        for expert in found["experts"][site]:
            assert expert["ablation"]["loss"]["tokens"] == sum(
                int((~np.isnan(subject.losses(batch))).sum()) for batch in batches
            )
        assert any(expert["ablation"]["loss"]["delta"] != 0 for expert in found["experts"][site])
    for sample, text in zip(found["samples"], TEXTS, strict=True):
        assert "".join(sample["tokens"]).endswith(text)
        assert len(sample["routes"]["1"]["text"]) == len(sample["tokens"])
        assert (sample["image"] is not None) == sees and sample["grid"] == ([4, 4] if sees else None)
        if sees:
            assert len(sample["routes"]["0"]["vision"]) == 16
    assert bool(found["sharing"]) == sees


# --------------------------------------------------------------------------------------------------------------- errors
def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _type(model_type: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), "model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _without_an_expert(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def _other_size(folder: Path) -> None:
    config = {**json.loads((folder / "config.json").read_text()), "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "no config.json"),
        (_broken_config, "config.json: not valid JSON"),
        (_type(None), "key 'model_type'"),
        (_type("nonesuch"), "type 'nonesuch'"),
        (_type("llama"), "no adapter for models of type 'llama'.*docs/adapters.md"),
        (_pickled, r"no.*safetensors.*|expected weights as \*.safetensors, found none; pytorch_model.bin is a pickle"),
        (_no_tokenizer, "no tokenizer that can be read"),
        (_without_an_expert, "the files lack 1 of the model's weights, model.norm.weight"),
        (_cut_short, "weights could not be read"),
        (_other_size, "weights could not be read"),
    ],
)
def test_a_folder_that_will_not_do_is_said_to(
    mixtral: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = copied(mixtral, tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)


def test_paths_and_devices_that_are_none(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_hf("someone/some-model")
    with pytest.raises(UserError, match="device 'cuda:77'"):
        load_hf(mixtral, "cuda:77")
    with pytest.raises(UserError, match="device 'toaster'"):
        load_hf(mixtral, "toaster")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'vlmoe\[hf\]'"):
        load_hf(mixtral)


def test_texts_and_images_that_will_not_do(mixtral: Path, images: Path, tmp_path: Path) -> None:
    subject, (first, *_) = load_hf(mixtral), read_images(images)
    with pytest.raises(UserError, match="texts: expected at least one"):
        subject.batches([])
    with pytest.raises(UserError, match="size: expected"):
        subject.batches(TEXTS, size=0)
    with pytest.raises(UserError, match="one for each of the 3 texts, got 1"):
        subject.batches(TEXTS, [first])
    with pytest.raises(UserError, match="images: models of type 'mixtral' take none"):
        subject.batches(["a dog"], [first])
    seeing = HFSubject(build("qwen3_vl_moe"), tokenizer())
    with pytest.raises(UserError, match="images: expected the model's processor"):
        seeing.batches(["a dog"], [first])
    seeing = HFSubject(build("qwen3_vl_moe"), tokenizer(), processor("qwen3_vl_moe"))
    with pytest.raises(UserError, match=r"note\.txt: .*not an image"):
        seeing.batches(["a dog"], [images / "note.txt"])
    with pytest.raises(UserError, match=r"none\.png: No such file"):
        seeing.batches(["a dog"], [images / "none.png"])
    with pytest.raises(UserError, match="expected a tokenizer"):
        HFSubject(build("mixtral"))
    plain = tokenizer()
    plain.backend_tokenizer.post_processor = None
    with pytest.raises(UserError, match="text 00002 gives no tokens"):
        HFSubject(build("mixtral"), plain).batches(["a", ""])


def test_files_of_texts_and_folders_of_images(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a dog\n\n  two cats \r\nein Bär\n", encoding="utf-8")
    assert read_texts(file) == ["a dog", "two cats", "ein Bär"]
    assert [p.name for p in read_images(images)] == ["a.jpg", "b.png", "c.PNG"]
    file.write_text("\n \n")
    with pytest.raises(UserError, match=r"texts\.txt: expected a text on each line, found none"):
        read_texts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"texts\.txt: expected UTF-8"):
        read_texts(file)
    with pytest.raises(UserError, match=r"none\.txt: No such file"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="expected images"):
        read_images(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_images(tmp_path / "none")


def test_models_without_adapter_or_experts() -> None:
    dense: Any = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**BASE))
    with pytest.raises(UserError, match="'llama': its config names no experts, it seems to be dense"):
        HFSubject(dense, tokenizer())
    with pytest.raises(UserError, match="no layer with experts found"):
        HFSubject(dense, tokenizer(), adapter=Adapter())
    config = transformers.Qwen3MoeConfig(**BASE, mlp_only_layers=[0, 1])
    with pytest.raises(UserError, match="no layer with experts found"):
        HFSubject(transformers.AutoModelForCausalLM.from_config(config), tokenizer())
    with pytest.raises(UserError, match="score: expected one of softmax, sigmoid, none, got 'relu'"):
        Adapter(score="relu")


def test_an_adapter_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.FlexOlmoConfig(**BASE, num_experts=6, num_experts_per_tok=2)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="no adapter for models of type 'flex_olmo'") as caught:
        HFSubject(model, tokenizer())
    assert "dense" not in str(caught.value) and "register('flex_olmo', Adapter(" in str(caught.value)
    monkeypatch.setattr("vlmoe.interpret.hf.adapters.ADAPTERS", dict(ADAPTERS))
    register("flex_olmo", Adapter(router=("gate",)))
    assert [(s.name, s.experts, s.k) for s in HFSubject(model, tokenizer()).sites] == [("0", 6, 2), ("1", 6, 2)]


def test_an_adapter_that_does_not_fit_says_so_when_it_runs() -> None:
    subject = HFSubject(build("llama4_text"), tokenizer(), adapter=Adapter(score="sigmoid"))
    with (
        pytest.raises(UserError, match=r"site 1: expected the router first.*docs/adapters\.md"),
        subject.sites[0].watch(lambda _: None),
    ):
        subject.run(subject.batches(TEXTS)[0])


def test_special_tokens_have_their_places() -> None:
    assert [tokenizer().convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
