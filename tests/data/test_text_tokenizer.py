import functools
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.data.fakes import WORDS, small_recipe
from vlmoe.config import Recipe, RecipeError, UserError, from_mapping, read_sealed, write_sealed
from vlmoe.data.text_tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
    build_text_tokenizer,
    load_text_tokenizer,
    read_tokenizer,
    train_byte_pairs,
    train_wordpiece,
)
from vlmoe.data.words import parts_of_words

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


def sentencepiece_model(path: Path, **more: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2, **more
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["corpus", "bytes", "hf", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    if request.param == "corpus":
        return train_wordpiece(TEXTS, 200)
    if request.param == "bytes":
        return train_byte_pairs(TEXTS, 512)
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
        "import hashlib, random; from vlmoe.data.text_training import byte_pairs, word_pieces; r = random.Random(0)\n"
        "texts = [' '.join(''.join(r.choice('abcdefghijklmé') for _ in range(r.randint(1, 6))) for _ in range(8))"
        " for _ in range(400)]\n"
        "made = word_pieces(texts, 300).to_str() + byte_pairs(texts, 600).to_str()\n"
        "print(hashlib.md5(made.encode()).hexdigest())"
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
    assert tokenizer.added == ("[CLS]", "[PAD]", "[MASK]")
    assert tokenizer.tokenizer.id_to_token(tokenizer.end_id) == "<|endoftext|>"
    assert tokenizer.unk_id is None
    assert tokenizer.size == tokenizer.mask_id + 1


def test_bert_and_xlm_r_names_are_found() -> None:
    for names in (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]):
        tokenizer = HFTokenizer(bpe(names))
        found = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id]
        assert found == [0, 1, 2, 3, 4]
        assert tokenizer.added == ()


