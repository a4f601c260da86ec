"""Held-out texts with names, `train.eval`: whole, with the run's tokenizer, beside the share of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesys.config.changes import KINDS, Kind, table_key
from moesys.config.differences import differences, known, saved_form
from moesys.config.schema import Config
from moesys.config.values import config_of
from moesys.data import text
from moesys.data.check import check, check_texts
from moesys.data.corpus import open_corpus, open_texts, source_of
from moesys.errors import DataError
from moesys.launchers.spec import with_absolute_paths


def run(library: Path, tmp_path: Path, **texts: dict[str, Any]) -> Config:
    data = {"kind": "text", "path": str(library), "cache": str(tmp_path / "cache")}
    return config_of({"model": {"hidden": 8, "layers": 1}, "train": {"seq_len": 8, "eval": texts}, "data": data})


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("another text, of one file: größer\n" * 9)
    return path


def test_a_text_is_held_out_whole_and_leaves_the_data_as_they_are(library, tmp_path, other):
    config = run(library, tmp_path, other={"path": str(other)}, again={"path": str(library)})
    corpus = open_corpus(config)
    assert list(corpus.more) == ["other", "again"]
    assert corpus.more["other"].tokens[:].tolist() == [*other.read_bytes(), 256]
    every = [t for document in text.documents(source_of(config, "again")) for t in (*document.text, 256)]
    assert corpus.more["again"].tokens[:].tolist() == every
    alone = open_corpus(run(library, tmp_path))
    assert np.array_equal(corpus.heldout[:], alone.heldout[:]) and np.array_equal(corpus.train[:], alone.train[:])
    assert corpus.fingerprint == alone.fingerprint
    reopened = open_corpus(config)
    assert reopened.more["other"].tokens[:].tolist() == corpus.more["other"].tokens[:].tolist(), "from the cache"


def test_tokens_of_another_tool_are_held_out_whole(library, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for document in ([1, 2, 3], [4, 5], [6, 7, 8, 9, 10]):
        builder.add_document(np.array(document, np.uint16), [len(document)])
    builder.finalize(f"{prefix}.idx")
    corpus = open_corpus(run(library, tmp_path, tokens={"kind": "megatron", "path": str(prefix)}))
    found = corpus.more["tokens"]
    assert found.tokens[:].tolist() == list(range(1, 11)) and not found.tokenized
    assert corpus.bytes_per_token([found.tokens[:]], found.tokenized) is None


def test_a_mistake_is_told_by_the_texts_own_key(library, tmp_path, other):
    config = run(library, tmp_path, gone={"path": "/nowhere"}, none={}, stdlib={"kind": "python-stdlib", "path": "x"})
    assert [problem.key for problem in check(config)] == [f"train.eval.{n}.path" for n in ("gone", "none", "stdlib")]
    other.write_text("short")
    with pytest.raises(DataError, match=r"train\.eval\.short: .*other\.txt: 6 held-out tokens are fewer than one"):
        open_corpus(run(library, tmp_path, short={"path": str(other)}))


def test_texts_alone_need_no_data(tmp_path, other):
    config = run(Path("/nowhere"), tmp_path, other={"path": str(other)})
    assert check_texts(config) == [] and [problem.key for problem in check(config)] == ["data.path"]
    corpus = open_texts(config)
    assert corpus.more["other"].tokens[:].tolist() == [*other.read_bytes(), 256] and not len(corpus.heldout)
    assert corpus.more_fingerprints["other"] != corpus.fingerprint["digest"]
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 100})})
    assert [problem.key for problem in check_texts(narrow)] == ["model.vocab_size"]


def test_paths_are_taken_from_where_the_run_is_launched(library, tmp_path):
    config = run(library, tmp_path, here={"path": "x.txt"}, hub={"kind": "huggingface", "path": "wikitext"})
    found = with_absolute_paths(config, tmp_path).train.eval
    assert (found["here"].path, found["hub"].path) == (str(tmp_path / "x.txt"), "wikitext")


def test_a_text_may_come_and_go_when_a_run_goes_on(library, tmp_path, other):
    with_one, without = (saved_form(run(library, tmp_path, **texts)) for texts in ({"o": {"path": str(other)}}, {}))
    changed = saved_form(run(library, tmp_path, o={"path": "elsewhere"}, p={"path": str(other)}))
    assert differences(with_one, without) == differences(without, with_one) == differences(with_one, changed) == []
    assert KINDS[table_key("train.eval.o.path")] is Kind.FREE
    assert known(with_one) == (with_one, [])
