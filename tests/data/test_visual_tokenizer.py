"""The visual tokenizer learns, keeps its codebook in use, and comes back from disk as it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlmoe.config import ModelConfig, UserError, VisualTokenizerConfig
from vlmoe.data.batch import Batch
from vlmoe.data.visual_tokenizer import StoredCodes, VQTokenizer, code_use, tokenizer_report, train_vq

MODEL = ModelConfig(image_size=16, patch=8, codes=32)


def squares(count: int, generator: torch.Generator) -> Tensor:
    """Images of four plain patches: 64 colours, so 32 codes have something to tell apart."""
    levels = torch.randint(0, 4, (count, 3, 2, 2), generator=generator) * 85
    return levels.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8)


@pytest.fixture(scope="module")
def trained() -> tuple[VQTokenizer, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    images = iter(lambda: squares(32, generator), None)
    config = VisualTokenizerConfig(dim=8, width=32, steps=200, lr=4e-3)
    return train_vq(config, MODEL, images, squares(128, generator), 0, torch.device("cpu"))


def test_it_learns_and_its_codebook_does_not_collapse(trained: tuple[VQTokenizer, dict[str, float]]) -> None:
    _, report = trained
    assert report["unexplained"] < 0.3  # a mean image explains nothing: 1.0
    assert report["used"] > 0.9
    assert report["perplexity"] > 16


def test_codes_belong_to_their_patch(trained: tuple[VQTokenizer, dict[str, float]]) -> None:
    tokenizer, _ = trained
    images = squares(64, torch.Generator().manual_seed(5))
    codes = tokenizer.encode(Batch(image_BCHW=images))
    assert codes.shape == (64, 4)
    assert codes.dtype == torch.int64
    changed = images.clone()
    changed[:, :, 8:, 8:] = 255 - changed[:, :, 8:, 8:]
    moved = tokenizer.encode(Batch(image_BCHW=changed)) != codes
    assert moved[:, 3].float().mean() > 0.9  # the patch that changed
    assert moved[:, :3].float().mean() < 0.3  # its neighbours, informed by it, mostly stay


def test_decoding_gives_pictures_near_the_images(trained: tuple[VQTokenizer, dict[str, float]]) -> None:
    tokenizer, report = trained
    images = squares(64, torch.Generator().manual_seed(6))
    decoded = tokenizer.decode(tokenizer.encode(Batch(image_BCHW=images)))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    error = (decoded.float() - images.float()).square().mean() / images.float().var()
    assert float(error) == pytest.approx(report["unexplained"], rel=0.35)


def test_training_is_a_function_of_the_seed() -> None:
    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images = iter(lambda: squares(16, generator), None)
        config = VisualTokenizerConfig(dim=8, width=32, steps=25)
        return train_vq(config, MODEL, images, squares(16, generator), seed, torch.device("cpu"))[0].codebook_VZ

    first = run(0)
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))


def test_saved_and_loaded_is_the_same(tmp_path: Path, trained: tuple[VQTokenizer, dict[str, float]]) -> None:
    tokenizer, _ = trained
    tokenizer.save(tmp_path)
    loaded = VQTokenizer.load(tmp_path)
    images = squares(8, torch.Generator().manual_seed(7))
    assert torch.equal(loaded.encode(Batch(image_BCHW=images)), tokenizer.encode(Batch(image_BCHW=images)))
    assert tokenizer_report(loaded, images) == tokenizer_report(tokenizer, images)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_broken_files_are_named(tmp_path: Path, trained: tuple[VQTokenizer, dict[str, float]]) -> None:
    with pytest.raises(UserError, match=r"missing file visual\.json"):
        VQTokenizer.load(tmp_path)
    trained[0].save(tmp_path)
    weights = tmp_path / "visual.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"visual\.safetensors: has 100 bytes"):
        VQTokenizer.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"missing file visual\.safetensors"):
        VQTokenizer.load(tmp_path)


def test_stored_codes_take_the_tokenizers_place() -> None:
    stored = StoredCodes(8192)
    codes = torch.tensor([[1, 8191, 3, 4]], dtype=torch.int32)
    assert stored.encode(Batch(codes_BP=codes)).tolist() == codes.tolist()
    assert stored.decode(codes) is None
    with pytest.raises(UserError, match=r"codes\.npy.*first sample: a7"):
        stored.encode(Batch(keys=["a7"], image_BCHW=torch.zeros(1, 3, 16, 16, dtype=torch.uint8)))
    with pytest.raises(UserError, match=r"8191 is not below model\.codes = 100"):
        StoredCodes(100).encode(Batch(codes_BP=codes))


def test_code_use_by_hand() -> None:
    report = code_use(torch.tensor([[0, 0, 1, 1]]), 4)
    assert report["used"] == 0.5
    assert report["perplexity"] == pytest.approx(2.0)
