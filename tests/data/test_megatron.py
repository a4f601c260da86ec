from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest

from moesys.data.check import check
from moesys.data.corpus import open_corpus
from moesys.data.division import hashed_numbers
from moesys.data.megatron_indexed import IndexedTokens, count_tokens
from moesys.data.samples import Samples
from moesys.errors import DataError

VOCAB = 5000


@pytest.fixture(scope="module")
def write():
    """Write documents, each a list of sequences of token ids, with Megatron's own builder, which needs torch."""
    pytest.importorskip("torch")
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
    "magic": (lambda i, b: overwrite(i, 0, b"PARQUET"), "is not an index of a Megatron dataset"),
    "short header": (lambda i, b: cut(i, 20), "is not an index of a Megatron dataset"),
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


def _index(lengths, bounds, code=4, size=4):
    """The bytes of an index whose sequences lie one after another."""
    lengths = np.asarray(lengths, np.int32)
    offsets = np.cumsum(lengths * size) - lengths * size
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(bounds))
    return header + lengths.tobytes() + offsets.astype(np.int64).tobytes() + np.asarray(bounds, np.int64).tobytes()


INSIDE = {
    "a length below zero": (34 + 4 * 2, "<i", -5, "sequence 2 has the length -5"),
    "another length": (34 + 4 * 2, "<i", 9, "sequence 3 of int32 begins at byte"),
    "an offset": (
        34 + 4 * 6 + 8 * 3,
        "<q",
        1,
        "sequence 3 of int32 begins at byte 1, and the lengths before it end at 24",
    ),
    "a bound below the one before": (34 + 12 * 6 + 8, "<q", 6, "document 1 begins at sequence 6 and ends at 4"),
    "the first bound": (34 + 12 * 6, "<q", 1, "the first document begins at sequence 1"),
    "the last bound": (34 + 12 * 6 + 24, "<q", 7, "the last document ends at sequence 7 of 6"),
    "the type": (34 - 17, "<B", 8, "sequence 1 of uint16 begins at byte"),
    "no bounds": (34 - 8, "<Q", 0, "no documents"),
}


@pytest.mark.parametrize(("at", "form", "value", "said"), INSIDE.values(), ids=INSIDE)
def test_an_index_is_checked_whole(tmp_path, configure, at, form, value, said):
    data = bytearray(_index([2, 2, 2, 3, 1, 4], [0, 2, 4, 6]))
    struct.pack_into(form, data, at, value)
    (tmp_path / "data.idx").write_bytes(bytes(data))
    (tmp_path / "data.bin").write_bytes(bytes(4 * 14))
    problems = check(configure(kind="megatron", path=tmp_path / "data", vocab_size=VOCAB))
    assert len(problems) == 1 and said in problems[0].rule and problems[0].remedy, problems


def test_every_damaged_index_is_refused_or_read_as_it_is(tmp_path, configure):
    """A thousand mutations of one to four bytes: a DataError, or tokens that the check has counted."""
    pytest.importorskip("torch")  # which Megatron's reader imports
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 300)
    whole = _index(lengths, [*range(0, 300, 3), 300])
    (tmp_path / "data.bin").write_bytes(rng.integers(0, VOCAB, int(lengths.sum()), np.int32).tobytes())
    config = configure(kind="megatron", path=tmp_path / "data", vocab_size=VOCAB, heldout=0.1)
    refused = 0
    for number in range(1000):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            damaged[rng.integers(len(whole))] = rng.integers(256)
        (tmp_path / "data.idx").write_bytes(bytes(damaged[: rng.integers(len(whole))] if number % 10 == 0 else damaged))
        try:
            tokens = count_tokens(config.data)
        except DataError:
            refused += 1
            continue
        corpus = open_corpus(config)
        assert len(corpus.train) + len(corpus.heldout) == tokens == lengths.sum()
    assert refused > 900
