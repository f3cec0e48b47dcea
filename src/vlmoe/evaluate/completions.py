"""Completions in words beside the picture they belong to: for the terminal and as one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.show import hide_patches
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.data.words import PartOfWord, parts_of_words
from vlmoe.evaluate.masked import fill_in
from vlmoe.evaluate.restore import restore
from vlmoe.tasks.pretrain import MaskedDataModelling, hides_patches

HIDDEN = "____"
RIGHT, WRONG, PLAIN = "#0072B2", "#D55E00", "#222222"  # Okabe-Ito: told apart by colour-blind readers too


@dataclass
class Word:
    """A word or a part of one as text, with the completion where it was hidden."""

    truth: str
    hidden: bool
    seen: str = ""  # filled in with the image
    blind: str = ""  # filled in without
    joined: bool = False  # goes on with the word before it


@dataclass
class Completion:
    key: str
    image: np.ndarray  # uint8 (H, W, 3)
    shown: np.ndarray  # the image with hidden patches greyed, as in training
    restored: np.ndarray | None  # hidden patches replaced by what the model predicts, where codes can be decoded
    words: list[Word]

    def line(self, view: str) -> str:
        """`shown`, `truth`, `seen` or `blind`, as one line; completions stand in brackets."""
        if view in {"shown", "truth"}:
            texts = [HIDDEN if w.hidden and view == "shown" else w.truth for w in self.words]
        else:
            texts = [f"[{getattr(w, view)}]" if w.hidden else w.truth for w in self.words]
        line = "".join(text if w.joined else f" {text}" for w, text in zip(self.words, texts, strict=True))
        return line.strip()


@torch.no_grad()
def complete(model: MaskedDataModelling, tokenizer: TextTokenizer, batch: Batch, count: int) -> list[Completion]:
    """The first `count` pairs of a held-out batch, completed with and without their image."""
    assert batch.image_BCHW is not None and batch.text_BT is not None
    assert batch.target_BT is not None and batch.valid_BT is not None and batch.patch_mask_BP is not None
    was_training = model.training
    model.eval()
    seen_BT, blind_BT = fill_in(model, batch, "seen"), fill_in(model, batch, "blind")
    restored = restore(model, batch) if hides_patches(batch) else None
    model.train(was_training)
    hidden_BT = batch.target_BT != IGNORE
    truth_BT = torch.where(hidden_BT, batch.target_BT, batch.text_BT)
    completions = []
    for b in range(min(count, len(batch))):
        words = []
        T = int(batch.valid_BT[b].sum())
        for part in parts_of_words(tokenizer, truth_BT[b, :T].tolist(), hidden_BT[b, :T].tolist()):
            seen, blind = (guess_of(tokenizer, int(x[b, part.position]), part) for x in (seen_BT, blind_BT))
            words.append(Word(tokenizer.piece(part.ids), part.hidden, seen, blind, part.joined))
        image = batch.image_BCHW[b].permute(1, 2, 0).cpu().numpy()
        shown = hide_patches(image, batch.patch_mask_BP[b].cpu().numpy())
        filled = None if restored is None else restored[b].permute(1, 2, 0).cpu().numpy()
        completions.append(Completion(batch.keys[b], image, shown, filled, words))
    return completions


def guess_of(tokenizer: TextTokenizer, id: int, part: PartOfWord) -> str:
    """A completion of a hidden part as text, empty for others. One that goes on with a word where the truth begins one
    is written "-ing", the other way round it has a blank before it: both may be spelled as the truth is."""
    if not part.hidden:
        return ""
    text, continues = tokenizer.piece([id]), tokenizer.continues(id)
    if continues == tokenizer.continues(part.ids[0]):
        return text
    return f"-{text}" if continues else f" {text}"


def draw(completions: list[Completion], path: Path, title: str) -> None:
    """One row a completion: the picture, the picture with patches hidden and restored, and the sentences. title: whose
    they are."""
    from matplotlib import pyplot as plt  # slow to import, needed here alone

    rows = len(completions)
    figure, axes = plt.subplots(
        rows, 4, figsize=(14, 1.55 * rows + 0.5), gridspec_kw={"width_ratios": [1, 1, 1, 7]}, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, axis in zip(("image", "patches hidden", "restored", ""), axes[0], strict=True):
        axis.set_title(column, fontsize=10)
    for row, item in zip(axes, completions, strict=True):
        for axis, image in zip(row, (item.image, item.shown, item.restored), strict=False):
            axis.set_axis_off()
            if image is not None:
                axis.imshow(image, interpolation="nearest")
        row[3].set_axis_off()
        row[3].set_xlim(0, 1)
        row[3].set_ylim(0, 1)
    figure.canvas.draw()
    for row, item in zip(axes, completions, strict=True):
        y = 0.97
        y = _write(row[3], y, "shown", [(HIDDEN if w.hidden else w.truth, PLAIN, w.joined) for w in item.words])
        for label, view in (("with image", "seen"), ("without", "blind")):
            pieces = [
                (getattr(w, view) or "·", RIGHT if getattr(w, view) == w.truth else WRONG, w.joined)
                if w.hidden
                else (w.truth, PLAIN, w.joined)
                for w in item.words
            ]
            y = _write(row[3], y, label, pieces, bold=True)
    figure.suptitle(f"{title}: held-out samples. Filled-in words: blue right, vermilion wrong.", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _write(axis: Any, y: float, label: str, pieces: list[tuple[str, str, bool]], bold: bool = False) -> float:
    """Write words of several colours from height y on, wrapping at the right edge; returns the next free height.

    pieces: text, colour, and whether it goes on with the word before it.
    """
    renderer = axis.figure.canvas.get_renderer()
    inverse = axis.transData.inverted()
    axis.text(0.0, y, label, fontsize=8.5, color="#777777", va="top")
    x, left, height, blank = 0.1, 0.1, 0.155, 0.008
    for text, color, joined in pieces:
        x += 0 if joined or x == left else blank
        weight = "bold" if bold and color != PLAIN else "normal"
        piece = axis.text(x, y, text, fontsize=9, color=color, va="top", weight=weight, parse_math=False)
        right = inverse.transform(piece.get_window_extent(renderer))[1][0]
        if right > 1 and x > left:
            x, y, shift = left, y - height, right - x
            piece.set_position((x, y))
            right = x + shift
        x = right
    return y - height - 0.02
