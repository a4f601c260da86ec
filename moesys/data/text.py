"""A text file, or all text files under a folder; in .jsonl files, one document per line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from moesys.config.schema import DataConfig
from moesys.data import documents as files
from moesys.data.documents import Document, File
from moesys.errors import DataError, Problem

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
OPENED = 1000
"""Files that `check` opens at most: it must be quick in any folder."""


def check(data: DataConfig) -> list[Problem]:
    """Problems if there is no text, or if the first lines of the first files cannot be read."""
    if not data.path:
        return [Problem("data.path", "is needed with data.kind text", "name a file or folder")]
    path = _root(data)
    if (rule := files.absent(path)) is not None:
        return [Problem("data.path", rule, "paths are relative to the working directory")]
    if not path.is_dir() and not path.name.endswith(SUFFIXES):
        return [Problem("data.path", f"must end in one of {', '.join(SUFFIXES)}", "rename the file")]
    try:
        found = listing(data)
        if not found:
            rule = f"the folder holds no file that ends in one of {', '.join(SUFFIXES)}"
            return [Problem("data.path", rule, "name another folder, or rename the files")]
        if not any(file.size for file in found):
            return [Problem("data.path", "holds no text: every file is empty", "name another file or folder")]
        for file in islice(found, OPENED):
            probe(file, data.text_key)
    except DataError as error:
        return [Problem("data.path", str(error), "repair or remove the file, or correct data.text_key")]
    return []


def listing(data: DataConfig) -> list[File]:
    """All files, sorted by name; hidden ones are left out."""
    return files.listing(_root(data), _wanted, lambda name: name.startswith(".") or name == "__pycache__")


def identity(data: DataConfig) -> object:
    """JSON that changes when the text does."""
    return [data.text_key, *files.identity(_root(data), listing(data))]


def documents(data: DataConfig) -> Iterator[Document]:
    """One document per file, or per line of a .jsonl file, named FILE:LINE (from 1).

    Raises:
        DataError: a file cannot be read, or a line is not an object with a string at `data.text_key`.
    """
    for file in listing(data):
        if file.name.endswith(".jsonl"):
            yield from _lines(file, data.text_key)
        else:
            yield Document(file.name, files.read(file.path))


def _root(data: DataConfig) -> Path:
    return files.located(data.path or "")


def _wanted(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _lines(file: File, text_key: str) -> Iterator[Document]:
    try:
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(f"{file.name}:{number}", _text(line, f"{file.path}:{number}", text_key))
    except OSError as error:
        raise files.unreadable(file.path, error) from None


def _text(line: bytes, where: str, text_key: str) -> bytes:
    record = files.parse(line, f"{where}:")
    if not isinstance(record, dict) or text_key not in record:
        fields = ", ".join(record) if isinstance(record, dict) else "no fields"
        raise DataError(f'{where}: has no field "{text_key}" (data.text_key), but {fields or "no fields"}')
    if not isinstance(record[text_key], str):
        raise DataError(f'{where}: the field "{text_key}" (data.text_key) must be a string')
    return record[text_key].encode("utf-8", "surrogatepass")


def probe(file: File, text_key: str) -> None:
    """Open a file and read its beginning, or the first line of a .jsonl file.

    Raises:
        DataError: it cannot be read.
    """
    if file.name.endswith(".jsonl"):
        next(_lines(file, text_key), None)
        return
    try:
        with file.path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise files.unreadable(file.path, error) from None
