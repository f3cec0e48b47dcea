"""What all file sources share: captions, codes, the held-out share, checks of bytes that came from anywhere."""

from __future__ import annotations

import codecs
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmoe.config import DataConfig, ModelConfig, SourceConfig, UserError, parse_json
from vlmoe.data.accounts import Account
from vlmoe.data.augment import Views
from vlmoe.data.conversations import as_turns, read_conversation
from vlmoe.data.counter import hash64
from vlmoe.data.images import decode_image
from vlmoe.data.sample import BadSample, Sample, Span
from vlmoe.data.urls import FetchOptions

HELD_OUT = 0.01  # share of the samples, where a recipe says nothing else
MAX_TEXT_BYTES = 1 << 16  # of one caption or line; what lies beyond is not read: no model here sees that far


@dataclass(frozen=True)
class FileOptions:
    """How files are read.

    patches: how many stored codes an image must have, 0 to ignore them. factors: read the truth that `make_shards`
    wrote beside the samples. turns, images, held_out: as in `SourceConfig`. fetch: how files are brought that a URL
    names.
    """

    kind: str
    path: str
    split: str = "train"  # train, val, or all
    image_size: int = 48
    max_pixels: int = 64_000_000
    image_column: str = "image"
    text_column: str = "text"
    patches: int = 0
    factors: bool = False
    turns: str = "answer"
    images: str = ""
    held_out: float = HELD_OUT
    fetch: FetchOptions = field(default_factory=FetchOptions)

    @classmethod
    def of(cls, source: SourceConfig, data: DataConfig, model: ModelConfig, split: str, factors: bool) -> FileOptions:
        stored = data.visual_tokenizer.type == "codes" and source.kind != "text"
        return cls(
            source.kind, source.path, split, model.image_size, data.max_pixels, source.image_column,
            source.text_column, (model.image_size // model.patch) ** 2 if stored else 0, factors,
            source.turns, source.images, source.held_out,
            FetchOptions(data.stream.cache, round(data.stream.cache_gb * 1e9), data.stream.attempts),
        )  # fmt: skip


class FileSource(ABC):
    """Samples in files. Subclasses list entries and read one entry's raw parts; this class makes samples of them.

    `rows`: the entries of the split, in file order.
    """

    def __init__(self, options: FileOptions) -> None:
        self.options = options
        self.kind = options.kind
        self.name = options.path
        self.rows: Sequence[int] | np.ndarray = np.zeros(0, dtype=np.int64)

    @abstractmethod
    def key(self, row: int) -> str:
        """Where an entry is, for people: file and name or number in it."""

    @abstractmethod
    def read(self, row: int, image: bool) -> Parts:
        """The raw parts of an entry, the image only if asked for. Raises BadSample."""

    @abstractmethod
    def account(self) -> Account:
        """What there is, and what of it is no part of a sample."""

    def understood(self) -> list[str]:
        """For people: what of the files is taken for image, text and codes, a sentence each, where that had to be found
        out."""
        return []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index, 0)

    def draw(self, index: int, epoch: int, views: Views | None = None) -> Sample:
        """A sample as it is in an epoch: of several captions, number (index + epoch) modulo their count. views: as of
        `make_sample`."""
        row = int(self.rows[index])
        parts = self.read(row, image=self.kind != "text")
        return make_sample(parts, self.key(row), self.options, index + epoch, views)

    def text(self, index: int) -> str:
        """The text alone, as in epoch 0, without reading the image."""
        row = int(self.rows[index])
        return choose_caption(self.read(row, image=False).captions, self.key(row), index, self.options.turns)[0]


@dataclass
class Parts:
    """image: encoded bytes. captions: one text, several, or a conversation. codes, truth: as stored, unchecked. taken:
    as of `Sample`."""

    image: bytes | None = None
    captions: Any = None
    codes: Any = None
    truth: dict[str, Any] | None = None
    taken: tuple[str, ...] = ()


def make_sample(parts: Parts, key: str, options: FileOptions, number: int, views: Views | None = None) -> Sample:
    """A sample of an entry's parts. number: of several captions it takes this one, modulo their count. views: what of
    the image is shown; None: the centre square.

    Raises BadSample.
    """
    text, taken = None, parts.taken
    if options.kind != "image":
        text, part = choose_caption(parts.captions, key, number, options.turns)
        taken = (*taken, part) if part else taken
    image = codes = None
    if options.kind != "text":
        if parts.image is None:
            raise BadSample(key, "no image")
        notes: list[str] = []
        view = views() if views else None
        image = decode_image(parts.image, key, options.image_size, options.max_pixels, view, notes)
        taken = (*taken, *notes)
        if options.patches:
            codes = check_codes(parts.codes, key, options.patches)
    patch_factors, spans = read_truth(parts.truth, key) if parts.truth else ({}, ())
    return Sample(key, image, text, codes, patch_factors, spans, taken)