def test_sentencepiece_ids_are_laid_out_as_in_beit3(tmp_path: Path) -> None:
    """Id p + 1 for piece p from 3 on, the mask behind the last: 64,001 for a model of 64,000 pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path / "m.spm")))
    tokenizer = SentencePieceTokenizer(processor)
    assert (tokenizer.start_id, tokenizer.pad_id, tokenizer.end_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == processor.get_piece_size() + 1
    assert tokenizer.encode("red star")[0] == [i + 1 for i in processor.encode("red star")]
    assert tokenizer.encode("漢")[0][-1] == tokenizer.unk_id
    assert tokenizer.decode([*tokenizer.encode("red")[0], tokenizer.mask_id, 3]) == "red <mask> <unk>"


@pytest.mark.parametrize(
    ("layout", "own", "added"),
    [
        ({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, {"pad": 0, "end": 1, "unk": 2}, ("<s>", "<mask>")),
        ({"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}, {"pad": 0, "end": 1, "start": 2, "unk": 3}, ("<mask>",)),
    ],
    ids=["siglip and t5", "gemma"],
)
def test_other_sentencepiece_models_keep_their_ids(
    layout: dict[str, int], own: dict[str, int], added: tuple[str, ...], tmp_path: Path
) -> None:
    path = sentencepiece_model(tmp_path / "spiece.model", **layout)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = read_tokenizer("sentencepiece", path)
    assert {role: getattr(tokenizer, f"{role}_id") for role in own} == own
    assert tokenizer.added == added
    assert tokenizer.mask_id == tokenizer.size - 1 == processor.get_piece_size() + len(added) - 1
    ids = tokenizer.encode("red star")[0]
    assert ids == processor.encode("red star")
    assert tokenizer.encode("漢")[0][-1] == own["unk"]
    framed = [tokenizer.start_id, *ids, tokenizer.mask_id, tokenizer.end_id, tokenizer.pad_id]
    assert tokenizer.decode(framed) == "red star <mask>"
    with pytest.raises(UserError, match=rf"\({', '.join(added)} among them.*set it to {tokenizer.size} or more"):
        tokenizer.check_fits(tokenizer.size - 1, "x")
    tokenizer.save(tmp_path / "run")
    assert load_text_tokenizer(tmp_path / "run").mask_id == tokenizer.mask_id


@pytest.mark.parametrize("type_", ["hf", "sentencepiece"])
def test_broken_files_are_named(type_: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.json: no such file or folder"):
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


# ------------------------------------------------------------------------------------------------------- byte fallback
@pytest.fixture(scope="module")
def spelling() -> HFTokenizer:
    return train_byte_pairs(TEXTS, 512)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_had_back(spelling: HFTokenizer, text: str) -> None:
    ids, offsets = spelling.encode(text)
    plain = spelling.tokenizer.normalizer.normalize_str(text)
    assert spelling.decode(ids).strip() == plain.strip()
    assert all(0 <= start <= stop <= len(text) for start, stop in offsets)


def test_unknown_letters_become_bytes_and_known_words_stay_whole(spelling: HFTokenizer) -> None:
    assert spelling.unk_id is None
    ids, offsets = spelling.encode("red ☃ <0x41>")
    tokens = [spelling.token(i) for i in ids]
    assert tokens[:5] == ["▁red", "▁", "<0xE2>", "<0x98>", "<0x83>"]
    assert offsets[:5] == [(0, 3), (3, 4), (4, 5), (4, 5), (4, 5)]
    assert "<0x41>" not in tokens  # a byte's name in a text is ordinary text
    assert all(len(spelling.encode(word)[0]) == 1 for word in set(" ".join(TEXTS).split()))
    assert spelling.encode("RED") == spelling.encode("red")
    assert sum(spelling.token(i).startswith("<0x") for i in range(spelling.size)) == 256


def test_letters_beyond_the_room_are_spelled_too() -> None:
    han = "".join(chr(0x4E00 + i) for i in range(600))
    tokenizer = train_byte_pairs([han, han, han[:50]], 512)
    assert tokenizer.size <= 512
    assert len(tokenizer.encode(han[:3])[0]) <= 4  # the most frequent have tokens
    assert tokenizer.decode(tokenizer.encode(han)[0]) == han
    with pytest.raises(UserError, match=r"cannot hold .* or data.text_tokenizer.byte_fallback"):
        train_wordpiece([han], 512)


def test_the_recipe_says_whether_bytes_are_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))

    def recipe(vocabulary: int, **tokenizer: object) -> Recipe:
        source = {"kind": "text", "type": "folder", "path": str(tmp_path), "held_out": 0.1}
        data = {"sources": [source], "batch": {"image": 0, "text": 4, "pair": 0}, "text_tokenizer": tokenizer}
        return from_mapping({"model": {"vocabulary": vocabulary}, "data": data})

    assert build_text_tokenizer(recipe(512)).unk_id is not None
    tokenizer = build_text_tokenizer(recipe(512, byte_fallback=True))
    assert tokenizer.unk_id is None
    tokenizer.save(tmp_path / "run")
    assert load_text_tokenizer(tmp_path / "run").encode("ünknown ☃") == tokenizer.encode("ünknown ☃")
    with pytest.raises(RecipeError, match=r"'model.vocabulary' got 256, wanted at least 512, because"):
        recipe(256, byte_fallback=True)
    with pytest.raises(RecipeError, match=r"byte_fallback' got True, wanted false, because a tokenizer that is there"):
        recipe(512, byte_fallback=True, type="hf", path="x")


# ------------------------------------------------------------------------------------------ tokenizers of other models
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache  # trained again, its pieces would have other numbers
def bert() -> tokenizers.Tokenizer:
    """Laid out as the tokenizer.json of bert-base-uncased."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=BERT, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def vocab_txt(path: Path) -> Path:
    vocabulary = bert().get_vocab()
    path.write_text("\n".join(sorted(vocabulary, key=lambda token: vocabulary[token])) + "\n")
    return path


