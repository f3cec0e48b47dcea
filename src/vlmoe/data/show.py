"""A contact sheet of samples as they enter the model: resized, patches hidden, tokens hidden."""

from __future__ import annotations

import copy
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlmoe.config import Recipe, UserError
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.collate import Collator, Ready
from vlmoe.data.counter import hash64
from vlmoe.data.loader import HELD_OUT_SEED
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import KINDS, Sample
from vlmoe.data.sources import build_sources, understood_of
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer
from vlmoe.data.words import parts_of_words

GREY = 128
COLUMNS = 4


def show_data(
    recipe: Recipe,
    out: str | Path,
    kind: str = "pair",
    split: str = "train",
    samples: int = 16,
    tokenizer: TextTokenizer | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Batch:
    """Draw the first samples of a split, masked as in training, into a PNG.

    Beside each image stands the image with its hidden patches greyed; below, the text as tokens, hidden ones in
    brackets. tokenizer: the run's; without one the recipe's is read or trained. say: gets lines for people, what the
    sources take for image and text.

    Returns the batch shown. Raises UserError for an unknown kind or split.
    """
    if kind not in KINDS:
        raise UserError(f"kind '{kind}': expected image, text or pair")
    if kind != "image" and not recipe.reads_texts:  # of a run that has none in its batches: its sources' own
        recipe = copy.deepcopy(recipe)
        setattr(recipe.data.batch, kind, 1)
    tokenizer = tokenizer or build_text_tokenizer(recipe)
    training = split == "train"
    seed = recipe.seed if training else HELD_OUT_SEED
    sources = build_sources(recipe.data, recipe.model, kind, split, seed)
    augment = recipe.data.augment if training else None
    mixture = Mixture(sources, seed, training, max(1, getattr(recipe.data.batch, kind)), augment)
    collator = Collator(recipe.model, recipe.data.masking, tokenizer, kind)
    positions = list(range(min(samples, len(mixture))))
    taken: Counter[str] = Counter()

    def ready(sample: Sample) -> Ready:
        taken.update(sample.taken)
        return collator.ready(sample)

    items = [mixture.draw(p, ready, []) for p in positions]
    for line in understood_of(mixture.sources):
        say(line)
    for part, count in taken.items():
        say(f"{count} of {len(items)} shown are {part}")
    mask_key = hash64("mask", seed, kind) if training else hash64("held out mask", seed, kind, split)
    batch = collator.batch(items, positions, mask_key)
    draw_batch(batch, tokenizer, Path(out), f"{recipe.name or 'recipe'}: {kind}, {split}")
    return batch


def hide_patches(image_HWC: np.ndarray, mask_P: np.ndarray) -> np.ndarray:
    """A square image with its hidden patches greyed."""
    grid = math.isqrt(len(mask_P))
    patch = image_HWC.shape[0] // grid
    mask_HW = mask_P.reshape(grid, grid).repeat(patch, axis=0).repeat(patch, axis=1)
    return np.where(mask_HW[..., None], np.uint8(GREY), image_HWC)


def mark_hidden(batch: Batch, b: int, tokenizer: TextTokenizer) -> str:
    """A sample's text in a line, hidden tokens in brackets: "a walk[ing] man"."""
    assert batch.text_BT is not None
    assert batch.target_BT is not None
    assert batch.valid_BT is not None
    line = ""
    rows = (batch.text_BT[b].tolist(), batch.target_BT[b].tolist(), batch.valid_BT[b].tolist())
    shown = [(token, target) for token, target, valid in zip(*rows, strict=True) if valid]
    ids = [token if target == IGNORE else target for token, target in shown]
    for part in parts_of_words(tokenizer, ids, [target != IGNORE for _, target in shown]):
        text = tokenizer.piece(part.ids)
        line += "" if part.joined else " "
        line += f"[{text}]" if part.hidden else text
    return line.strip()


def draw_batch(batch: Batch, tokenizer: TextTokenizer, out: Path, title: str) -> None:
    """The contact sheet of a batch."""
    from matplotlib.figure import Figure  # slow to import, needed here alone

    rows = math.ceil(len(batch) / COLUMNS)
    has_image, has_text = batch.image_BCHW is not None, batch.text_BT is not None
    height = (1.7 if has_image else 0) + (0.95 if has_text else 0.25)
    figure = Figure(figsize=(3.6 * COLUMNS, height * rows + 0.7))
    hidden = " and ".join(["grey patches"] * has_image + ["[words]"] * has_text)
    figure.suptitle(f"{title}. Hidden from the model: {hidden}.", fontsize=11)
    top = 1 - 0.6 / (height * rows + 0.7)
    for b, key in enumerate(batch.keys):
        row, column = divmod(b, COLUMNS)
        left, upper = (column + 0.03) / COLUMNS, top * (1 - row / rows)
        cell = top / rows
        figure.text(left, upper - 0.01 * cell, textwrap.shorten(key, 52), fontsize=6.5, color="#777777", va="top")
        share = 1.45 / height if has_image else 0.0
        if has_image:
            assert batch.image_BCHW is not None
            assert batch.patch_mask_BP is not None
            image = batch.image_BCHW[b].permute(1, 2, 0).numpy()
            views = (image, hide_patches(image, batch.patch_mask_BP[b].numpy()))
            for i, view in enumerate(views):
                width = 0.45 / COLUMNS
                place = (left + i * 0.48 / COLUMNS, upper - cell * (share + 0.07), width, cell * share * 0.98)
                axis = figure.add_axes(place)
                axis.imshow(view, interpolation="nearest")
                axis.set_axis_off()
        if has_text:
            text = textwrap.fill(mark_hidden(batch, b, tokenizer), 58, max_lines=6, placeholder=" ...")
            lower = upper - cell * (share + 0.09 if has_image else 0.12)
            figure.text(left, lower, text, fontsize=7.5, va="top", parse_math=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
