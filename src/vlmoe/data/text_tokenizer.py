"""Text tokens: one small interface over three kinds of tokenizer.

- `corpus`: trained on the run's own texts (`vlmoe.data.text_training`).
- `hf`: anybody's, as far as `tokenizers` or sentencepiece reads it (`vlmoe.data.tokenizer_files`). Special tokens are
  found by their usual names; missing ones are added at the end.
- `sentencepiece`: a .model or .spm file. Where the special ids are sentencepiece's defaults, ids are laid out as in
  XLM-RoBERTa, which is how BEiT-3 uses beit3.spm: <s>=0, <pad>=1, </s>=2, <unk>=3, then the pieces, shifted by one,
  then <mask> (64,001 for beit3.spm's 64,000 pieces; the rest of its 64,010 embedding rows are unused). Others (SigLIP,
  T5, Gemma) keep their ids, and what they lack is added at the end.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data workers do not mix

import sentencepiece
import tokenizers
from tokenizers import models

from vlmoe.config import AlteredError, Recipe, UserError, check_files, read_sealed, write_sealed
from vlmoe.data.canonical import Canonical, back
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import BadSample
from vlmoe.data.sources import build_sources, read_text
from vlmoe.data.text_training import BLANK, byte_pairs, no_words, word_pieces
from vlmoe.data.tokenizer_files import canonical_of, find_tokenizer, read_foreign

DESCRIPTION = "text.json"  # written last: its presence says that the tokenizer is complete
FILES = {"hf": "tokenizer.json", "corpus": "tokenizer.json", "sentencepiece": "sentencepiece.model"}
NAMES = {  # of special tokens, most usual first
    "start": ("[CLS]", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|begin_of_text|>"),
    "end": ("[SEP]", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "unk": ("[UNK]", "<unk>", "<|unk|>"),
}

Encoded = tuple[list[int], list[tuple[int, int]]]


class TextTokenizer(ABC):
    """Text to ids and back.

    `encode` adds no special tokens; who builds a sequence puts `start_id` and `end_id` around it. Special tokens
    spelled out in a text ("[MASK]", "<s>") are ordinary characters. `size`: one more than the largest id. `unk_id`:
    None where every text can be spelled. `added`: special tokens that it lacked and was given. `canonical`: the form
    that a text is brought into first.
    """

    type: str
    size: int
    start_id: int
    end_id: int
    pad_id: int
    mask_id: int
    unk_id: int | None
    added: tuple[str, ...] = ()
    canonical: Canonical | None = None
    prefix = ""  # of tokens that go on with a word, where those have one

    @abstractmethod
    def encode(self, text: str) -> Encoded:
        """Ids, and for each the range of characters (start, stop) of `text` it stands for."""

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids; start, end and padding are left out, a mask is shown by its name."""

    @abstractmethod
    def token(self, id: int) -> str:
        """A token's name in the vocabulary: "##ing", "▁red", "<0xE2>"."""

    @abstractmethod
    def continues(self, id: int) -> bool:
        """Whether a token goes on with the word before it, without a blank."""

    def piece(self, ids: list[int]) -> str:
        """Tokens of one word as text, its beginning or any part of it; a character's bytes without the rest by name."""
        text = self.decode(ids).removeprefix(self.prefix) if self.continues(ids[0]) else self.decode(ids)
        return "".join(map(self.token, ids)) if "\ufffd" in text else text

    @abstractmethod
    def _write(self, path: Path) -> None:
        """Write the tokenizer's own file."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's file and text.json into `folder`; each appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (FILES[self.type] + ".tmp")
        self._write(temporary)
        os.replace(temporary, folder / FILES[self.type])
        special = {name: getattr(self, f"{name}_id") for name in NAMES}
        about = {"type": self.type, "size": self.size, "special": special}
        if self.canonical is not None:
            about["canonical"] = asdict(self.canonical)
        write_sealed(folder / DESCRIPTION, about, [FILES[self.type]])

    @property
    def knows_words(self) -> bool:
        """Not so of the tokenizer of a run without texts."""
        return self.size > len(NAMES)

    def check_fits(self, vocabulary: int, what: str) -> None:
        """Raises UserError when the model's embedding has too few rows."""
        if self.size > vocabulary:
            given = f" ({', '.join(self.added)} among them, which it lacked)" if self.added else ""
            raise UserError(
                f"{what}: has {self.size} tokens{given}, more than model.vocabulary = {vocabulary}: set it to "
                f"{self.size} or more"
            )


