from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest

from moesys.data.check import check
from moesys.data.corpus import open_corpus
from moesys.data.division import hashed_numbers
from moesys.data.megatron_indexed import IndexedTokens
from moesys.data.samples import Samples
from moesys.errors import DataError

VOCAB = 5000


@pytest.fixture(scope="module")
def write():
    """Write documents, each a list of sequences of token ids, with Megatron's own builder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def builder(prefix, documents, dtype=np.int32):
        made = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            for sequence in document:
                made.add_item(torch.tensor(np.asarray(sequence, np.int64)))
            made.end_document()
        made.finalize(f"{prefix}.idx")
        return prefix

    return builder


@pytest.fixture
def documents():
    random = np.random.default_rng(0)
    return [[random.integers(0, VOCAB, n) for n in random.integers(1, 60, random.integers(1, 4))] for _ in range(400)]


def flat(documents):
    return np.concatenate([sequence for document in documents for sequence in document])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_megatron_wrote_is_read_back(tmp_path, write, documents, configure, dtype):
    prefix = write(tmp_path / "data", documents, dtype)
    config = configure(kind="megatron", path=prefix, vocab_size=VOCAB, heldout=0.1)
    assert check(config) == []
    corpus = open_corpus(config)
    held = hashed_numbers(len(documents), 0.1)
    for tokens, side in ((corpus.train, ~held), (corpus.heldout, held)):
        expected = flat([document for document, chosen in zip(documents, side, strict=True) if chosen])
        assert len(tokens) == len(expected)
        assert tokens[:].tolist() == expected.tolist()
        random = np.random.default_rng(1)
        for begin, end in np.sort(random.integers(0, len(expected) + 1, (200, 2)), axis=1):
            assert tokens[begin:end].tolist() == expected[begin:end].tolist()
    assert corpus.vocab_size == VOCAB
    assert not (tmp_path / "cache").exists()


def test_samples_of_a_view_are_those_of_an_array(tmp_path, write, documents, configure):
    corpus = open_corpus(configure(kind="megatron", path=write(tmp_path / "data", documents), vocab_size=VOCAB))
    assert isinstance(corpus.train, IndexedTokens)
    view, array = Samples(corpus.train, 16, 5), Samples(corpus.train[:], 16, 5)
    assert all((view[n] == array[n]).all() for n in range(0, 3 * len(view), 7))
    assert view[0].dtype == np.int64


def test_a_single_document_is_cut_at_the_share(tmp_path, write, configure):
    sequences = [np.arange(n, n + 100) for n in range(0, 1000, 100)]
    prefix = write(tmp_path / "data", [sequences])
    corpus = open_corpus(configure(kind="megatron", path=prefix, vocab_size=1000, heldout=0.25))
    assert corpus.train[:].tolist() == list(range(750))
    assert corpus.heldout[:].tolist() == list(range(750, 1000))


def test_the_file_itself_may_be_named(tmp_path, write, documents, configure):
    prefix = write(tmp_path / "data.v1", documents)
    for name in (f"{prefix}.bin", f"{prefix}.idx"):
        config = configure(kind="megatron", path=name, vocab_size=VOCAB)
        assert check(config) == []
        assert len(open_corpus(config).train) > 0


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_token_beyond_the_vocabulary_is_named(tmp_path, write, documents, configure, wrong):
    documents[7][0][0] = wrong
    prefix = write(tmp_path / "data", documents)
    with pytest.raises(DataError, match=rf"data\.bin: token id {wrong} is not in the vocabulary of {VOCAB}; set"):
        open_corpus(configure(kind="megatron", path=prefix, vocab_size=VOCAB))


def test_the_vocabulary_is_the_models_before_the_tokenizers(tmp_path, write, documents, configure):
    prefix = write(tmp_path / "data", documents)
    with pytest.raises(DataError, match="is not in the vocabulary of 320"):
        open_corpus(configure(kind="megatron", path=prefix))


def test_too_few_tokens(tmp_path, write, configure):
    prefix = write(tmp_path / "data", [[[1, 2, 3]]])
    config = configure(kind="megatron", path=prefix, vocab_size=10)
    (problem,) = check(config)
    assert problem.key == "data.path"
    assert "holds at most 3 tokens" in problem.rule
    with pytest.raises(DataError, match="fewer than one sequence"):
        open_corpus(config)


def cut(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


def overwrite(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


DAMAGE = {
    "magic": (lambda i, b: overwrite(i, 0, b"PARQUET"), "is no index of a Megatron dataset"),
    "short header": (lambda i, b: cut(i, 20), "is no index of a Megatron dataset"),
    "version": (lambda i, b: overwrite(i, 9, struct.pack("<Q", 7)), "version 7"),
    "floating point": (lambda i, b: overwrite(i, 17, b"\x06"), "tokens of type 6"),
    "short index": (lambda i, b: cut(i, i.stat().st_size - 8), "ends early: it should list"),
    "short tokens": (lambda i, b: cut(b, b.stat().st_size - 4), "ends early: it has"),
    "no sequences": (lambda i, b: overwrite(i, 18, struct.pack("<QQ", 0, 1)), "holds no tokens"),
    "no index": (lambda i, b: i.unlink(), "no such file: "),
    "no tokens": (lambda i, b: b.unlink(), "no such file: "),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_before_the_start(tmp_path, write, documents, configure, kind):
    prefix = write(tmp_path / "data", documents)
    damage, message = DAMAGE[kind]
    damage(tmp_path / "data.idx", tmp_path / "data.bin")
    config = configure(kind="megatron", path=prefix, vocab_size=VOCAB)
    (problem,) = check(config)
    assert problem.key == "data.path"
    assert message in problem.rule
    with pytest.raises(DataError):
        open_corpus(config)
