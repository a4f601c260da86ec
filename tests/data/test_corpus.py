from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from moesys.config.schema import DataConfig
from moesys.data import text
from moesys.data.corpus import open_corpus, vocab_size
from moesys.data.division import hashed_names
from moesys.data.ngram import cross_entropies
from moesys.data.samples import Samples
from moesys.data.tokenizers import HFTokenizer
from moesys.errors import DataError


def test_documents_are_joined_by_their_end(library, configure):
    corpus = open_corpus(configure(kind="text", path=library, heldout=0.2))
    documents = list(text.documents(DataConfig(kind="text", path=str(library))))
    held = hashed_names([document.name for document in documents], 0.2)
    for tokens, side in ((corpus.heldout, held), (corpus.train, ~held)):
        expected = []
        for document, chosen in zip(documents, side, strict=True):
            if chosen:
                expected += [*document.text, 256]
        assert tokens[:].tolist() == expected
    assert corpus.vocab_size == 320


def test_a_tokenizer_file(library, configure, tokenizer_file):
    corpus = open_corpus(configure(kind="text", path=library, tokenizer=tokenizer_file))
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(tokenizer_file))
    end = theirs.token_to_id("<|endoftext|>")
    expected = []
    documents = list(text.documents(DataConfig(kind="text", path=str(library))))
    for document, held in zip(documents, hashed_names([d.name for d in documents], 0.05), strict=True):
        if not held:
            expected += [*theirs.encode(document.text.decode(), add_special_tokens=False).ids, end]
    assert corpus.train[:].tolist() == expected
    assert theirs.get_vocab_size() <= corpus.vocab_size < theirs.get_vocab_size() + 64
    assert corpus.vocab_size % 64 == 0


def test_a_tokenizer_without_an_end_of_document(tmp_path, configure):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "data").mkdir()
    for number in range(10):
        (tmp_path / "data" / f"{number}.txt").write_text("a b " * 5)
    corpus = open_corpus(configure(4, kind="text", path=tmp_path / "data", tokenizer=tmp_path / "words.json"))
    assert corpus.train[:].tolist() == [0, 1] * (len(corpus.train) // 2)
    assert len(corpus.train) + len(corpus.heldout) == 100


@pytest.mark.parametrize("content", [b"0123456789" * 100, "größer ".encode() * 100, "🙂".encode() * 250])
def test_a_single_file_is_cut_between_characters(tmp_path, configure, content):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    corpus = open_corpus(configure(kind="text", path=path, heldout=0.1))
    train, heldout = (corpus.tokenizer.decode(tokens[:]) for tokens in (corpus.train, corpus.heldout))
    assert train + heldout == content
    assert abs(len(heldout) - len(content) / 10) < 4
    assert train.decode() and heldout.decode()
    assert corpus.train[-1:].tolist() == corpus.heldout[-1:].tolist() == [256]


def test_empty_documents_leave_no_trace(tmp_path, configure):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("")
    (tmp_path / "d.txt").write_text("0123456789" * 10)
    corpus = open_corpus(configure(kind="text", path=tmp_path, heldout=0.3))
    assert len(corpus.train) == 71
    assert len(corpus.heldout) == 31


def test_the_split_hangs_on_names_not_on_place_or_seed(library, configure, tmp_path):
    moved = tmp_path / "elsewhere"
    library.rename(moved)
    elsewhere = open_corpus(configure(kind="text", path=moved, cache=tmp_path / "other"))
    moved.rename(library)
    here = open_corpus(configure(kind="text", path=library).model_copy(update={"seed": 9}))
    assert here.train[:].tolist() == elsewhere.train[:].tolist()
    assert here.heldout[:].tolist() == elsewhere.heldout[:].tolist()


def test_too_little_text(tmp_path, configure):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    config = configure(16, kind="text", path=tmp_path)
    rule = r"6 held-out tokens are fewer than one sequence: train.seq_len\(16\) \+ 1 = 17; use more text"
    with pytest.raises(DataError, match=rule):
        open_corpus(config)


def test_a_side_that_the_tokenizer_empties(tmp_path, configure):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("a " * 200 + " " * 400)
    (tmp_path / "file").touch()
    for cache in (tmp_path / "cache", tmp_path / "file"):  # on disk and in memory
        config = configure(kind="text", path=tmp_path / "a.txt", tokenizer=tmp_path / "words.json", cache=cache)
        with pytest.raises(DataError, match="0 held-out tokens are fewer than one sequence"):
            open_corpus(config)


def test_no_text_at_all(tmp_path, configure, write_lines):
    path = write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": ""})
    with pytest.raises(DataError, match="the data hold no text"):
        open_corpus(configure(kind="text", path=path))


def test_the_vocabulary_is_the_models_or_the_tokenizers_rounded_up(configure, tokenizer_file, library):
    assert vocab_size(configure()) == 320
    assert vocab_size(configure(vocab_size=300)) == 300
    assert vocab_size(configure(tokenizer=tokenizer_file)) == -(-HFTokenizer(tokenizer_file).vocab_size // 64) * 64
    assert open_corpus(configure(vocab_size=512, kind="text", path=library)).vocab_size == 512
    with pytest.raises(DataError, match=r"model\.vocab_size 100 is below the tokenizer's 257"):
        open_corpus(configure(vocab_size=100, kind="text", path=library))


def test_the_standard_library_end_to_end(configure):
    corpus = open_corpus(configure(256))
    windows = np.stack(list(Samples(corpus.heldout, 256))[:200])
    unigram, bigram = cross_entropies(corpus.train, windows, corpus.vocab_size)
    assert 1.5 < bigram < unigram < 4
    assert 0.01 < len(corpus.heldout) / len(corpus.train) < 0.12
    assert int(corpus.train[:].max()) == 256
    again = Samples(corpus.train, 256, seed=1)
    assert b"\n" in corpus.tokenizer.decode(again[12345])


def test_no_torch():
    code = (
        "import sys, moesys.data.check, moesys.data.corpus, moesys.data.samples, moesys.data.ngram\n"
        "heavy = {'torch', 'datasets', 'tokenizers', 'megatron', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_per_token_count_the_text_alone(library, configure, tokenizer_file):
    """The end of a document is a token without bytes, whatever its name is."""
    size = {side: 0 for side in (True, False)}
    documents = list(text.documents(DataConfig(kind="text", path=str(library))))
    for document, held in zip(documents, hashed_names([d.name for d in documents], 0.05), strict=True):
        size[bool(held)] += len(document.text)
    for tokenizer in ("bytes", tokenizer_file):
        corpus = open_corpus(configure(kind="text", path=library, tokenizer=tokenizer))
        tokens = corpus.train[:]
        assert corpus.bytes_per_token([tokens]) == pytest.approx(size[False] / len(tokens))
    assert replace(corpus, tokenized=False).bytes_per_token([tokens]) is None