class HFTokenizer(TextTokenizer):
    """A `tokenizers.Tokenizer`, from a file (`hf`) or trained here (`corpus`).

    Special tokens it lacks are added at the end and listed in `added`; an unknown-token is not needed.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, type: str = "hf") -> None:
        self.type = type
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        for role, names in NAMES.items():
            name = next((n for n in names if tokenizer.token_to_id(n) is not None), None)
            if name is None and role != "unk":
                name = names[0]
                self.added += (name,)
            if name is not None:  # marks it as special too, where the file lists it as a plain entry
                tokenizer.add_special_tokens([name])
            setattr(self, f"{role}_id", None if name is None else tokenizer.token_to_id(name))
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._hidden = {self.start_id, self.end_id, self.pad_id}
        self._begin, self._end = _word_mark(tokenizer), _word_end(tokenizer)
        if isinstance(tokenizer.model, models.WordPiece):
            self.prefix = tokenizer.model.continuing_subword_prefix

    def encode(self, text: str) -> Encoded:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        return [(e.ids, e.offsets) for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self._hidden]
        text = self.tokenizer.decode(kept, skip_special_tokens=False)
        return (text.replace(self._end, " ") if self._end else text).strip()

    def token(self, id: int) -> str:
        return self.tokenizer.id_to_token(id) or ""

    def continues(self, id: int) -> bool:
        if id in {*self._hidden, self.mask_id, self.unk_id}:
            return False
        if self.prefix:
            return self.token(id).startswith(self.prefix)
        return bool(self._begin) and not self.token(id).startswith(self._begin)

    def _write(self, path: Path) -> None:
        self.tokenizer.save(str(path))


def _word_mark(tokenizer: tokenizers.Tokenizer) -> str:
    """What a token that begins a word begins with; empty where that is not known, as where words are marked at their
    end."""
    if _word_end(tokenizer):
        return ""
    decoder = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
    if b"ByteLevel" in decoder:
        return "Ġ"
    return BLANK if BLANK in decoder.decode() else ""


def _word_end(tokenizer: tokenizers.Tokenizer) -> str:
    """What the last token of a word ends with, as CLIP's; empty elsewhere."""
    return getattr(tokenizer.model, "end_of_word_suffix", None) or ""


class SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece model, with ids as the top of this file says."""

    type = "sentencepiece"

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, canonical: Canonical | None = None) -> None:
        self.processor, self.canonical = processor, canonical
        pieces = processor.get_piece_size()
        self._unk = processor.unk_id()
        if (self._unk, processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1):
            self._shift = 1
            self.start_id, self.pad_id, self.end_id, self.unk_id, self.mask_id = 0, 1, 2, 3, pieces + 1
            self.size = self.mask_id + 1
        else:
            self._shift = 0
            self.unk_id, self.size = self._unk, pieces
            own = {"start": processor.bos_id(), "end": processor.eos_id(), "pad": processor.pad_id(), "mask": -1}
            for role, id in own.items():
                if id < 0:
                    id, self.size = self.size, self.size + 1
                    self.added += (NAMES[role][1],)
                setattr(self, f"{role}_id", id)
        self._hidden = {self.start_id, self.end_id, self.pad_id}

    def encode(self, text: str) -> Encoded:
        if self.canonical is None:
            return self._pieces(text)
        plain, places = self.canonical.apply(text)
        ids, offsets = self._pieces(plain)
        return ids, [back(offset, places) for offset in offsets]

    def _pieces(self, text: str) -> Encoded:
        try:
            found = self.processor.encode(text, return_type="offset_mapping")
            ids, offsets = found["ids"], found["offsets"]
        except TypeError:  # sentencepiece before 0.2.2
            pieces = self.processor.encode(text, out_type="immutable_proto").pieces  # type: ignore[arg-type]
            ids, offsets = [p.id for p in pieces], [(p.begin, p.end) for p in pieces]
        unknown = self.unk_id
        assert unknown is not None
        return [unknown if i == self._unk else i + self._shift for i in ids], [tuple(o) for o in offsets]

    def decode(self, ids: list[int]) -> str:
        words: list[str] = []
        run: list[int] = []
        for i in [*ids, self.mask_id]:  # pieces between two masks are joined by the model's own rules
            if i in {self.unk_id, self.mask_id}:
                words += [self.processor.decode(run)] if run else []
                words.append("<unk>" if i == self.unk_id else "<mask>")
                run = []
            elif i not in self._hidden and i - self._shift < self.processor.get_piece_size():
                run.append(i - self._shift)
        return " ".join(words[:-1]).strip()

    def token(self, id: int) -> str:
        if id in {self.unk_id, self.mask_id}:
            return "<unk>" if id == self.unk_id else "<mask>"
        return self.processor.id_to_piece(id - self._shift) if id not in self._hidden else ""

    def continues(self, id: int) -> bool:
        return id not in {*self._hidden, self.unk_id, self.mask_id} and not self.token(id).startswith(BLANK)

    def _write(self, path: Path) -> None:
        path.write_bytes(self.processor.serialized_model_proto())


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> HFTokenizer:
    """Train the `corpus` tokenizer; see `text_training.word_pieces`."""
    return HFTokenizer(word_pieces(texts, vocabulary), type="corpus")


def train_byte_pairs(texts: Iterable[str], vocabulary: int) -> HFTokenizer:
    """Train the `corpus` tokenizer with byte fallback; see `text_training.byte_pairs`."""
    return HFTokenizer(byte_pairs(texts, vocabulary), type="corpus")


def read_tokenizer(type: str, name: str | Path) -> TextTokenizer:
    """Read a tokenizer (types hf, corpus and sentencepiece). name: its file, or what `find_tokenizer` knows. Raises
    UserError naming the file."""
    path = find_tokenizer(type, name)
    found = read_foreign(type, path)
    if isinstance(found, sentencepiece.SentencePieceProcessor):
        return SentencePieceTokenizer(found, canonical_of(path))
    return HFTokenizer(found, type)


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """Read back what `save` wrote. Raises UserError naming the file that is missing, broken or does not fit."""
    path = Path(folder) / DESCRIPTION
    try:
        about = read_sealed(path)
        type, special = about["type"], about["special"]
        canonical = Canonical(**about["canonical"]) if "canonical" in about else None
        file = Path(folder) / FILES[type]
        if "files" in about:  # text.json of earlier versions listed none
            check_files(path, about, [file.name])
    except FileNotFoundError:
        raise UserError(f"text tokenizer in {folder}: missing file {DESCRIPTION}") from None
    except AlteredError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a text tokenizer's description ({error!r})") from None
    tokenizer = read_tokenizer(type, file)
    tokenizer.canonical = canonical
    found = {name: getattr(tokenizer, f"{name}_id") for name in NAMES}
    if found != special:
        raise UserError(f"{file}: special tokens are {found}, {DESCRIPTION} says {special}")
    return tokenizer


def build_text_tokenizer(recipe: Recipe) -> TextTokenizer:
    """The tokenizer a recipe asks for: somebody's, or trained on the texts the run will see first. A run without texts
    gets one that knows special tokens alone.

    Raises UserError when it is missing or broken, there are no texts, or it is larger than model.vocabulary.
    """
    config = recipe.data.text_tokenizer
    if config.type == "corpus" and not recipe.reads_texts:
        return HFTokenizer(no_words(), type="corpus")
    if config.type == "corpus":
        train = train_byte_pairs if config.byte_fallback else train_wordpiece
        return train(corpus(recipe, config.samples), recipe.model.vocabulary)
    tokenizer = read_tokenizer(config.type, config.path)
    tokenizer.check_fits(recipe.model.vocabulary, f"text tokenizer {config.path}")
    return tokenizer


def corpus(recipe: Recipe, samples: int) -> Iterator[str]:
    """Texts of the run's first samples, of text and pair sources in proportion to their batch sizes.

    Bad samples are passed over; the run reports them when it meets them. Short sources are read once.
    """
    sizes = {kind: getattr(recipe.data.batch, kind) for kind in ("text", "pair")}
    for kind, size in sizes.items():
        if not size:
            continue
        sources = build_sources(recipe.data, recipe.model, kind, "train", recipe.seed)
        mixture = Mixture(sources, recipe.seed, batch=size)
        for position in range(min(len(mixture), samples * size // sum(sizes.values()))):
            number, index, _ = mixture.index(position)
            try:
                text = read_text(mixture.sources[number], index)
            except BadSample:
                continue
            if text:
                yield text
