from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.config.schema import DataConfig
from moesys.data.tokenizers import END_OF_DOCUMENT, ByteTokenizer, HFTokenizer, build_tokenizer, check
from moesys.errors import DataError


@given(st.binary())
def test_bytes_are_their_own_tokens(text):
    tokens = ByteTokenizer().encode(text)
    assert tokens.tolist() == list(text)
    assert tokens.dtype == np.uint16
    assert ByteTokenizer().decode(tokens) == text


def test_the_end_of_a_document_has_no_bytes():
    assert ByteTokenizer().decode(np.array([104, 256, 105])) == b"hi"


def test_a_file_encodes_as_the_package_does(tokenizer_file):
    from tokenizers import Tokenizer

    ours, theirs = HFTokenizer(tokenizer_file), Tokenizer.from_file(str(tokenizer_file))
    text = "the gate of größer 🙂\n\tmixture"
    tokens = ours.encode(text.encode())
    assert tokens.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert tokens.dtype == np.uint16
    assert ours.decode(tokens) == text.encode()
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.end_of_document == theirs.token_to_id("<|endoftext|>")
    assert [many.tolist() for many in ours.encode_many([b"the", b""])] == [ours.encode(b"the").tolist(), []]


def test_the_files_own_truncation_and_padding_are_off(tmp_path):
    """Both are saved by whoever prepared the tokenizer for batches of a model's input; a corpus is whole."""
    tokenizer = _word_level(["a", "b", "[PAD]"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6, pad_id=2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = HFTokenizer(tmp_path / "tokenizer.json").encode_many([b"a b " * 5, b"b"])
    assert [tokens.tolist() for tokens in found] == [[0, 1] * 5, [1]]


def test_bytes_that_are_not_utf8_are_replaced(tokenizer_file):
    tokenizer = HFTokenizer(tokenizer_file)
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb".encode()


@pytest.mark.parametrize("name", [*END_OF_DOCUMENT, None])
def test_the_end_of_document_is_found_by_its_usual_names(tmp_path, name):
    words = ["a", "b", *([name] if name else [])]
    path = tmp_path / "tokenizer.json"
    _word_level(words).save(str(path))
    assert HFTokenizer(path).end_of_document == (2 if name else None)


def test_the_vocabulary_covers_the_highest_id_where_ids_have_gaps(tmp_path):
    path = tmp_path / "tokenizer.json"
    _word_level(["a", "b"]).save(str(path))
    content = json.loads(path.read_text())
    content["model"]["vocab"]["far"] = 999
    path.write_text(json.dumps(content))
    assert HFTokenizer(path).vocab_size == 1000


def test_a_unigram_tokenizer_lists_its_vocabulary(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0, False)).save(str(path))
    tokenizer = HFTokenizer(path)
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode(b"ab").tolist() == [1, 2]


def test_small_vocabularies_have_small_tokens(tmp_path):
    path = tmp_path / "tokenizer.json"
    _word_level(["a", "b"]).save(str(path))
    assert HFTokenizer(path).encode(b"a").dtype == np.uint8


def test_identity_follows_the_content(tmp_path, tokenizer_file):
    path = tmp_path / "tokenizer.json"
    _word_level(["a", "b"]).save(str(path))
    first = HFTokenizer(path).identity
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    assert HFTokenizer(copy).identity == first
    assert HFTokenizer(tokenizer_file).identity != first


def test_the_configuration_names_the_tokenizer(tokenizer_file):
    assert isinstance(build_tokenizer(DataConfig()), ByteTokenizer)
    assert isinstance(build_tokenizer(DataConfig(tokenizer=str(tokenizer_file))), HFTokenizer)
    with pytest.raises(DataError, match=r"cannot read absent\.json: No such file"):
        build_tokenizer(DataConfig(tokenizer="absent.json"))


def _word_level(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


BROKEN = {
    "a normalizer cut short": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "merges of nothing": {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "continuing_subword_prefix": "xx"}
    },
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_file_that_the_package_breaks_off_on_is_one_message(tmp_path, change):
    """Its Rust code panics, which is a BaseException in Python."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(_word_level(["a", "[UNK]"]).to_str()), **change}))
    (problem,) = check(DataConfig(tokenizer=str(path)))
    assert problem.key == "data.tokenizer" and "breaks off on this file" in problem.rule and problem.remedy


@pytest.mark.parametrize("number", [-1, 10**30, True])
def test_ids_that_no_embedding_has_are_refused(tmp_path, number):
    path = tmp_path / "tokenizer.json"
    content = json.loads(_word_level(["a", "b"]).to_str())
    content["model"]["vocab"]["far"] = number
    path.write_text(json.dumps(content))
    (problem,) = check(DataConfig(tokenizer=str(path)))
    assert "its vocabulary has ids" in problem.rule


def test_a_tokenizer_without_the_words_of_the_probe_is_legal(tmp_path):
    path = tmp_path / "tokenizer.json"
    _word_level(["x"]).save(str(path))
    assert check(DataConfig(tokenizer=str(path))) == []


def test_no_mutation_of_a_file_ends_in_anything_but_an_answer(tmp_path):
    """A result or a DataError; what the package refuses, and what it accepts, is its own affair."""
    content = json.loads(_word_level(["a", "b", "[UNK]"]).to_str())
    path = tmp_path / "tokenizer.json"
    places = [(content, key) for key in content] + [(content["model"], key) for key in content["model"]]
    values = [None, -1, 0, 10**10, "", "x", [], {}, True, 1.5, [[]], [{}], {"type": "x"}]
    answers = 0
    for holder, key in places:
        kept = holder[key]
        for value in values:
            holder[key] = value
            path.write_text(json.dumps(content))
            answers += len(check(DataConfig(tokenizer=str(path))))
        holder[key] = kept
    text = json.dumps(content).encode()
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(text)
        damaged[random.integers(len(text))] = random.integers(256)
        path.write_bytes(bytes(damaged))
        answers += len(check(DataConfig(tokenizer=str(path))))
    assert answers > 100
