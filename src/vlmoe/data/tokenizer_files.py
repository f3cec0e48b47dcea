"""Other people's tokenizers, by file, folder or name on the hub, read as a `tokenizers.Tokenizer` or a sentencepiece
model.

Of a folder the first of these is read: tokenizer.json, a sentencepiece model (.model or .spm), BERT's vocab.txt.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from vlmoe.config import UserError, read_json

Foreign = tokenizers.Tokenizer | sentencepiece.SentencePieceProcessor
SENTENCEPIECE = (".model", ".spm")
_HUB = ["tokenizer.json", "*.model", "*.spm", "vocab.txt", "tokenizer_config.json"]  # what is brought from there
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def read_foreign(type: str, name: str | Path) -> Foreign:
    """Read a tokenizer. type: hf, any of those above; sentencepiece, a sentencepiece model. name: a file, a folder, or
    a name on the hub, where @REVISION may follow.

    Raises UserError naming the file: there is none, or it cannot be read.
    """
    path = _find(type, name)
    try:
        if path.suffix in SENTENCEPIECE or type == "sentencepiece":
            processor = sentencepiece.SentencePieceProcessor()
            processor.LoadFromSerializedProto(path.read_bytes())
            return processor
        if path.name == "vocab.txt":
            return _bert(path)
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare exceptions
        wanted = "BERT's list of word pieces" if path.name == "vocab.txt" else "a Hugging Face tokenizer.json"
        wanted = "a sentencepiece model" if path.suffix in SENTENCEPIECE or type == "sentencepiece" else wanted
        raise UserError(f"text tokenizer {path}: cannot be read as {wanted}: {error}") from None


def _find(type: str, name: str | Path) -> Path:
    """The file to read."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if path.suffix in {".json", ".txt", *SENTENCEPIECE} or not _HUB_NAME.fullmatch(str(name)):
            raise UserError(f"text tokenizer {name}: no such file or folder")
        path = _fetch(str(name))
    models = sorted(p for p in path.iterdir() if p.suffix in SENTENCEPIECE)
    if len(models) > 1:
        raise UserError(f"text tokenizer {name}: name one of its files, {', '.join(p.name for p in models)}")
    others = [p for p in (path / "tokenizer.json", *models, path / "vocab.txt") if p.is_file()]
    found = models if type == "sentencepiece" else others
    if found:
        return found[0]
    if type == "sentencepiece":
        raise UserError(f"text tokenizer {name}: expected a .model or .spm file in it")
    there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
    raise UserError(
        f"text tokenizer {name}: expected tokenizer.json, a .model or .spm file, or vocab.txt in it, and there is "
        f"{there}. transformers can write a tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
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
    beside = path.with_name("tokenizer_config.json")
    config: dict[str, Any] = read_json(beside) if beside.is_file() else {}
    pieces = path.read_text(encoding="utf-8").splitlines()
    cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    made = tokenizers.BertWordPieceTokenizer(
        str(path),
        lowercase=config.get("do_lower_case", not cased),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    return made._tokenizer
