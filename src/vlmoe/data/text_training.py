"""Training the `corpus` tokenizer on a run's own texts: words and pieces of words, or byte pairs that know any text.

Both take texts in compatibility form (NFKC) and lower case, and cut them at white space, around punctuation and around
every letter of a script without blanks between words. The same texts give the same tokenizer.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vlmoe.config import LEAST_BYTE_VOCABULARY, UserError

SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[MASK]")
UNKNOWN = "[UNK]"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # the names that `tokenizers` and sentencepiece know them by
BLANK = "▁"  # begins a piece that begins a word

# Letters of scripts written without blanks, each with the marks on it: words of their own, as BERT has it for Chinese.
# In one piece a sentence would be one unknown word.
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese",
            "Tai_Tham", "New_Tai_Lue", "Tai_Le", "Yi")  # fmt: skip
_APART = "[" + "".join(rf"\p{{{name}}}" for name in _SCRIPTS) + r"ー]\p{M}*"
_PUNCTUATION = r"[\p{P}$+<=>^`|~]"  # as BERT has it
_LONG = ".{100}"  # characters: what WordPiece looks at; a longer word is cut into pieces of so many


def word_pieces(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """WordPiece (Schuster and Nakajima 2012): at most `vocabulary` tokens, fewer when the texts hold fewer words.

    Raises UserError when there is no text or the vocabulary cannot hold the texts' characters.
    """
    texts = list(texts)
    tokenizer = _around_word_pieces(models.WordPiece(unk_token=UNKNOWN))
    letters = sorted(_letters(texts))
    # The trainer numbers characters inside words in the order of a hash map. Given beforehand they keep one order.
    apart = _split(_APART)
    inside = [c for c in letters if unicodedata.category(c)[0] == "M" or len(apart.pre_tokenize_str("x" + c)) == 1]
    fixed = [*SPECIAL, UNKNOWN, *("##" + c for c in inside)]
    if len(fixed) + len(letters) > vocabulary:
        raise UserError(
            f"model.vocabulary = {vocabulary} cannot hold the texts' {len(letters)} different characters: "
            f"expected at least {len(fixed) + len(letters)}, or data.text_tokenizer.byte_fallback"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, min_frequency=2, show_progress=False, special_tokens=fixed, initial_alphabet=letters
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = tokenizer.get_vocab(with_added_tokens=True)
    return _around_word_pieces(models.WordPiece(trained, unk_token=UNKNOWN))


def no_words() -> tokenizers.Tokenizer:
    """Special tokens alone, for a run without texts."""
    special = {name: i for i, name in enumerate((*SPECIAL, UNKNOWN))}
    return _around_word_pieces(models.WordPiece(special, unk_token=UNKNOWN))


def byte_pairs(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) with byte fallback, as in Llama and Gemma: what has no token becomes
    the tokens of its bytes in UTF-8, and nothing is unknown. Blanks belong to the piece behind them, so that the text
    can be had back.

    Letters that occur twice in the texts have tokens of their own, the most frequent ones, in at most half of the
    vocabulary that the bytes leave.

    Raises UserError when there is no text or the vocabulary is too small for the bytes.
    """
    texts = list(texts)
    counts = _letters(texts)
    if vocabulary < LEAST_BYTE_VOCABULARY:
        raise UserError(
            f"model.vocabulary = {vocabulary} leaves no room beside the 256 tokens of data.text_tokenizer."
            f"byte_fallback: expected at least {LEAST_BYTE_VOCABULARY}"
        )
    often = sorted((c for c in counts if counts[c] > 1 and c != BLANK), key=lambda c: (-counts[c], c))
    letters = [BLANK, *sorted(often[: (vocabulary - len(SPECIAL) - len(BYTES)) // 2])]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, show_progress=False, special_tokens=[*SPECIAL, *BYTES],
        initial_alphabet=letters, limit_alphabet=len(letters),
    )  # fmt: skip
    tokenizer = _around_byte_pairs(models.BPE())
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]  # built anew, where bytes are no special tokens
    merges = [(first, second) for first, second in trained["merges"]]
    return _around_byte_pairs(models.BPE(vocab=trained["vocab"], merges=merges, byte_fallback=True))


def _letters(texts: list[str]) -> Counter[str]:
    """Characters of normalised texts, and how often each occurs."""
    normalizer = _normalizer()
    letters = Counter(c for text in texts for c in normalizer.normalize_str(text) if not c.isspace())
    if not letters:
        raise UserError("the corpus tokenizer needs texts, and the sources gave none")
    return letters


def _around_word_pieces(model: models.WordPiece) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer()
    words = pre_tokenizers.BertPreTokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, _split(_APART), _split(_LONG)])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _around_byte_pairs(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer()
    blanks = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="always")
    apart = [_split(f"{BLANK}?{pattern}") for pattern in (_PUNCTUATION, _APART)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([blanks, *apart, _split(_LONG)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
