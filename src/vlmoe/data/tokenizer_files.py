"""Other people's tokenizers, by file, folder or name on the hub, read as a `tokenizers.Tokenizer` or a sentencepiece
model.

Of a folder the first of these is read: tokenizer.json, a sentencepiece model (.model or .spm), BERT's vocab.txt,
vocab.json with merges.txt.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from vlmoe.config import UserError, read_json
from vlmoe.data.canonical import Canonical

Foreign = tokenizers.Tokenizer | sentencepiece.SentencePieceProcessor
SENTENCEPIECE = (".model", ".spm")
VOCAB, MERGES = "vocab.json", "merges.txt"
GPT2 = {  # classes of transformers that cut a text into words as GPT-2 does
    "GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer", "CodeGenTokenizer",
}  # fmt: skip
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_ANEW = "transformers can write a tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
_CONFIG = "tokenizer_config.json"
_HUB = ["tokenizer.json", "*.model", "*.spm", "vocab.txt", VOCAB, MERGES, _CONFIG]  # what is brought from there
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def read_foreign(type: str, path: Path) -> Foreign:
    """Read a tokenizer. type: hf, any of those above; sentencepiece, a sentencepiece model. path: its file.

    Raises UserError naming the file where it cannot be read.
    """
    try:
        if path.suffix in SENTENCEPIECE or type == "sentencepiece":
            processor = sentencepiece.SentencePieceProcessor()
            processor.LoadFromSerializedProto(path.read_bytes())
            return processor
        if path.name == "vocab.txt":
            return _bert(path)
        if path.name in {VOCAB, MERGES}:
            return _byte_pairs(path)
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare exceptions
        by_name = dict.fromkeys((VOCAB, MERGES), f"{VOCAB} and {MERGES} of GPT-2's kind")
        by_name["vocab.txt"] = "BERT's list of word pieces"
        wanted = by_name.get(path.name, "a Hugging Face tokenizer.json")
        wanted = "a sentencepiece model" if path.suffix in SENTENCEPIECE or type == "sentencepiece" else wanted
        raise UserError(f"text tokenizer {path}: cannot be read as {wanted}: {error}") from None


def find_tokenizer(type: str, name: str | Path) -> Path:
    """The file to read. type: as of `read_foreign`. name: a file, a folder, or a name on the hub, where @REVISION may
    follow. Raises UserError where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if path.suffix in {".json", ".txt", *SENTENCEPIECE} or not _HUB_NAME.fullmatch(str(name)):
            raise UserError(f"text tokenizer {name}: no such file or folder")
        path = _fetch(str(name))
    pieces = sorted(p for p in path.iterdir() if p.suffix in SENTENCEPIECE)
    if len(pieces) > 1:
        raise UserError(f"text tokenizer {name}: name one of its files, {', '.join(p.name for p in pieces)}")
    others = [p for p in (path / "tokenizer.json", *pieces, path / "vocab.txt") if p.is_file()]
    if (path / VOCAB).is_file() and (path / MERGES).is_file():
        others.append(path / VOCAB)
    found = pieces if type == "sentencepiece" else others
    if found:
        return found[0]
    if type == "sentencepiece":
        raise UserError(f"text tokenizer {name}: expected a .model or .spm file in it")
    there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
    raise UserError(
        f"text tokenizer {name}: expected tokenizer.json, a .model or .spm file, vocab.txt, or {VOCAB} with {MERGES} "
        f"in it, and there is {there}. {_ANEW}"
    )


def _fetch(name: str) -> Path:
    """A folder with the tokenizer's files of a repository on the hub, from its cache where they are there already."""
    import huggingface_hub  # slow to import, needed here alone

    repository, _, revision = name.partition("@")
    endpoint = os.environ.get("HF_ENDPOINT")  # a mirror, also one that is set after the client was imported
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_HUB, endpoint=endpoint
        )
        return Path(found)
    except Exception as error:  # of the network, of the hub, of the cache
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"text tokenizer {name}: no such file or folder here, and it cannot be had from the hub: {first}"
        ) from None


def _bert(path: Path) -> tokenizers.Tokenizer:
    """BERT's WordPiece by its vocabulary alone. Whether it is lower-cased stands in tokenizer_config.json beside it;
    without that, a vocabulary with capitals is not."""
    config = _config(path)
    pieces = path.read_text(encoding="utf-8").splitlines()
    cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    made = tokenizers.BertWordPieceTokenizer(
        str(path),
        lowercase=config.get("do_lower_case", not cased),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    return made._tokenizer


def _byte_pairs(path: Path) -> tokenizers.Tokenizer:
    """Byte pairs as of GPT-2 and RoBERTa, or of CLIP, which marks where words end. Which it is stands in
    tokenizer_config.json beside the files; without that the vocabulary tells."""
    vocab, merges = path.with_name(VOCAB), path.with_name(MERGES)
    for file in (vocab, merges):
        if not file.is_file():
            raise UserError(f"text tokenizer {path}: there is no {file.name} beside it")
    config = _config(path)
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    pieces, pairs = models.BPE.read_file(str(vocab), str(merges))
    clip = named == "CLIPTokenizer" or (not named and any(piece.endswith("</w>") for piece in pieces))
    if named and not clip and named not in GPT2:
        raise UserError(f"text tokenizer {path}: how {named} cuts texts into words is not known here. {_ANEW}")
    if not pieces.keys() >= {*pre_tokenizers.ByteLevel.alphabet()}:
        raise UserError(
            f"text tokenizer {path}: has no token for each of the 256 bytes, as GPT-2's, RoBERTa's and CLIP's have. "
            f"{_ANEW}"
        )
    made = tokenizers.Tokenizer(models.BPE(pieces, pairs, end_of_word_suffix="</w>" if clip else ""))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    made.decoder = decoders.ByteLevel()
    if clip:
        made.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def canonical_of(path: Path) -> Canonical | None:
    """The form that texts are brought into before a sentencepiece model sees them: SigLIP's, where the
    tokenizer_config.json beside it names that."""
    config = _config(path)
    if str(config.get("tokenizer_class")).removesuffix("Fast") != "SiglipTokenizer":
        return None
    return Canonical(bool(config.get("do_lower_case", True)))


def _config(path: Path) -> dict[str, Any]:
    beside = path.with_name(_CONFIG)
    return read_json(beside) if beside.is_file() else {}
