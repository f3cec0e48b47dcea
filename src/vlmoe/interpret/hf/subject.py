"""A sparse model of transformers as a subject (see `vlmoe.interpret.sites.Subject`).

Shape suffixes: B sequences of a batch · T tokens of a sequence, padding included · R = B * T rows · V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.config import UserError
from vlmoe.data.images import decode_image
from vlmoe.data.sample import BadSample
from vlmoe.interpret.hf.adapters import Adapter, Pass, adapter_for, find_sites, notes_of
from vlmoe.interpret.sites import Site, TokenTable

EARLY = 8  # tokens of a text after its first that count as early
MAX_PIXELS = 1 << 26  # of an image file, by its header


@dataclass
class HFBatch:
    """Some sequences, padded on the right. inputs: of the model's forward pass. kind: "pair" or "text". samples: key of
    each sequence. images: (side, side, 3) uint8, as the model was shown it, or None. grids: rows and columns of an
    image's tokens, None where they are no grid."""

    inputs: dict[str, Tensor]
    kind: str
    samples: list[str]
    images: list[np.ndarray | None]
    grids: list[tuple[int, int] | None]


class HFSubject:
    """A model of transformers, its sites, and how to feed it. notes: what is not shown of its routing, in words.

    model: for causal language modelling or image-text-to-text, in memory; put into evaluation mode. tokenizer: may be
    left out where processor has one. processor: the model's processor or its image processor alone, for images.
    adapter: in the place of the registered one for the model's type. max_tokens: longer texts are cut. image_size: side
    of the centred square that is cut of each image, in pixels, before the model's own image processor gets it.

    Raises:
        UserError: no adapter for the model, or no sparse layer in it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        *,
        adapter: Adapter | None = None,
        max_tokens: int = 512,
        image_size: int = 448,
    ) -> None:
        self.model = model.eval()
        self.config: Any = getattr(model, "config", None)
        self.tokenizer: Any = tokenizer if tokenizer is not None else getattr(processor, "tokenizer", None)
        if self.tokenizer is None:
            raise UserError("HFSubject: expected a tokenizer, or a processor that has one, got neither")
        self.processor, self.max_tokens, self.image_size = processor, max_tokens, image_size
        self._now = Pass()
        sites = find_sites(model, adapter or adapter_for(self.config), self._now)
        self.sites: list[Site] = list(sites)
        self.notes = notes_of(sites, model)
        self._words: dict[int, tuple[str, str]] = {}

    # ------------------------------------------------------------------------------------------------------- batches
    def batches(self, texts: Sequence[str], images: Sequence[Path] | None = None, size: int = 8) -> list[HFBatch]:
        """Texts, or pairs of the n-th image and the n-th text, in their order, `size` to a batch.

        Raises:
            UserError: no texts, one without a token, not as many images as texts, an image that cannot be read, a model
                that takes none.
        """
        if not texts:
            raise UserError("texts: expected at least one, got none")
        if size < 1:
            raise UserError(f"size: expected sequences in a batch, at least 1, got {size}")
        if images is not None and len(images) != len(texts):
            raise UserError(f"images: expected one for each of the {len(texts)} texts, got {len(images)}")
        made = []
        for start in range(0, len(texts), size):
            some = list(texts[start : start + size])
            keys = [f"{start + n + 1:05d}" for n in range(len(some))]
            if images is None:
                made.append(self._texts(some, keys))
            else:
                files = images[start : start + size]
                keys = [f"{key} {file.stem}" for key, file in zip(keys, files, strict=True)]
                made.append(self._pairs(some, [_square(file, self.image_size) for file in files], keys))
        return made

    def _texts(self, texts: list[str], keys: list[str]) -> HFBatch:
        rows = [self._ids(text, key) for text, key in zip(texts, keys, strict=True)]
        return HFBatch(self._pad(rows), "text", keys, [None] * len(keys), [None] * len(keys))

    def _pairs(self, texts: list[str], squares: list[np.ndarray], keys: list[str]) -> HFBatch:
        if getattr(self.config, "image_token_id", None) is None:
            raise UserError(f"images: models of type {self.config.model_type!r} take none")
        if self.processor is None:
            raise UserError("images: expected the model's processor or image processor, got none")
        marks = marks_of(self.config)
        if marks is None or not hasattr(self._image_processor(), "merge_size"):
            inputs: dict[str, Tensor] = self._by_processor(texts, squares)
            return HFBatch(inputs, "pair", keys, list(squares), [None] * len(keys))
        seen = dict(self._image_processor()(images=squares, return_tensors="pt"))
        merge = self._image_processor().merge_size
        grids = [(int(h) // merge, int(w) // merge) for _, h, w in seen["image_grid_thw"].tolist()]
        before, patch, after = marks
        rows = []
        for text, key, (height, width) in zip(texts, keys, grids, strict=True):
            ids = self._ids(text, key)
            start = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            rows.append(ids[:start] + [before] + [patch] * (height * width) + [after] + ids[start:])
        inputs = self._pad(rows) | seen
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == patch).long()
        if "moe_mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            # ERNIE's experts of images serve their marks, too
            inputs["moe_mm_token_type_ids"] = torch.isin(inputs["input_ids"], torch.tensor(marks)).long()
        return HFBatch(inputs, "pair", keys, list(squares), list(grids))

    def _image_processor(self) -> Any:
        return getattr(self.processor, "image_processor", self.processor)

    def _by_processor(self, texts: list[str], squares: list[np.ndarray]) -> dict[str, Tensor]:
        """For models whose image tokens only their own processor knows how to lay out."""
        token = getattr(self.processor, "image_token", None)
        if token is None:
            raise UserError(
                f"images: models of type {self.config.model_type!r} need their whole processor, which could not be "
                "read (it may need torchvision)"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        cut = [self.tokenizer(t, add_special_tokens=False)["input_ids"][: self.max_tokens] for t in texts]
        told = [f"{token}{self.tokenizer.decode(ids)}" for ids in cut]
        pictures = [[square] for square in squares]
        return dict(self.processor(text=told, images=pictures, padding=True, padding_side="right", return_tensors="pt"))

    def _ids(self, text: str, key: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        if not ids:
            raise UserError(f"texts: text {key} gives no tokens")
        return ids

    def _pad(self, rows: list[list[int]]) -> dict[str, Tensor]:
        pad, longest = self.tokenizer.pad_token_id or 0, max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    # ---------------------------------------------------------------------------------------------------------- runs
    def run(self, batch: HFBatch) -> Any:
        """A forward pass, without gradient: the model's output."""
        first = next(self.model.parameters())
        inputs = {
            name: value.to(first.device, first.dtype) if value.is_floating_point() else value.to(first.device)
            for name, value in batch.inputs.items()
        }
        self._now.valid_R = batch.inputs["attention_mask"].bool().flatten().to(first.device)
        self._now.vision_R = self._vision(batch).flatten().to(first.device)
        try:
            with torch.no_grad():
                return self.model(**inputs, use_cache=False)
        finally:
            self._now.valid_R = self._now.vision_R = None

    def losses(self, batch: HFBatch) -> np.ndarray:
        """(R,) float64: cross-entropy of each text token given all before it; nan at the first of a sequence, image
        tokens and padding, and in pairs at special tokens, which the layout sets and no writer chose."""
        logits_BTV = self.run(batch).logits
        ids_BT = batch.inputs["input_ids"].to(logits_BTV.device)
        told_BT = (batch.inputs["attention_mask"].bool() & ~self._vision(batch)).numpy()
        if batch.kind == "pair":
            told_BT &= ~np.isin(batch.inputs["input_ids"].numpy(), self.tokenizer.all_special_ids)
        loss_BT = np.full(ids_BT.shape, np.nan)
        for row in range(len(ids_BT)):  # one by one: a large vocabulary times all rows may not fit
            given = F.cross_entropy(logits_BTV[row, :-1].float(), ids_BT[row, 1:], reduction="none")
            loss_BT[row, 1:] = given.cpu().numpy()
        return np.where(told_BT, loss_BT, np.nan).reshape(-1)

    # -------------------------------------------------------------------------------------------------------- tokens
    def tokens(self, batch: HFBatch) -> TokenTable:
        """The batch's tokens. Factors, of text only: token_class (word, number, punctuation, space, special) and place
        (first, early: the next 8, later). Marks of an image that the experts of images serve are vision at -1, -2."""
        ids_BT, valid_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        vision_BT, patch_BT = self._vision(batch), self._patches(batch)
        text_BT = ~vision_BT & valid_BT
        position_BT = torch.where(patch_BT, patch_BT.cumsum(1) - 1, -(vision_BT & ~patch_BT).long().cumsum(1))
        position_BT = torch.where(vision_BT, position_BT, (~vision_BT).cumsum(1) - 1)
        text_R, position_R = text_BT.flatten().numpy(), position_BT.flatten().numpy()
        known = [self._word(i) if said else ("", "") for i, said in zip(ids_BT.flatten().tolist(), text_R, strict=True)]
        place = np.where(position_R == 0, "first", np.where(position_R <= EARLY, "early", "later"))
        return TokenTable(
            kind=batch.kind,
            samples=list(batch.samples),
            sample_R=np.repeat(np.arange(len(ids_BT)), ids_BT.shape[1]),
            modality_R=np.where(vision_BT.flatten().numpy(), "vision", "text"),
            position_R=position_R,
            valid_R=valid_BT.flatten().numpy(),
            text_R=np.array([word for word, _ in known], dtype=object),
            factors={
                "token_class": np.array([kind for _, kind in known], dtype=object),
                "place": np.where(text_R, place, "").astype(object),
            },
        )

    def _patches(self, batch: HFBatch) -> Tensor:
        """bool (B, T): tokens that stand for a part of an image."""
        ids_BT = batch.inputs["input_ids"]
        image = [getattr(self.config, key, None) for key in ("image_token_id", "image_token_index")]
        return torch.isin(ids_BT, torch.tensor([i for i in image if i is not None], dtype=ids_BT.dtype))

    def _vision(self, batch: HFBatch) -> Tensor:
        """bool (B, T): tokens of an image, as the model itself tells them apart."""
        for name in ("moe_mm_token_type_ids", "mm_token_type_ids"):
            if name in batch.inputs:
                return batch.inputs[name] > 0
        return self._patches(batch)

    def _word(self, token: int) -> tuple[str, str]:
        """A token in words, with the space it begins with, and its class."""
        if token not in self._words:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            raw = self.tokenizer.convert_ids_to_tokens(token) or ""
            if raw.startswith(("▁", "Ġ")) and not text.startswith(" "):  # SentencePiece drops it at the start of a text
                text = f" {text}"
            self._words[token] = (text, _class_of(text, token in self.tokenizer.all_special_ids))
        return self._words[token]


def _class_of(text: str, special: bool) -> str:
    bare = text.strip()
    if special:
        return "special"
    if not bare:
        return "space"
    if any(c.isalpha() for c in bare):
        return "word"
    return "number" if any(c.isnumeric() for c in bare) else "punctuation"


def marks_of(config: Any) -> tuple[int, int, int] | None:
    """Ids of the tokens before, for and after an image, where an image is a grid between two marks."""
    for kind in ("vision", "image"):
        start, end = (getattr(config, f"{kind}_{side}_token_id", None) for side in ("start", "end"))
        if start is not None and end is not None:
            return int(start), int(config.image_token_id), int(end)
    return None


def _square(file: Path, side: int) -> np.ndarray:
    try:
        return decode_image(file.read_bytes(), file.name, side, MAX_PIXELS)
    except OSError as error:
        raise UserError(f"images: {file}: {error.strerror or error}") from None
    except BadSample as error:
        raise UserError(f"images: {file}: {error}") from None
