"""Samples to tensors: tokens, masks, padding.

Shape suffixes: B batch · P patches · T text tokens · S image side · H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from vlmoe.config import MaskingConfig, ModelConfig
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.counter import hash64, stream
from vlmoe.data.masking import mask_patches, mask_tokens
from vlmoe.data.sample import BadSample, Sample, Span
from vlmoe.data.text_tokenizer import TextTokenizer

Tokens = tuple[list[int], list[tuple[int, int]], np.ndarray, bool]  # the fields of Ready, shared by equal texts
Ranges = tuple[tuple[int, int], ...]  # of characters: start and stop
KEPT = 8192  # texts whose tokens are kept: names come again and again; about 1 KB each


@dataclass(slots=True)
class Ready:
    """A sample with its tokens, start and end included. maskable_T: True where a token may be hidden."""

    sample: Sample
    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    maskable_T: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    cut: bool = False


class Collator:
    """Turns samples of one kind into a Batch. What is hidden depends on `key` and the position alone."""

    def __init__(
        self, model: ModelConfig, masking: MaskingConfig, tokenizer: TextTokenizer, kind: str, factors: bool = False
    ) -> None:
        self.model, self.masking, self.tokenizer, self.kind, self.factors = model, masking, tokenizer, kind, factors
        self._classes = frozenset(masking.words)
        self._tokens: dict[tuple[str, Ranges], Tokens] = {}

    def ready(self, sample: Sample) -> Ready:
        """Check and tokenize one sample.

        Texts longer than `model.max_text` are cut, and still end with the end token. Raises BadSample when nothing in
        the text can be predicted.
        """
        size = self.model.image_size
        if self.kind != "text" and (sample.image is None or sample.image.shape != (size, size, 3)):
            found = None if sample.image is None else sample.image.shape
            raise BadSample(sample.key, f"image has the shape {found}, expected {(size, size, 3)}")
        if self.kind == "image":
            return Ready(sample)
        if not sample.text or not sample.text.strip():
            raise BadSample(sample.key, "empty text")
        asked: Ranges = ()
        if self._classes:
            asked = tuple((s.start, s.stop) for s in sample.spans if s.factors.get("word_class") in self._classes)
            if not asked:
                why = f"no word of the text is known as one of {self.masking.words} (data.masking.words)"
                raise BadSample(sample.key, why)
        found = self._tokens.get((sample.text, asked))
        if found is None:
            found = self._tokenize(sample.text, asked)
            if len(self._tokens) < KEPT:
                self._tokens[sample.text, asked] = found
        ids, offsets, maskable_T, cut = found
        if not maskable_T.any():
            raise BadSample(sample.key, f"no token of the {'words asked' if asked else 'text'} is in the vocabulary")
        return Ready(sample, ids, offsets, maskable_T, cut)

    def _tokenize(self, text: str, asked: Ranges) -> Tokens:
        """asked: ranges of characters that may be hidden; none: all."""
        ids, offsets = self.tokenizer.encode(text)
        room = self.model.max_text - 2
        cut = len(ids) > room
        ids, offsets = ids[:room], offsets[:room]
        maskable_T = np.array([False, *(i != self.tokenizer.unk_id for i in ids), False])
        if asked:
            within = [any(start < stop_ and stop > start_ for start_, stop_ in asked) for start, stop in offsets]
            maskable_T &= np.array([False, *within, False])
        ids = [self.tokenizer.start_id, *ids, self.tokenizer.end_id]
        return ids, [(0, 0), *offsets, (0, 0)], maskable_T, cut

    def batch(self, items: list[Ready], positions: list[int], key: int) -> Batch:
        """positions: each item's place in the order of its kind; key: 64 bits that the masks depend on."""
        batch = Batch(keys=[item.sample.key for item in items])
        if self.kind != "text":
            self._add_images(batch, items, positions, hash64("patches", key))
        if self.kind != "image":
            self._add_texts(batch, items, positions, hash64("tokens", key))
        return batch

    def _add_images(self, batch: Batch, items: list[Ready], positions: list[int], key: int) -> None:
        image_BHWC = np.stack([item.sample.image for item in items])  # type: ignore[misc]
        batch.image_BCHW = torch.from_numpy(image_BHWC).permute(0, 3, 1, 2).contiguous()
        side, masking = self.model.image_size // self.model.patch, self.masking
        ratio = masking.patches if self.kind == "image" else masking.pair_patches
        if ratio:
            mask_BP = [mask_patches(side, ratio, masking.min_block, stream(key, p)) for p in positions]
            batch.patch_mask_BP = torch.from_numpy(np.stack(mask_BP))
        else:
            batch.patch_mask_BP = torch.zeros(len(items), side * side, dtype=torch.bool)
        codes = [item.sample.codes for item in items]
        if all(c is not None for c in codes):
            batch.codes_BP = torch.from_numpy(np.stack(codes).astype(np.int64))  # type: ignore[arg-type]
        if self.factors:
            batch.patch_factors = [item.sample.patch_factors for item in items]

    def _add_texts(self, batch: Batch, items: list[Ready], positions: list[int], key: int) -> None:
        length_B = np.array([len(item.ids) for item in items])
        T = int(length_B.max())
        ratio = self.masking.text if self.kind == "text" else self.masking.pair_text
        ids_N = np.array([i for item in items for i in item.ids], dtype=np.int64)  # N: tokens that are no padding
        if ratio == 1:
            hidden_N = np.concatenate([item.maskable_T for item in items])
        else:
            hidden = zip(items, positions, strict=True)
            hidden_N = np.concatenate([mask_tokens(item.maskable_T, ratio, stream(key, p)) for item, p in hidden])
        valid_BT = np.arange(T) < length_B[:, None]
        text_BT = np.full((len(items), T), self.tokenizer.pad_id, dtype=np.int64)
        target_BT = np.full((len(items), T), IGNORE, dtype=np.int64)
        text_BT[valid_BT] = np.where(hidden_N, self.tokenizer.mask_id, ids_N)
        target_BT[valid_BT] = np.where(hidden_N, ids_N, IGNORE)
        batch.text_BT, batch.target_BT = torch.from_numpy(text_BT), torch.from_numpy(target_BT)
        batch.valid_BT = torch.from_numpy(valid_BT)
        if self.factors:
            batch.token_factors = [token_factors(item.offsets, item.sample.spans, T) for item in items]


def token_factors(offsets: list[tuple[int, int]], spans: tuple[Span, ...], length: int) -> dict[str, list[str]]:
    """Spread what is known of ranges of a text over its tokens.

    A token takes the factors of every span it shares a character with; of two that disagree, the later span wins.
    Returns factor name -> one value for each of `length` positions, "" where nothing is known (start, end, padding).
    """
    factors: dict[str, list[str]] = {}
    for span in spans:
        for t, (start, stop) in enumerate(offsets):
            if start < span.stop and stop > span.start:
                for name, value in span.factors.items():
                    factors.setdefault(name, [""] * length)[t] = value
    return factors
