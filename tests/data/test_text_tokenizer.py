import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tests.data.fakes import WORDS, small_recipe
from vlmoe.config import UserError, read_sealed, write_sealed
from vlmoe.data.text_tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
    load_text_tokenizer,
    read_tokenizer,
    train_wordpiece,
)

TEXTS = ["a red circle", "the blue square above the star", "small green star left", "large red square right"] * 3


def bpe(special: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_model(path: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["corpus", "hf", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    if request.param == "corpus":
        return train_wordpiece(TEXTS, 200)
    if request.param == "hf":
        bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]).save(str(tmp_path / "tokenizer.json"))
        return read_tokenizer("hf", tmp_path / "tokenizer.json")
    return read_tokenizer("sentencepiece", sentencepiece_model(tmp_path / "beit3.spm"))


def test_round_trip_and_offsets(tokenizer: TextTokenizer) -> None:
    for text in TEXTS[:4]:
        ids, offsets = tokenizer.encode(text)
        assert tokenizer.decode([tokenizer.start_id, *ids, tokenizer.end_id, tokenizer.pad_id]) == text
        assert len(ids) == len(offsets)
        assert "".join(text[start:stop] for start, stop in offsets).replace(" ", "") == text.replace(" ", "")
        assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_special_ids_differ_and_are_never_made_from_text(tokenizer: TextTokenizer) -> None:
    special = {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id}
    assert len(special) == 4
    ids, _ = tokenizer.encode("[MASK] [CLS] [PAD] <mask> <s> </s> <pad> red")
    assert not special & set(ids)
    assert "mask" in tokenizer.decode([tokenizer.mask_id]).lower()


def test_save_load_and_pickle(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "run")
    for other in (load_text_tokenizer(tmp_path / "run"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode("a red star, ünknown") == tokenizer.encode("a red star, ünknown")
        assert (other.type, other.size, other.mask_id) == (tokenizer.type, tokenizer.size, tokenizer.mask_id)


def test_offsets_count_characters_not_bytes(tokenizer: TextTokenizer) -> None:
    text = "é red"
    _ids, offsets = tokenizer.encode(text)
    start, stop = offsets[-1]
    assert stop == len(text)
    assert text[start:stop].strip() in "red"


def test_corpus_words_are_single_tokens_whatever_their_case() -> None:
    tokenizer = train_wordpiece(TEXTS, 200)
    for word in set(" ".join(TEXTS).split()):
        assert len(tokenizer.encode(word)[0]) == 1
        assert tokenizer.encode(word.upper()) == tokenizer.encode(word)
    assert tokenizer.size < 200
    assert tokenizer.encode("漢")[0] == [tokenizer.unk_id]


def test_corpus_training_is_the_same_in_every_process() -> None:
    """Hash seeds differ between processes; words that tie in frequency must not be numbered by them."""
    program = (
        "import hashlib, random; from vlmoe.data.text_tokenizer import train_wordpiece; r = random.Random(0)\n"
        "texts = [' '.join(''.join(r.choice('abcdefghijklmé') for _ in range(r.randint(1, 6))) for _ in range(8))"
        " for _ in range(400)]\n"
        "print(hashlib.md5(train_wordpiece(texts, 300).tokenizer.to_str().encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": str(i)}, stdout=subprocess.PIPE
        )
        for i in (1, 2)
    ]
    assert runs[0].stdout
    assert runs[0].stdout == runs[1].stdout


def test_corpus_needs_texts_and_room_for_their_characters() -> None:
    with pytest.raises(UserError, match="needs texts"):
        train_wordpiece([], 100)
    with pytest.raises(UserError, match=r"model.vocabulary = 20 cannot hold .* expected at least"):
        train_wordpiece(TEXTS, 20)


def test_missing_special_tokens_are_added() -> None:
    tokenizer = HFTokenizer(bpe(["<|endoftext|>"]))
    assert tokenizer.added == ["[CLS]", "[PAD]", "[MASK]"]
    assert tokenizer.tokenizer.id_to_token(tokenizer.end_id) == "<|endoftext|>"
    assert tokenizer.unk_id is None
    assert tokenizer.size == tokenizer.mask_id + 1


def test_bert_and_xlm_r_names_are_found() -> None:
    for names in (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]):
        tokenizer = HFTokenizer(bpe(names))
        found = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id]
        assert found == [0, 1, 2, 3, 4]
        assert tokenizer.added == []


def test_sentencepiece_ids_are_laid_out_as_in_beit3(tmp_path: Path) -> None:
    """Id p + 1 for piece p from 3 on, the mask behind the last: 64,001 for a model of 64,000 pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path / "m.spm")))
    tokenizer = SentencePieceTokenizer(processor)
    assert (tokenizer.start_id, tokenizer.pad_id, tokenizer.end_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == processor.get_piece_size() + 1
    assert tokenizer.encode("red star")[0] == [i + 1 for i in processor.encode("red star")]
    assert tokenizer.encode("漢")[0][-1] == tokenizer.unk_id
    assert tokenizer.decode([*tokenizer.encode("red")[0], tokenizer.mask_id, 3]) == "red <mask> <unk>"


def test_sentencepiece_with_other_special_ids_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3,
    )  # fmt: skip
    (tmp_path / "t5.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"t5.model: .*\(1, 2, 3\), expected \(0, 1, 2\)"):
        read_tokenizer("sentencepiece", tmp_path / "t5.model")


@pytest.mark.parametrize("type_", ["hf", "sentencepiece"])
def test_broken_files_are_named(type_: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.json: no such file"):
        read_tokenizer(type_, tmp_path / "nothing.json")
    (tmp_path / "odd.json").write_text('{"odd": 1}')
    with pytest.raises(UserError, match=r"odd.json: cannot be read as"):
        read_tokenizer(type_, tmp_path / "odd.json")


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing file text.json"):
        load_text_tokenizer(tmp_path)
    train_wordpiece(TEXTS, 200).save(tmp_path)
    about = read_sealed(tmp_path / "text.json")
    about["special"]["mask"] = 77
    (tmp_path / "text.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"text.json: has no sha256"):
        load_text_tokenizer(tmp_path)
    write_sealed(tmp_path / "text.json", about)
    with pytest.raises(UserError, match="special tokens are"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "text.json").write_text("[]")
    with pytest.raises(UserError, match="JSON is a list"):
        load_text_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    tokenizer = train_wordpiece(WORDS * 2, 200)
    tokenizer.check_fits(tokenizer.size, "x")
    with pytest.raises(UserError, match=rf"x: has {tokenizer.size} tokens, more than model.vocabulary = 10"):
        tokenizer.check_fits(10, "x")
    assert small_recipe().model.vocabulary == 128
