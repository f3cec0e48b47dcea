"""Text tokens: one small interface over three kinds of tokenizer.

- `corpus`: WordPiece trained on the run's own texts, lower-cased, split at white space and punctuation, and around
  every letter of a script without blanks between words.
- `hf`: any Hugging Face tokenizer.json. Special tokens are found by their usual names; missing ones are added.
- `sentencepiece`: a .model or .spm file, with ids laid out as in XLM-RoBERTa, which is how BEiT-3 uses beit3.spm:
  <s>=0, <pad>=1, </s>=2, <unk>=3, then the pieces, shifted by one, then <mask> (64,001 for beit3.spm's 64,000 pieces;
  the rest of its 64,010 embedding rows are unused).
"""

from __future__ import annotations

import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data workers do not mix

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vlmoe.config import AlteredError, Recipe, UserError, check_files, read_sealed, write_sealed
from vlmoe.data.mixture import Mixture
from vlmoe.data.sample import BadSample
from vlmoe.data.sources import build_sources, read_text

DESCRIPTION = "text.json"  # written last: its presence says that the tokenizer is complete
FILES = {"hf": "tokenizer.json", "corpus": "tokenizer.json", "sentencepiece": "sentencepiece.model"}
NAMES = {  # of special tokens, most usual first
    "start": ("[CLS]", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|begin_of_text|>"),
    "end": ("[SEP]", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "unk": ("[UNK]", "<unk>", "<|unk|>"),
}

# Letters of scripts written without blanks, each with the marks on it: words of their own to the `corpus` tokenizer, as
# BERT has it for Chinese. In one piece a sentence would be one unknown word.
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese",
            "Tai_Tham", "New_Tai_Lue", "Tai_Le", "Yi")  # fmt: skip
_APART = "[" + "".join(rf"\p{{{name}}}" for name in _SCRIPTS) + r"ー]\p{M}*"
LONGEST_WORD = 100  # characters: what WordPiece looks at; a longer word is cut into pieces of so many

Encoded = tuple[list[int], list[tuple[int, int]]]


class TextTokenizer(ABC):
    """Text to ids and back.

    `encode` adds no special tokens; who builds a sequence puts `start_id` and `end_id` around it. Special tokens
    spelled out in a text ("[MASK]", "<s>") are ordinary characters. `size`: one more than the largest id. `unk_id`:
    None where every text can be spelled.
    """

    type: str
    size: int
    start_id: int
    end_id: int
    pad_id: int
    mask_id: int
    unk_id: int | None

    @abstractmethod
    def encode(self, text: str) -> Encoded:
        """Ids, and for each the range of characters (start, stop) of `text` it stands for."""

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids; start, end and padding are left out, a mask is shown by its name."""

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
        write_sealed(folder / DESCRIPTION, about, [FILES[self.type]])

    @property
    def knows_words(self) -> bool:
        """Not so of the tokenizer of a run without texts."""
        return self.size > len(NAMES)

    def check_fits(self, vocabulary: int, what: str) -> None:
        """Raises UserError when the model's embedding has too few rows."""
        if self.size > vocabulary:
            raise UserError(f"{what}: has {self.size} tokens, more than model.vocabulary = {vocabulary}")


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
        self.added: list[str] = []
        for role, names in NAMES.items():
            name = next((n for n in names if tokenizer.token_to_id(n) is not None), None)
            if name is None and role != "unk":
                name = names[0]
                self.added.append(name)
            if name is not None:  # marks it as special too, where the file lists it as a plain entry
                tokenizer.add_special_tokens([name])
            setattr(self, f"{role}_id", None if name is None else tokenizer.token_to_id(name))
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._hidden = {self.start_id, self.end_id, self.pad_id}

    def encode(self, text: str) -> Encoded:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        return [(e.ids, e.offsets) for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self._hidden]
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()

    def _write(self, path: Path) -> None:
        self.tokenizer.save(str(path))


class SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece model in XLM-RoBERTa's layout of ids (see the top of this file)."""

    type = "sentencepiece"
    start_id, pad_id, end_id, unk_id = 0, 1, 2, 3
    _SHIFT = 1

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, what: str = "sentencepiece model") -> None:
        layout = (processor.unk_id(), processor.bos_id(), processor.eos_id())
        if layout != (0, 1, 2):
            raise UserError(
                f"{what}: <unk>, <s>, </s> have the ids {layout}, expected (0, 1, 2), sentencepiece's own defaults"
            )
        self.processor = processor
        self.mask_id = processor.get_piece_size() + self._SHIFT
        self.size = self.mask_id + 1

    def encode(self, text: str) -> Encoded:
        try:
            found = self.processor.encode(text, return_type="offset_mapping")
            ids, offsets = found["ids"], found["offsets"]
        except TypeError:  # sentencepiece before 0.2.2
            pieces = self.processor.encode(text, out_type="immutable_proto").pieces  # type: ignore[arg-type]
            ids, offsets = [p.id for p in pieces], [(p.begin, p.end) for p in pieces]
        return [i + self._SHIFT if i else self.unk_id for i in ids], [tuple(o) for o in offsets]

    def decode(self, ids: list[int]) -> str:
        words: list[str] = []
        run: list[int] = []
        for i in [*ids, self.mask_id]:  # pieces between two masks are joined by the model's own rules
            if i > self.unk_id and i != self.mask_id:
                run.append(i - self._SHIFT)
            elif i in {self.unk_id, self.mask_id}:
                words += [self.processor.decode(run)] if run else []
                words.append("<unk>" if i == self.unk_id else "<mask>")
                run = []
        return " ".join(words[:-1]).strip()

    def _write(self, path: Path) -> None:
        path.write_bytes(self.processor.serialized_model_proto())


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> HFTokenizer:
    """Train the `corpus` tokenizer: at most `vocabulary` tokens, fewer when the texts hold fewer words.

    The same texts give the same tokenizer. Raises UserError when there is no text or the vocabulary cannot hold the
    texts' characters.
    """
    texts = list(texts)
    tokenizer = _word_pieces(models.WordPiece(unk_token="[UNK]"))
    special = [names[0] for names in NAMES.values()]
    letters = sorted({c for text in texts for c in tokenizer.normalizer.normalize_str(text) if not c.isspace()})
    if not letters:
        raise UserError("the corpus tokenizer needs texts, and the sources gave none")
    # The trainer numbers characters inside words in the order of a hash map. Given beforehand they keep one order.
    apart = _letters_apart()
    inside = [c for c in letters if unicodedata.category(c)[0] == "M" or len(apart.pre_tokenize_str("x" + c)) == 1]
    fixed = special + ["##" + c for c in inside]
    if len(fixed) + len(letters) > vocabulary:
        raise UserError(
            f"model.vocabulary = {vocabulary} cannot hold the texts' {len(letters)} different characters: "
            f"expected at least {len(fixed) + len(letters)}"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, min_frequency=2, show_progress=False, special_tokens=fixed, initial_alphabet=letters
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = tokenizer.get_vocab(with_added_tokens=True)
    return HFTokenizer(_word_pieces(models.WordPiece(trained, unk_token="[UNK]")), type="corpus")


def _word_pieces(model: models.WordPiece) -> tokenizers.Tokenizer:
    """The `corpus` tokenizer's rules around a vocabulary."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(tokenizers.Regex(f".{{{LONGEST_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), _letters_apart(), pieces])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _letters_apart() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(_APART), "isolated")


def read_tokenizer(type: str, path: str | Path) -> TextTokenizer:
    """Read a tokenizer file (types hf, corpus and sentencepiece). Raises UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"text tokenizer {path}: no such file")
    try:
        if type == "sentencepiece":
            processor = sentencepiece.SentencePieceProcessor()
            processor.LoadFromSerializedProto(path.read_bytes())
            return SentencePieceTokenizer(processor, what=str(path))
        return HFTokenizer(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")), type)
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare exceptions
        wanted = "a sentencepiece model" if type == "sentencepiece" else "a Hugging Face tokenizer.json"
        raise UserError(f"text tokenizer {path}: cannot be read as {wanted}: {error}") from None


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """Read back what `save` wrote. Raises UserError naming the file that is missing, broken or does not fit."""
    path = Path(folder) / DESCRIPTION
    try:
        about = read_sealed(path)
        type, special = about["type"], about["special"]
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
    found = {name: getattr(tokenizer, f"{name}_id") for name in NAMES}
    if found != special:
        raise UserError(f"{file}: special tokens are {found}, {DESCRIPTION} says {special}")
    return tokenizer


def build_text_tokenizer(recipe: Recipe) -> TextTokenizer:
    """The tokenizer a recipe asks for: read from its file, or trained on the texts the run will see first. A run
    without texts gets one that knows special tokens alone.

    Raises UserError when the file is missing or broken, there are no texts, or it is larger than model.vocabulary.
    """
    config = recipe.data.text_tokenizer
    if config.type == "corpus" and not recipe.reads_texts:
        special = {names[0]: i for i, names in enumerate(NAMES.values())}
        return HFTokenizer(_word_pieces(models.WordPiece(special, unk_token="[UNK]")), type="corpus")
    if config.type == "corpus":
        return train_wordpiece(corpus(recipe, config.samples), recipe.model.vocabulary)
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
