"""What anyone's data is like, from some of its samples: what a first recipe for it has to know."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from rich.progress import track

from vlmoe.config import UserError
from vlmoe.data.check import reason_class
from vlmoe.data.files import FileOptions, FileSource, choose_caption
from vlmoe.data.images import decode_with_size
from vlmoe.data.sample import BadSample
from vlmoe.data.sources import open_files

LOOKED_AT = 2000  # samples, at most
_PLACES = 20  # in the data where they stand: parquet is read a row group at a time
_DECODED = 32  # pixels to which images are resized: a run resizes them anew
_NO_CAPTION = ("no caption", "empty caption")
_SCRIPTS = {"CJK": "Han", "FULLWIDTH": "full-width Latin", "HALFWIDTH": "half-width Katakana"}  # others as named


@dataclass
class Survey:
    """type, path, image_column, text_column: as in a recipe's source. kind: pair, or image where none has a caption.
    samples: how many there are. looked_at: of them. bad: reason -> how many of those cannot be used. first_bad: where
    and why. sides: of each good image the shorter side in pixels. texts: the good captions."""

    type: str
    path: str
    kind: str
    image_column: str
    text_column: str
    samples: int = 0
    looked_at: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    sides: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def bad_share(self) -> float:
        return self.bad.total() / self.looked_at

    @property
    def words(self) -> list[int]:
        return [len(text.split()) for text in self.texts]

    def scripts(self) -> dict[str, float]:
        """Script -> its share of the captions' letters, the most frequent first. By Unicode's names of letters, which
        begin with their script; nothing is guessed of languages that share one."""
        letters = Counter(letter for text in self.texts for letter in text if letter.isalpha())
        scripts: Counter[str] = Counter()
        for letter, count in letters.items():
            scripts[unicodedata.name(letter, "unnamed").split()[0].partition("-")[0]] += count
        return {_SCRIPTS.get(name, name.capitalize()): n / letters.total() for name, n in scripts.most_common()}


def survey(
    type: str,
    path: str,
    kind: str = "auto",
    image_column: str = "image",
    text_column: str = "text",
    max_pixels: int = 64_000_000,
    progress: bool = False,
) -> Survey:
    """Look at up to `LOOKED_AT` samples of shards, a folder, parquet or arrow files, each image decoded in full.

    kind: pair, image, or auto, which takes images alone where no sample has a caption.

    Raises UserError when the data cannot be opened, or none of the samples can be used.
    """
    if kind not in {"auto", "pair", "image"}:
        raise UserError(f"--kind got '{kind}', wanted pair, image or auto")
    found = Survey(type, path, "image" if kind == "image" else "pair", image_column, text_column)
    _look(found, max_pixels, progress)
    if kind == "auto" and found.bad.total() == found.looked_at and {*found.bad} <= {*_NO_CAPTION}:
        found = Survey(type, path, "image", image_column, text_column)
        _look(found, max_pixels, progress)
    if not found.looked_at:
        raise UserError(f"{path}: no sample in it; vlmoe data check says what there is")
    if found.bad.total() == found.looked_at:
        raise UserError(f"{path}: no sample of {found.looked_at} can be used; the first: {found.first_bad}")
    return found


def _look(found: Survey, max_pixels: int, progress: bool) -> None:
    columns = found.image_column, found.text_column
    options = FileOptions(found.kind, found.path, "all", _DECODED, max_pixels, *columns)
    source = open_files(found.type, options)
    found.samples = len(source)
    indices = _spread(len(source))
    found.looked_at = len(indices)
    for index in track(indices, "Looking at the data") if progress else indices:
        try:
            side, text = _sample(source, int(index), max_pixels)
        except BadSample as error:
            found.bad[reason_class(error.reason)] += 1
            found.first_bad = found.first_bad or str(error)
            continue
        found.sides.append(side)
        if text is not None:
            found.texts.append(text)


def _spread(samples: int) -> np.ndarray:
    """All samples, or runs of neighbours in places spread over the data."""
    if samples <= LOOKED_AT:
        return np.arange(samples)
    each = LOOKED_AT // _PLACES
    starts = np.linspace(0, samples - each, _PLACES).astype(np.int64)
    return (starts[:, None] + np.arange(each)).ravel()


def _sample(source: FileSource, index: int, max_pixels: int) -> tuple[int, str | None]:
    """The image's shorter side and the caption. Raises BadSample."""
    row = int(source.rows[index])
    key = source.key(row)
    parts = source.read(row, image=True)
    text = choose_caption(parts.captions, key, 0, source.options.turns)[0] if source.kind == "pair" else None
    if parts.image is None:
        raise BadSample(key, "no image")
    return min(decode_with_size(parts.image, key, _DECODED, max_pixels)[1]), text


def quantiles(values: Iterable[float], *shares: float) -> list[int]:
    return [round(float(v)) for v in np.quantile(list(values), shares)]
