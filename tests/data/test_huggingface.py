from __future__ import annotations

import datasets
import pytest

from moesys.config.schema import DataConfig
from moesys.data import huggingface
from moesys.data.check import check
from moesys.data.corpus import open_corpus
from moesys.errors import DataError

TEXTS = [f"document {n}: größer {'x' * (n % 11)}" for n in range(2500)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def dataset():
    return datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})


def documents(path, **keys):
    return list(huggingface.documents(DataConfig(kind="huggingface", path=str(path), **keys)))


def expected():
    return [(str(n), text.encode()) for n, text in enumerate(TEXTS)]


def test_a_dataset_saved_to_disk(tmp_path, dataset, configure):
    dataset.save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved") == expected()
    assert check(configure(kind="huggingface", path=tmp_path / "saved")) == []


def test_a_split_saved_to_disk(tmp_path, dataset, configure):
    other = datasets.Dataset.from_dict({"text": ["only"]})
    datasets.DatasetDict({"train": dataset, "validation": other}).save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved") == expected()
    assert documents(tmp_path / "saved", split="validation") == [("0", b"only")]
    with pytest.raises(DataError, match=r'has no split "test" \(data.split\), but train, validation'):
        documents(tmp_path / "saved", split="test")
    (problem,) = check(configure(kind="huggingface", path=tmp_path / "saved", split="test"))
    assert (problem.key, problem.rule) == ("data.split", "must be one of train, validation")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "arrow"])
def test_local_files(tmp_path, dataset, configure, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=dataset.features) as writer:
            for row in dataset:
                writer.write(row)
            writer.finalize()
    else:
        getattr(dataset, f"to_{suffix.removesuffix('l')}")(path)
    assert documents(path) == expected()
    assert check(configure(kind="huggingface", path=path)) == []


def test_a_folder_of_local_files(tmp_path, dataset, configure):
    folder = tmp_path / "folder"
    folder.mkdir()
    dataset.select(range(1000)).to_parquet(folder / "train-0.parquet")
    dataset.select(range(1000, 2500)).to_parquet(folder / "train-1.parquet")
    assert documents(folder) == expected()
    assert check(configure(kind="huggingface", path=folder)) == []


def test_part_of_a_split(tmp_path, dataset):
    dataset.to_parquet(tmp_path / "data.parquet")
    assert len(documents(tmp_path / "data.parquet", split="train[:100]")) == 100


def test_a_corpus_of_a_dataset(tmp_path, dataset, configure):
    dataset.save_to_disk(tmp_path / "saved")
    config = configure(kind="huggingface", path=tmp_path / "saved", heldout=0.1)
    first, again = open_corpus(config), open_corpus(config)
    held = first.tokenizer.decode(first.heldout[:]).decode()
    train = first.tokenizer.decode(first.train[:]).decode()
    for text in TEXTS[:300]:
        assert (text in train) != (text in held)
    assert 0.05 < len(first.heldout) / (len(first.heldout) + len(first.train)) < 0.15
    assert again.train[:].tolist() == first.train[:].tolist()
    assert len(first.train) + len(first.heldout) == sum(len(text.encode()) + 1 for text in TEXTS)


def test_text_under_another_name(tmp_path, configure):
    datasets.Dataset.from_dict({"content": ["a"], "id": [1]}).save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved", text_key="content") == [("0", b"a")]
    with pytest.raises(DataError, match=r'has no column "text" \(data.text_key\), but content, id'):
        documents(tmp_path / "saved")
    (problem,) = check(configure(kind="huggingface", path=tmp_path / "saved"))
    assert (problem.key, problem.rule) == ("data.text_key", "must be a column of the dataset: content, id")


def test_rows_that_are_no_text(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b", None]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r'row 2: column "text" \(data.text_key\) must be a string'):
        documents(tmp_path / "saved")


def test_rows_that_cannot_be_read(tmp_path):
    """A saved dataset is mapped without a look at its text: what is no UTF-8 shows when a row is asked for."""
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    path.write_bytes(path.read_bytes().replace(b"onetwo", b"one\xff\xfeo"))
    with pytest.raises(DataError, match=r'cannot read the dataset .*saved, split "train" .*UnicodeDecodeError'):
        documents(tmp_path / "saved")


def test_a_damaged_file(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r'cannot load the dataset .*data\.parquet, split "train"'):
        documents(tmp_path / "data.parquet")


def test_a_name_that_is_nowhere():
    with pytest.raises(DataError, match=r"cannot load the dataset nobody/nothing-of-the-kind"):
        documents("nobody/nothing-of-the-kind")


def test_progress_bars_stay_as_they_were(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    documents(tmp_path / "saved")
    assert datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    documents(tmp_path / "saved")
    assert not datasets.is_progress_bar_enabled()
