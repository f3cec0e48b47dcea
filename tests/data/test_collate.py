import numpy as np
import pytest
import torch

from tests.data.fakes import WORDS, FakeSource, small_recipe
from vlmoe.config import MaskingConfig
from vlmoe.data.batch import IGNORE
from vlmoe.data.collate import Collator, Ready, token_factors
from vlmoe.data.counter import stream
from vlmoe.data.masking import count_of, mask_tokens
from vlmoe.data.sample import BadSample, Sample, Span
from vlmoe.data.text_tokenizer import train_wordpiece

TOKENIZER = train_wordpiece(WORDS * 2, 128)


def collator(kind: str, factors: bool = False) -> Collator:
    recipe = small_recipe()
    return Collator(recipe.model, recipe.data.masking, TOKENIZER, kind, factors)


def ready(kind: str, n: int, factors: bool = False) -> tuple[Collator, list[Ready]]:
    c, source = collator(kind, factors), FakeSource(kind, 100)
    return c, [c.ready(source[i]) for i in range(n)]


def test_padding_masks_and_targets_of_pairs() -> None:
    c, items = ready("pair", 8)
    batch = c.batch(items, list(range(8)), key=1)
    assert batch.text_BT is not None
    assert batch.target_BT is not None
    assert batch.valid_BT is not None
    longest = max(len(item.ids) for item in items)
    assert batch.text_BT.shape[1] == longest
    for b, item in enumerate(items):
        n = len(item.ids)
        hidden = batch.target_BT[b] != IGNORE
        assert batch.valid_BT[b].tolist() == [t < n for t in range(batch.text_BT.shape[1])]
        assert (batch.text_BT[b, n:] == TOKENIZER.pad_id).all()
        assert hidden.sum() == count_of(0.5, n - 2)
        assert (batch.text_BT[b][hidden] == TOKENIZER.mask_id).all()
        whole = torch.where(hidden, batch.target_BT[b], batch.text_BT[b])
        assert whole[:n].tolist() == item.ids
        assert (item.ids[0], item.ids[-1]) == (TOKENIZER.start_id, TOKENIZER.end_id)
        assert not hidden[0]
        assert not hidden[n - 1]
    assert batch.image_BCHW is not None
    assert batch.image_BCHW.dtype == torch.uint8
    assert batch.image_BCHW[3].permute(1, 2, 0).equal(torch.from_numpy(items[3].sample.image))
    assert batch.patch_mask_BP is not None
    assert batch.patch_mask_BP.shape == (8, 16)
    assert (batch.patch_mask_BP.sum(dim=1) == count_of(0.4, 16)).all()