def choose_caption(captions: Any, key: str, number: int, turns: str = "answer") -> tuple[str, str]:
    """One of an entry's captions: number modulo their count. Of a conversation what `turns` says, and that in words.

    Raises BadSample when there is none or it is no text.
    """
    part = ""
    if (conversation := as_turns(captions)) is not None:
        captions, part = read_conversation(conversation, key, turns)
    if isinstance(captions, (list, tuple, np.ndarray)):
        usable = [c for c in captions if not isinstance(c, str) or c.strip()]
        captions = usable[number % len(usable)] if usable else ""
    if captions is None:
        raise BadSample(key, "no caption")
    if not isinstance(captions, str):
        raise BadSample(key, f"caption is {type(captions).__name__}, expected text or a list of texts")
    text = " ".join(captions[:MAX_TEXT_BYTES].split())
    if not text:
        raise BadSample(key, "empty caption")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadSample(key, "half of a surrogate pair in the caption")
    return text, part


def decode_text(raw: bytes, key: str) -> str:
    """UTF-8 bytes (at most 64 KiB of them) to text. Raises BadSample naming the first bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        return decoder.decode(raw[:MAX_TEXT_BYTES], final=len(raw) <= MAX_TEXT_BYTES)
    except UnicodeDecodeError as error:
        raise BadSample(key, f"text is not UTF-8: byte {raw[error.start]:#04x} at {error.start}") from None


def decode_json(raw: bytes, key: str) -> dict[str, Any]:
    """A JSON object. Raises BadSample."""
    try:
        value = parse_json(raw, "broken JSON")
    except UserError as error:
        raise BadSample(key, str(error)) from None
    if not isinstance(value, dict):
        raise BadSample(key, f"JSON is a {type(value).__name__}, expected an object")
    return value


def decode_codes(raw: bytes, key: str) -> np.ndarray:
    """An array from .npy bytes; nothing in it is unpickled. Raises BadSample."""
    try:
        return np.load(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:
        raise BadSample(key, f"broken codes: {error}") from None


def check_codes(codes: Any, key: str, patches: int) -> np.ndarray:
    """int64 (patches,). Raises BadSample when codes are missing, of another shape, no whole numbers, or negative."""
    side = math.isqrt(patches)
    wanted = f"expected {patches} whole numbers, one for each patch of {side} x {side}"
    if codes is None:
        raise BadSample(key, f"no visual codes (codes.npy or a 'codes' column): {wanted}")
    try:
        array = np.asarray(codes)
    except ValueError:
        raise BadSample(key, f"visual codes of uneven rows: {wanted}") from None
    if array.dtype.kind not in "iu" or array.shape not in {(patches,), (side, side)}:
        raise BadSample(key, f"visual codes are {array.dtype} {array.shape}: {wanted}")
    if array.min() < 0:
        raise BadSample(key, f"visual code {array.min()} is below 0")
    return array.reshape(-1).astype(np.int64)


def write_truth(sample: Sample) -> dict[str, Any]:
    """What a sample's source knows of it, for the sample's .json member."""
    spans = [[span.start, span.stop, span.factors] for span in sample.spans]
    return {"patch_factors": sample.patch_factors, "spans": spans}


def read_truth(truth: dict[str, Any], key: str) -> tuple[dict[str, list[str]], tuple[Span, ...]]:
    """Patch factors and spans as `write_truth` wrote them. Raises BadSample."""
    try:
        patch_factors = {str(k): [str(v) for v in values] for k, values in truth.get("patch_factors", {}).items()}
        spans = tuple(Span(int(start), int(stop), dict(known)) for start, stop, known in truth.get("spans", ()))
    except (AttributeError, TypeError, ValueError) as error:
        raise BadSample(key, f"broken factors in the .json: {error}") from None
    return patch_factors, spans


def split_rows(hashes: np.ndarray, split: str, share: float = HELD_OUT) -> np.ndarray:
    """Entry numbers of a split, from one uint64 hash for each entry.

    A share of the entries is held out ("val"), at least one unless it is 0; which ones depends on their file and place
    alone, so the choice does not change when files are added, and an image is held out from image and pair sources
    alike.
    """
    held_out = is_held_out(hashes, share)
    if share > 0 and len(hashes) > 1 and not held_out.any():
        held_out[np.argmin(hashes)] = True
    return chosen_rows(held_out, split)


def is_held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool (n,): whether each entry of these uint64 hashes belongs to the share held out. Of a larger share they are
    the same ones, and others."""
    if share in (0, 1):
        return np.full(len(hashes), share == 1)
    within = np.minimum((hashes // 100) / (2.0**64 / 100), 1 - 1e-9)
    return hashes % 100 + within < 100 * share  # of 0.01 those whose hash ends in 00


def chosen_rows(held_out: np.ndarray, split: str) -> np.ndarray:
    """Entry numbers of a split, from whether each entry is held out."""
    if split == "all":
        return np.arange(len(held_out), dtype=np.int64)
    return np.flatnonzero(held_out if split == "val" else ~held_out)


def hash_entries(file: str, count: int) -> np.ndarray:
    """uint64 (count,): a hash for each entry of a file, from the file's name and the entry's number."""
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(hash64("entry", file))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
