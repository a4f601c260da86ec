"""The sources of Python's standard library: real text that every machine has.

Installed packages, test folders and files generated for one machine are left out. Some distributions of Python have no
test folders, and their tables of odd characters are no text.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moesys.config.schema import DataConfig
from moesys.data import documents as files
from moesys.data.documents import Document, File
from moesys.errors import DataError, Problem

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}


def check(data: DataConfig) -> list[Problem]:
    """Problems of a path, which this source does not read, and of a Python without sources."""
    if data.path is not None:
        rule = "must be absent with data.kind python-stdlib, which reads no path"
        return [Problem("data.path", rule, "set data.kind too (text, say), or leave the path out")]
    try:
        found = listing(data)
    except DataError as error:
        return [Problem("data.kind", str(error), "use data.kind text with text of your own")]
    if not found:
        rule = f"this Python has no sources of its standard library in {_root()}"
        return [Problem("data.kind", rule, "use data.kind text with text of your own")]
    return []


def listing(data: DataConfig) -> list[File]:
    """The library's .py files, sorted by name."""
    return files.listing(_root(), _wanted, lambda name: name in SKIPPED or name.startswith("config-"))


def identity(data: DataConfig) -> object:
    """JSON that changes when the text does."""
    return files.identity(_root(), listing(data))


def documents(data: DataConfig) -> Iterator[Document]:
    """One document per file."""
    return (Document(file.name, files.read(file.path)) for file in listing(data))


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _wanted(name: str) -> bool:
    return name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))
