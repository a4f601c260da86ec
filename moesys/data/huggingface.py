"""Datasets of the package Hugging Face `datasets`: saved to disk, in local files, or by name."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesys.config.schema import DataConfig
from moesys.data import documents as files
from moesys.data import text
from moesys.data.documents import Document
from moesys.errors import DataError, Problem

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""The loader of `datasets` for a single file, by suffix."""
NO_PACKAGE = "needs the package datasets, which is not installed"
INSTALL = "pip install datasets, or use data.kind text"


def check(data: DataConfig) -> list[Problem]:
    """Problems of a missing package or a local dataset; a dataset's name can only be tried later."""
    problems = []
    if importlib.util.find_spec("datasets") is None:
        problems.append(Problem("data.kind", NO_PACKAGE, INSTALL))
    if not data.path:
        remedy = "name a folder saved to disk, a .json, .parquet or .arrow file, or a dataset"
        return [*problems, Problem("data.path", "is needed with data.kind huggingface", remedy)]
    path = _path(data)
    try:
        rule = files.absent(path)
        if rule == files.NOTHING_THERE:
            return problems + _check_name(data.path)
        if rule is not None:
            raise DataError(rule)
        return problems + _check_local(path, data)
    except DataError as error:
        return [*problems, Problem("data.path", str(error), "repair the dataset, or name another one")]


def identity(data: DataConfig) -> object:
    """JSON that changes when the dataset does: files with sizes and times."""
    path = _path(data)
    if files.absent(path) is None:
        listed = files.listing(path, lambda name: True, _hidden)
    else:  # named: where the package keeps it
        kept = [Path(entry["filename"]) for entry in _load(data).cache_files]
        listed = [file for file_path in kept for file in files.listing(file_path, lambda name: True, _hidden)]
    return [data.split, data.text_key, *files.identity(path, listed)]


def documents(data: DataConfig) -> Iterator[Document]:
    """One document per row, named by the row's number (from 0).

    Raises:
        DataError: the dataset cannot be loaded, or has no text at `data.text_key`.
    """
    dataset = _load(data)
    if data.text_key not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise DataError(f'{data.path}: has no column "{data.text_key}" (data.text_key), but {columns}')
    number = 0
    for values in _values(dataset, data):
        for value in values:
            if not isinstance(value, str):
                rule = f'column "{data.text_key}" (data.text_key) must be a string'
                raise DataError(f"{data.path}: row {number}: {rule}")
            yield Document(str(number), value.encode("utf-8", "surrogatepass"))
            number += 1


def _values(dataset: Any, data: DataConfig) -> Iterator[list[Any]]:
    """The column of text, a thousand rows at a time."""
    batches = dataset.select_columns([data.text_key]).iter(batch_size=1000)
    while True:
        try:
            rows = next(batches, None)
        except Exception as error:  # whatever damaged files make the package raise
            raise _failure(data, "read", error) from None
        if rows is None:
            return
        yield rows[data.text_key]


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _path(data: DataConfig) -> Path:
    return files.located(data.path or "")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load(data: DataConfig) -> Any:
    """The dataset's split, a `datasets.Dataset`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from other packages; a user cannot act on them
            import datasets
    except ImportError:
        raise DataError(f"data.kind huggingface {NO_PACKAGE}; {INSTALL}") from None
    path = _path(data)
    try:
        with _quiet(datasets):
            if _is_saved(path):
                return _split_of(datasets.load_from_disk(str(path)), data)
            if path.is_file():
                return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split=data.split)
            return datasets.load_dataset(data.path if files.absent(path) else str(path), split=data.split)
    except DataError:
        raise
    except Exception as error:  # the package raises whatever its many parts raise
        raise _failure(data, "load", error) from None


def _failure(data: DataConfig, verb: str, error: Exception) -> DataError:
    cause = error.__cause__ or error
    reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
    return DataError(f'cannot {verb} the dataset {data.path}, split "{data.split}" (data.split): {reason}')


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Turn off the package's progress bars and log lines; errors are raised anyway."""
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _split_of(saved: Any, data: DataConfig) -> Any:
    """The split asked for of what was saved to disk: one dataset, or a dictionary of splits."""
    if isinstance(saved, dict):
        if data.split not in saved:
            raise DataError(f'{data.path}: has no split "{data.split}" (data.split), but {", ".join(saved)}')
        return saved[data.split]
    if data.split not in ("train", str(saved.split)):
        raise DataError(f'{data.path}: is one dataset without splits, and data.split is "{data.split}"')
    return saved


def _check_local(path: Path, data: DataConfig) -> list[Problem]:
    if path.is_file():
        if path.suffix not in BUILDERS:
            rule = f"must end in one of {', '.join(BUILDERS)}"
            return [Problem("data.path", rule, "convert or rename the file")]
        if path.stat().st_size == 0:
            return [Problem("data.path", "holds no text: the file is empty", "name another file")]
        (file,) = files.listing(path, lambda name: True, _hidden)
        text.probe(file, data.text_key)
        return []
    if _is_saved(path):
        return _check_saved(path, data)
    found = files.listing(path, lambda name: name.endswith((*BUILDERS, ".txt")), _hidden)
    if not found:
        rule = "the folder is not a dataset saved to disk, and has no file that ends in one of"
        return [Problem("data.path", f"{rule} {', '.join(BUILDERS)}", "name another folder")]
    return []


def _check_saved(path: Path, data: DataConfig) -> list[Problem]:
    folder = path
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list):
            raise DataError(f"{path / 'dataset_dict.json'} lists no splits")
        if data.split not in splits:
            return [Problem("data.split", f"must be one of {', '.join(map(str, splits))}", "choose one of these")]
        folder = path / data.split
    features = _json(folder / "dataset_info.json").get("features")
    if not isinstance(features, dict):
        raise DataError(f"{folder / 'dataset_info.json'} lists no features")
    if data.text_key not in features:
        rule = f"must be a column of the dataset: {', '.join(features)}"
        return [Problem("data.text_key", rule, "choose one of these")]
    return []


def _json(path: Path) -> dict[str, Any]:
    content = files.parse(files.read(path), f"{path} is")
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object")
    return content


def _check_name(name: str) -> list[Problem]:
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and Path(name).suffix not in BUILDERS:
        return []
    rule = f"{files.NOTHING_THERE}, and no name of a dataset (NAME or OWNER/NAME)"
    return [Problem("data.path", rule, "paths are relative to the working directory")]