def test_hidden_positions_are_found_when_the_batch_leaves_the_host() -> None:
    c, items = ready("pair", 8)
    batch = c.batch(items, list(range(8)), key=1)
    assert batch.target_BT is not None and batch.patch_mask_BP is not None
    shown = torch.nn.functional.pad(batch.target_BT, (0, 4), value=IGNORE)
    for change in (batch.target_BT, shown):  # what is done to a batch on the host counts
        batch.target_BT = change
        sent = batch.to(torch.device("cpu"))
        assert sent.hidden_patch_M is not None and sent.hidden_token_M is not None
        assert torch.equal(sent.hidden_tokens(), batch.hidden_tokens())
        words = change.flatten()[sent.hidden_token_M]
        assert torch.equal(words, change[change != IGNORE])
        at = torch.arange(8 * 16).view(8, 16)[batch.patch_mask_BP]
        assert torch.equal(sent.hidden_patch_M, at)
    first = sent.head(3)
    assert first.text_BT is not None and len(first) == len(first.text_BT) == 3
    assert torch.equal(first.hidden_patches(), at[: len(at) * 3 // 8])
    kind, texts = ready("text", 4)
    assert kind.batch(texts, list(range(4)), key=1).to(torch.device("cpu")).hidden_patch_M is None


def test_kinds_carry_their_fields_alone() -> None:
    c, items = ready("text", 4)
    batch = c.batch(items, [0, 1, 2, 3], key=1)
    assert batch.image_BCHW is None
    assert batch.patch_mask_BP is None
    assert all((batch.target_BT[b] != IGNORE).sum() == count_of(0.15, len(i.ids) - 2) for b, i in enumerate(items))  # type: ignore[index]
    c, items = ready("image", 4)
    batch = c.batch(items, [0, 1, 2, 3], key=1)
    assert batch.text_BT is None
    assert batch.valid_BT is None
    assert batch.codes_BP is None


def test_masks_follow_the_position_not_the_place_in_the_batch() -> None:
    c, items = ready("pair", 6)
    together = c.batch(items, [10, 11, 12, 13, 14, 15], key=7)
    alone = c.batch(items[3:4], [13], key=7)
    assert alone.patch_mask_BP is not None
    assert together.patch_mask_BP is not None
    assert alone.patch_mask_BP[0].equal(together.patch_mask_BP[3])
    other = c.batch(items, [10, 11, 12, 13, 14, 15], key=8)
    assert other.patch_mask_BP is not None
    assert not other.patch_mask_BP.equal(together.patch_mask_BP)


def test_long_texts_are_cut_and_still_end() -> None:
    item = collator("text").ready(Sample("k", text="red " * 50))
    assert item.cut
    assert len(item.ids) == 12
    assert item.ids[-1] == TOKENIZER.end_id
    assert not collator("text").ready(Sample("k", text="red " * 10)).cut


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (Sample("k", np.zeros((16, 16, 3), np.uint8), " \n"), "empty text"),
        (Sample("k", np.zeros((16, 16, 3), np.uint8), None), "empty text"),
        (Sample("k", np.zeros((16, 16, 3), np.uint8), "漢 字"), "no token of the text is in the vocabulary"),
        (Sample("k", np.zeros((8, 16, 3), np.uint8), "red"), r"shape \(8, 16, 3\), expected \(16, 16, 3\)"),
        (Sample("k", None, "red"), "shape None"),
    ],
)
def test_what_cannot_be_used_is_bad(sample: Sample, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        collator("pair").ready(sample)


def test_unknown_tokens_are_never_predicted() -> None:
    c = collator("pair")
    items = [c.ready(Sample("k", np.zeros((16, 16, 3), np.uint8), "red 漢 blue 字"))] * 20
    batch = c.batch(items, list(range(20)), key=0)
    assert batch.target_BT is not None
    assert TOKENIZER.unk_id not in batch.target_BT.flatten().tolist()


def test_factors_follow_characters() -> None:
    text = "the red circle"
    spans = (Span(4, 14, {"part": "object"}), Span(4, 7, {"word_class": "colour", "part": "first"}))
    ids, offsets = TOKENIZER.encode(text)
    factors = token_factors([(0, 0), *offsets, (0, 0)], spans, 8)
    assert len(ids) == 3
    assert factors["word_class"] == ["", "", "colour", "", "", "", "", ""]
    assert factors["part"] == ["", "", "first", "object", "", "", "", ""]
    c, items = ready("pair", 3, factors=True)
    batch = c.batch(items, [0, 1, 2], key=0)
    assert batch.text_BT is not None
    for known in batch.token_factors:
        assert known["place"] == ["", "first"] + [""] * (batch.text_BT.shape[1] - 2)


def test_stored_codes_reach_the_batch() -> None:
    c = collator("image")
    image = np.zeros((16, 16, 3), np.uint8)
    items = [c.ready(Sample(str(i), image, codes=np.arange(16) + i)) for i in range(2)]
    batch = c.batch(items, [0, 1], key=0)
    assert batch.codes_BP is not None
    assert batch.codes_BP.tolist() == [list(range(16)), list(range(1, 17))]


def test_equal_texts_share_their_tokens_and_any_number_of_texts_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmoe.data.collate.KEPT", 2)
    c, _ = ready("text", 0)
    texts = ["red star", "blue circle", "green square", "red star", "green square"]
    items = [c.ready(Sample(str(i), text=text)) for i, text in enumerate(texts)]
    assert [item.ids[1:-1] for item in items] == [c.tokenizer.encode(text)[0] for text in texts]
    assert items[0].ids is items[3].ids
    assert items[2].ids is not items[4].ids  # no room for it


def test_whole_names_are_hidden_without_a_draw() -> None:
    c, items = ready("pair", 8)
    c.masking.pair_text = 1.0
    drawn = [
        p for p, item in enumerate(items) if (mask_tokens(item.maskable_T, 1.0, stream(1, p)) != item.maskable_T).any()
    ]
    assert not drawn  # what a draw would give, too
    batch = c.batch(items, list(range(8)), key=1)
    assert batch.target_BT is not None
    hidden = [(batch.target_BT[b, : len(i.ids)] != IGNORE).tolist() for b, i in enumerate(items)]
    assert hidden == [i.maskable_T.tolist() for i in items]


def test_only_words_of_the_classes_asked_are_hidden() -> None:
    c, _ = ready("pair", 0)
    c = Collator(c.model, MaskingConfig(pair_text=1.0, words=["first"]), TOKENIZER, "pair")
    source = FakeSource("pair", 20)
    items = [c.ready(source[i]) for i in range(20)]
    batch = c.batch(items, list(range(20)), key=1)
    assert batch.target_BT is not None
    for b, item in enumerate(items):
        (span,) = item.sample.spans  # the first word
        expected = [start < span.stop and stop > span.start for start, stop in item.offsets]
        assert (batch.target_BT[b, : len(item.ids)] != IGNORE).tolist() == expected
        assert any(expected)


def test_a_text_without_the_words_asked_is_bad() -> None:
    c, _ = ready("text", 0)
    c = Collator(c.model, MaskingConfig(words=["code"]), TOKENIZER, "text")
    with pytest.raises(BadSample, match=r"no word of the text is known as one of \['code'\] \(data.masking.words\)"):
        c.ready(Sample("k", text="red star"))
