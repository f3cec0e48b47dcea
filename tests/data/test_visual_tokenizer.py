"""The visual tokenizer learns, keeps its codebook in use, and comes back from disk as it was."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vlmoe.config import ModelConfig, UserError, VisualTokenizerConfig
from vlmoe.data.batch import Batch
from vlmoe.data.visual_tokenizer import StoredCodes, VQTokenizer
from vlmoe.data.visual_training import code_gap, code_use, tokenizer_report, train_vq

MODEL = ModelConfig(image_size=16, patch=8, codes=32)


def squares(count: int, generator: torch.Generator) -> Tensor:
    """Images of four plain patches: 64 colours, so 32 codes have something to tell apart."""
    levels = torch.randint(0, 4, (count, 3, 2, 2), generator=generator) * 85
    return levels.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8)


@pytest.fixture(scope="module")
def trained() -> tuple[VQTokenizer, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    images = iter(lambda: squares(32, generator), None)
    config = VisualTokenizerConfig(dim=8, width=32, steps=300, lr=4e-3)  # of 200 the outcome hangs on rounding
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
    assert not moved[:, :3].any()  # its neighbours
    hidden = torch.rand(64, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(tokenizer.targets(Batch(image_BCHW=images, patch_mask_BP=hidden)), codes[hidden])


def assert_same_codes(tokenizer: VQTokenizer, images: Tensor, expected: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(Batch(image_BCHW=images)), expected)
        assert tokenizer.features(images).dtype == torch.float32


def crowded(tokenizer: VQTokenizer) -> VQTokenizer:
    """The same with all codes in a cap of the sphere, so that rounding to bfloat16 decides between them."""
    close = copy.deepcopy(tokenizer)
    first = close.codebook_VZ[:1]
    close.codebook_VZ.copy_(F.normalize(first + 0.002 * close.codebook_VZ, dim=-1))
    return close


def test_codes_are_float32s_whatever_autocast_or_a_cast_says(trained: tuple[VQTokenizer, dict[str, float]]) -> None:
    tokenizer = crowded(trained[0])
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    codes = tokenizer.encode(Batch(image_BCHW=images))
    z_NZ = tokenizer.features(images).flatten(0, 1)
    rounded = (z_NZ.bfloat16() @ tokenizer.codebook_VZ.bfloat16().T).argmax(-1)
    assert (rounded != codes.flatten()).float().mean() > 0.2  # in bfloat16 they would be others
    assert_same_codes(tokenizer, images, codes)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        assert_same_codes(copy.deepcopy(tokenizer).to(cast), images, codes)
    assert_same_codes(copy.deepcopy(tokenizer).train(), images, codes)  # nor does the mode matter


def test_a_tokenizer_made_while_another_dtype_is_the_default_is_float32(
    tmp_path: Path, trained: tuple[VQTokenizer, dict[str, float]]
) -> None:
    trained[0].save(tmp_path)
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = VQTokenizer.load(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    state = trained[0].state_dict()
    assert all(t.dtype == torch.float32 and torch.equal(t, state[name]) for name, t in loaded.state_dict().items())


def test_training_under_autocast_is_training_without() -> None:
    def run(on: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images = iter(lambda: squares(16, generator), None)
        config = VisualTokenizerConfig(dim=8, width=32, steps=25)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            return train_vq(config, MODEL, images, squares(16, generator), 0, torch.device("cpu"))[0].codebook_VZ

    assert torch.equal(run(True), run(False))


def test_codes_are_distinct_and_features_use_their_dimensions(trained: tuple[VQTokenizer, dict[str, float]]) -> None:
    tokenizer, report = trained
    cosine = tokenizer.codebook_VZ @ tokenizer.codebook_VZ.T
    assert cosine.fill_diagonal_(-1).max() < 0.99
    assert report["tied_fp32"] == 0
    assert report["tied_bf16"] < 0.02
    assert report["gap"] > 0.02
    z = tokenizer.features(squares(128, torch.Generator().manual_seed(9))).flatten(0, 1)
    share = torch.linalg.eigvalsh(z.T @ z / len(z))  # they sum to 1
    assert 1 / share.square().sum() > 3  # three colour channels: as many directions, and more


def test_crowded_codes_move_apart() -> None:
    """Three directions in the data; of six codes four point along the first, one nowhere in use."""
    tokenizer = VQTokenizer(16, 8, codes=6, dim=4, width=8)
    tokenizer.codebook_VZ.copy_(torch.eye(4)[[0, 0, 0, 0, 1, 3]])
    tokenizer.count_V.copy_(torch.tensor([1.0, 9, 2, 3, 5, 0]))
    tokenizer.idle_V[5] = 20
    patches = torch.eye(4)[[0, 0, 1, 2, 2, 2]]
    tokenizer._scatter(patches, torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.codebook_VZ[[1, 4]], torch.eye(4)[[0, 1]])  # the busiest on either stay
    cosine = tokenizer.codebook_VZ @ tokenizer.codebook_VZ.T
    assert (tokenizer.codebook_VZ @ torch.eye(4)[2] == 1).sum() == 1  # one went where patches had none
    assert cosine.fill_diagonal_(-1).max() < 1  # the others point anywhere, none on another


def test_images_of_one_colour_do_no_harm() -> None:
    images = iter(lambda: torch.full((4, 3, 16, 16), 7, dtype=torch.uint8), None)
    config = VisualTokenizerConfig(dim=8, width=32, steps=45)
    tokenizer, report = train_vq(config, MODEL, images, next(images), 0, torch.device("cpu"))
    assert all(t.isfinite().all() for t in tokenizer.state_dict().values())
    assert report["perplexity"] == pytest.approx(1)


def test_gap_by_hand() -> None:
    tokenizer = VQTokenizer(16, 8, codes=3, dim=2, width=8)
    tokenizer.codebook_VZ.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]))
    z = torch.tensor([[[1.0, 0.0], [0.8, -0.6]]])  # cosines 1, 0.6, 0 and 0.8, 0, 0.6
    assert code_gap(tokenizer, z).flatten().tolist() == pytest.approx([0.4, 0.2])


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
    save_file({"count_V": torch.ones(3)}, weights)
    about = {"image_size": 16, "patch": 4, "codes": 8, "dim": 4, "width": 8}  # without digests, as it was written then
    (tmp_path / "visual.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"written by an earlier version.*train it anew"):
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
