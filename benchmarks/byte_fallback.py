"""What byte fallback costs: tokens a text and rows of the vocabulary, beside word pieces trained on the same texts.

python benchmarks/byte_fallback.py --json benchmarks/results/byte_fallback.json

Texts: sentences of the README files of the packages installed here, for training and, from other packages, for scoring;
and captions of the embedded world in four languages. A text that has a word unknown to word pieces loses it whole.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
from pathlib import Path
from typing import Any

from provenance import provenance
from vlmoe.config import from_mapping
from vlmoe.data.sources import build_sources, read_text
from vlmoe.data.text_tokenizer import train_byte_pairs, train_wordpiece

SEED = 0


def readme_sentences() -> tuple[list[str], list[str]]:
    """Lines of 4 to 40 words, of packages to train on and of others."""
    texts: tuple[list[str], list[str]] = ([], [])
    for package in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        lines = {" ".join(line.split()) for line in str(package.metadata.json.get("description", "")).splitlines()}
        side = random.Random(f"{SEED} {package.metadata['Name']}").random() < 0.3
        texts[side].extend(sorted(line for line in lines if 4 <= len(line.split()) <= 40))
    return texts


def captions(count: int, start: int = 0) -> list[str]:
    recipe = from_mapping({"data": {"world": {"languages": ["en", "de", "fr", "es"]}}})
    ((source, _),) = build_sources(recipe.data, recipe.model, "text", "train")
    return [read_text(source, i) or "" for i in range(start, start + count)]


def measure(train: list[str], test: list[str], vocabulary: int) -> dict[str, Any]:
    found: dict[str, Any] = {"vocabulary": vocabulary, "trained_on": len(train), "scored_on": len(test)}
    for name, trained in (("word_pieces", train_wordpiece), ("byte_pairs", train_byte_pairs)):
        tokenizer = trained(train, vocabulary)
        encoded = [ids for ids, _ in tokenizer.encode_batch(test)]
        unknown = [sum(i == tokenizer.unk_id for i in ids) for ids in encoded]
        back = [tokenizer.decode(ids) == tokenizer.tokenizer.normalizer.normalize_str(t).strip()
                for ids, t in zip(encoded, test, strict=True)]  # fmt: skip
        found[name] = {
            "tokens": tokenizer.size,
            "tokens_a_text": round(sum(map(len, encoded)) / len(test), 3),
            "texts_with_unknown": round(sum(map(bool, unknown)) / len(test), 4),
            "texts_had_back": round(sum(back) / len(test), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    train, test = readme_sentences()
    for vocabulary in (2048, 4096, 8192):
        rows.append({"texts": "READMEs"} | measure(train, test, vocabulary))
    for vocabulary in (1024, 2048):
        rows.append({"texts": "captions"} | measure(captions(8000), captions(2000, 10**6), vocabulary))
    result = provenance() | {"seed": SEED, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