def test_bert_by_folder_by_file_and_by_vocabulary_alone(tmp_path: Path) -> None:
    expected = bert().encode("A red Circle", add_special_tokens=False).ids
    bert().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "old").mkdir()
    vocab_txt(tmp_path / "old" / "vocab.txt")
    for name in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "old", tmp_path / "old" / "vocab.txt"):
        tokenizer = read_tokenizer("hf", name)
        special = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id]
        assert (special, tokenizer.added) == ([0, 1, 2, 3, 4], ())
        assert tokenizer.encode("A red Circle")[0] == expected
    (tmp_path / "old" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_tokenizer("hf", tmp_path / "old").encode("RED")[0] == [1]


def test_a_folder_with_a_sentencepiece_model_is_read_by_hf_too(tmp_path: Path) -> None:
    """As XLM-R's, BEiT-3's and SigLIP's come."""
    sentencepiece_model(tmp_path / "sentencepiece.bpe.model")
    tokenizer = read_tokenizer("hf", tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.encode("red") == read_tokenizer("sentencepiece", tmp_path).encode("red")
    tokenizer.save(tmp_path / "run")
    assert load_text_tokenizer(tmp_path / "run").encode("red") == tokenizer.encode("red")
    (tmp_path / "second.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"name one of its files, second.model, sentencepiece.bpe.model"):
        read_tokenizer("hf", tmp_path)


def test_xlm_r_has_its_mask_and_siglip_is_given_one(tmp_path: Path) -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁red", -2.0), ("▁", -5.0)]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.save(str(tmp_path / "siglip.json"))
    unigram.add_special_tokens(["<mask>"])
    unigram.save(str(tmp_path / "xlm-r.json"))
    xlm_r, siglip = (read_tokenizer("hf", tmp_path / f"{name}.json") for name in ("xlm-r", "siglip"))
    assert (xlm_r.mask_id, xlm_r.size, xlm_r.added) == (6, 7, ())
    assert (siglip.mask_id, siglip.size, siglip.added) == (6, 7, ("[MASK]",))
    with pytest.raises(UserError, match=r"has 7 tokens \(\[MASK\] among them, which it lacked\), more than"):
        siglip.check_fits(6, "x")


def byte_pairs_of(folder: Path, clip: bool = False) -> Path:
    """vocab.json and merges.txt as of GPT-2 or CLIP. Returns the folder."""
    folder.mkdir()
    made = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>" if clip else ""))
    made.normalizer = normalizers.Lowercase() if clip else None
    cuts = [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)] if clip else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>" if clip else "",
    )  # fmt: skip
    made.train_from_iterator([*TEXTS, *SAID], trainer)
    made.model.save(str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["merges.txt", "vocab.json"]
    return folder


SAID = ["A Red  circle, don't ask; it's 42 (or 7)!", "ÀÉ naïve squares", " above"]


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "clip"])
def test_vocab_json_and_merges_are_read_as_transformers_reads_them(kind: str, tmp_path: Path) -> None:
    name = {"gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "clip": "CLIPTokenizer"}[kind]
    known = importlib.import_module(f"transformers.models.{kind}.tokenization_{kind}")
    folder = byte_pairs_of(tmp_path / kind, kind == "clip")
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    theirs = getattr(known, name)(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    for place in (folder, folder / "vocab.json", folder / "merges.txt"):
        ours = read_tokenizer("hf", place)
        for text in (*SAID, *TEXTS[:4]):
            assert ours.encode(text)[0] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode("a red circle")[0]) == "a red circle"
    offsets = ours.encode(TEXTS[1])[1]
    assert "".join(TEXTS[1][start:stop] for start, stop in offsets).replace(" ", "") == TEXTS[1].replace(" ", "")
    assert ours.unk_id is None and "<|endoftext|>" not in ours.added
    ours.save(tmp_path / "run")
    again = load_text_tokenizer(tmp_path / "run")
    assert [again.encode(text) for text in SAID] == [ours.encode(text) for text in SAID]
    # what stands beside the files decides
    (folder / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{name}Fast", "add_prefix_space": true}}')
    assert read_tokenizer("hf", folder).encode("above")[0] == ours.encode(" above")[0]
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match=r"how Qwen2Tokenizer cuts texts into words is not known here. trans"):
        read_tokenizer("hf", folder)


def test_words_of_clip_end_where_their_last_token_says(tmp_path: Path) -> None:
    clip = read_tokenizer("hf", byte_pairs_of(tmp_path / "clip", clip=True))
    ids = clip.encode("red circle")[0]
    assert [clip.token(i) for i in ids] == ["red</w>", "circle</w>"]
    assert clip.decode(ids) == "red circle" and not any(map(clip.continues, ids))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"vocab.json": "{}"}, "vocab.json: there is no merges.txt beside it"),
        ({"vocab.json": '{"a</w>": 0}', "merges.txt": ""}, "has no token for each of the 256 bytes"),
        ({"vocab.json": "[", "merges.txt": ""}, "cannot be read as vocab.json and merges.txt of GPT-2's kind"),
    ],
)
def test_other_byte_pairs_are_refused(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_tokenizer("hf", tmp_path / "vocab.json")


def test_a_sentencepiece_model_of_siglip_sees_what_siglips_own_code_shows_it(tmp_path: Path) -> None:
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

    path = sentencepiece_model(tmp_path / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    plain, theirs = read_tokenizer("hf", tmp_path), SiglipTokenizer(str(path))
    assert plain.canonical is None  # T5 has a file of this name, too
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer", "do_lower_case": true}')
    ours = read_tokenizer("hf", tmp_path)
    texts = ["A Red, RED circle!", "(the) star's  left -- 'right'", "ΟΔΟΣ İ ß square", "¡small! ", "..."]
    for text in texts:
        ids, offsets = ours.encode(text)
        assert ids == theirs.convert_tokens_to_ids(theirs.tokenize(text))
        assert all(0 <= start <= stop <= len(text) for start, stop in offsets)
    assert ours.encode("A Red!")[0] == plain.encode("a red")[0] != plain.encode("A Red!")[0]
    text = "it's RED, a star"
    offsets = ours.encode(text)[1]
    assert "".join(text[start:stop] for start, stop in offsets).replace(" ", "") == "itsREDastar"
    ours.save(tmp_path / "run")
    for again in (load_text_tokenizer(tmp_path / "run"), pickle.loads(pickle.dumps(ours))):
        assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer", "do_lower_case": false}')
    assert read_tokenizer("hf", tmp_path).encode("A Red!")[0] == plain.encode("A Red")[0]


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("")
    words = r"expected tokenizer.json, .* vocab.json with merges.txt in it, and there is merges.txt. .*write"
    with pytest.raises(UserError, match=words):
        read_tokenizer("hf", tmp_path)
    with pytest.raises(UserError, match=r"expected a .model or .spm file in it"):
        read_tokenizer("sentencepiece", tmp_path)


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for one repository, as far as its client asks."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/some/model/revision/"):
            about = {"id": "some/model", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in self.files]}
            self._send(json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/api/models/some/model/tree/"):
            tree = [{"type": "file", "path": k, "size": len(v), "oid": "b" * 40} for k, v in self.files.items()]
            self._send(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/some/model/resolve/"):
            self._send(self.files[self.path.rpartition("/")[2]])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _send(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        given = {"Content-Length": str(len(body)), "ETag": f'"{len(body)}"', "X-Repo-Commit": "a" * 40}
        for name, value in (given | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hub.files = {"vocab.txt": vocab_txt(tmp_path / "v").read_bytes(), "model.safetensors": b"not asked for"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield "some/model"
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub_brings_the_tokenizer_alone(hub: str, tmp_path: Path) -> None:
    tokenizer = read_tokenizer("hf", f"{hub}@main")
    assert tokenizer.encode("red star")[0] == bert().encode("red star", add_special_tokens=False).ids
    assert [p.name for p in (tmp_path / "cache").rglob("snapshots/*/*")] == ["vocab.txt"]
    with pytest.raises(UserError, match=r"text tokenizer some/other: no such file or folder here, and it cannot"):
        read_tokenizer("hf", "some/other")
    with pytest.raises(UserError, match=r"text tokenizer some/model: expected a .model or .spm file in it"):
        read_tokenizer("sentencepiece", hub)


# ------------------------------------------------------------------------------------------------------ shown to people
def test_pieces_of_a_word_are_joined_and_hidden_ones_stay_apart(tokenizer: TextTokenizer) -> None:
    text = "largest circles"
    ids = tokenizer.encode(text)[0]
    assert len(ids) > 3  # neither word is in the vocabularies

    def line(hidden: set[int]) -> str:
        framed = [tokenizer.start_id, *ids, tokenizer.end_id, tokenizer.pad_id]
        parts = parts_of_words(tokenizer, framed, [p in hidden for p in range(len(framed))])
        said = [f"[{tokenizer.piece(p.ids)}]" if p.hidden else tokenizer.piece(p.ids) for p in parts]
        return "".join(s if p.joined else f" {s}" for p, s in zip(parts, said, strict=True)).strip()

    assert line(set()) == text
    assert line({len(ids)}).endswith("]") and line({len(ids)}).replace("[", "").replace("]", "") == text
    assert line({1}).startswith("[")
    assert tokenizer.piece([tokenizer.mask_id]).lower().strip("<>[]") == "mask"
