"""Examples to tensors: what every downstream task builds its batches from.

Shape suffixes: B batch · T text tokens · P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlmoe.config import ModelConfig
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.downstream.example import Example
from vlmoe.data.masking import mask_tokens
from vlmoe.data.text_tokenizer import TextTokenizer


@dataclass
class Prepare:
    """Makes batches of a model's size. blind: "image" or "text" leaves that part out, for baselines."""

    model: ModelConfig
    tokenizer: TextTokenizer
    blind: str = "none"

    def images(self, images: Sequence[np.ndarray], keys: Sequence[str]) -> Batch:
        batch = Batch(keys=list(keys))
        self._add_images(batch, images)
        return batch

    def texts(self, texts: Sequence[str], keys: Sequence[str]) -> Batch:
        batch = Batch(keys=list(keys))
        self._add_texts(batch, [self.encode(text) for text in texts])
        return batch

    def pairs(self, images: Sequence[np.ndarray], texts: Sequence[str], keys: Sequence[str]) -> Batch:
        """Images with texts, or what `blind` leaves of them."""
        batch = Batch(keys=list(keys))
        if self.blind != "image":
            self._add_images(batch, images)
        if self.blind != "text":
            self._add_texts(batch, [self.encode(text) for text in texts])
        return batch

    def two_texts(self, first: Sequence[str], second: Sequence[str], keys: Sequence[str]) -> Batch:
        """start first end second end (RoBERTa's way to join two texts, with one end token between them). The first is
        cut where both are too long; `blind` "text" leaves it out."""
        rows = []
        for a, b in zip(first, second, strict=True):
            ids_b = self.encode(b)[1:]
            if self.blind == "text":
                rows.append([self.tokenizer.start_id, *ids_b])
                continue
            ids_a = self.encode(a)[:-1]
            room = max(1, self.model.max_text - len(ids_b) - 1)
            rows.append([*ids_a[:room], self.tokenizer.end_id, *ids_b])
        batch = Batch(keys=list(keys))
        self._add_texts(batch, [row[: self.model.max_text] for row in rows])
        return batch

    def hidden_captions(
        self,
        images: Sequence[np.ndarray],
        texts: Sequence[str],
        keys: Sequence[str],
        share: float,
        rngs: Sequence[np.random.Generator],
    ) -> Batch:
        """Pairs in which a share of the caption's tokens is hidden and must be predicted, the end among them: it is how
        a caption learns to stop."""
        batch = self.pairs(images, texts, keys)
        assert batch.text_BT is not None and batch.valid_BT is not None
        text_BT, target_BT = batch.text_BT, torch.full_like(batch.text_BT, IGNORE)
        for b, rng in enumerate(rngs):
            n = int(batch.valid_BT[b].sum())
            maskable = np.array([False, *(i != self.tokenizer.unk_id for i in text_BT[b, 1:n].tolist())])
            hidden = torch.from_numpy(mask_tokens(maskable, share, rng))
            target_BT[b, :n] = torch.where(hidden, text_BT[b, :n], IGNORE)
            text_BT[b, :n] = torch.where(hidden, self.tokenizer.mask_id, text_BT[b, :n])
        batch.target_BT = target_BT
        return batch

    def encode(self, text: str) -> list[int]:
        """Ids with start and end, cut to `model.max_text`."""
        ids = self.tokenizer.encode(text)[0][: self.model.max_text - 2]
        return [self.tokenizer.start_id, *ids, self.tokenizer.end_id]

    def _add_images(self, batch: Batch, images: Sequence[np.ndarray]) -> None:
        batch.image_BCHW = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).contiguous()

    def _add_texts(self, batch: Batch, rows: list[list[int]]) -> None:
        T = max(map(len, rows))
        text_BT = np.full((len(rows), T), self.tokenizer.pad_id, dtype=np.int64)
        for b, row in enumerate(rows):
            text_BT[b, : len(row)] = row
        lengths = torch.tensor([len(row) for row in rows])
        batch.text_BT = torch.from_numpy(text_BT)
        batch.valid_BT = torch.arange(T) < lengths[:, None]


def label_numbers(examples: Sequence[Example]) -> torch.Tensor:
    """int64 (B,), -1 where the truth is not known."""
    return torch.tensor([-1 if e.label is None else e.label for e in examples])
