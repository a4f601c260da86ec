"""What every source of text yields, and the files that most of them read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moesys.errors import DataError


class Document(NamedTuple):
    """A piece of text that stands alone.

    `name` is unique in its source and the same on every machine; the held-out split hangs on it.
    """

    name: str
    text: bytes


class File(NamedTuple):
    """A file of a source: `name` is its path relative to the source, with forward slashes."""

    name: str
    path: Path
    size: int
    mtime_ns: int


def listing(root: Path, wanted: Callable[[str], bool], skip: Callable[[str], bool]) -> list[File]:
    """The files under the folder `root` (or `root` itself, if a file), sorted by name.

    Symbolic links are followed, each folder once.

    Args:
        wanted: says of a file's name (without folder) whether it belongs to the source.
        skip: says of a folder's name whether to leave it out with everything below.

    Raises:
        DataError: a folder cannot be listed, or a file is a broken link.
    """
    if not root.is_dir():
        return [_file(root, root.name)]
    files = []
    for folder, names in _walk(root, skip):
        for name in filter(wanted, names):
            path = folder / name
            files.append(_file(path, path.relative_to(root).as_posix()))
    return sorted(files)


def identity(root: Path, files: list[File]) -> list[object]:
    """What changes when `files` do, as JSON."""
    return [str(root.resolve()), *([f.name, f.size, f.mtime_ns] for f in files)]


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The error of a file or folder that the system refuses to read."""
    return DataError(f"cannot read {error.filename or path}: {error.strerror or error}")


def _walk(root: Path, skip: Callable[[str], bool]) -> Iterator[tuple[Path, list[str]]]:
    def refuse(error: OSError) -> None:
        raise unreadable(root, error)

    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        # Changed in place, as os.walk wants it; sorted, so that of two links to a folder the same one wins.
        kept = [name for name in sorted(folders) if not skip(name)]
        folders[:] = []
        for name in kept:
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        yield Path(folder), names


def _file(path: Path, name: str) -> File:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return File(name, path, status.st_size, status.st_mtime_ns)
