"""Documents, which every source of text yields, and the files that most sources read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moesys.errors import DataError

NOTHING_THERE = "no such file or folder"


class Document(NamedTuple):
    """A piece of text that stands alone.

    `name` is unique in its source and the same on every machine; it decides the held-out split.
    """

    name: str
    text: bytes


class File(NamedTuple):
    """A file of a source: `name` is its path relative to the source, with forward slashes."""

    name: str
    path: Path
    size: int
    mtime_ns: int


def located(given: str) -> Path:
    """The place that a path in the configuration means: `~` is the user's home.

    It never fails: an unknown home stays as written, and so does a NUL, which no name can hold. Both then count as
    missing files.
    """
    return Path(os.path.expanduser(given.replace("\0", "\\0")))


def absent(path: Path) -> str | None:
    """`NOTHING_THERE` if `path` does not exist, or the error if this user cannot look; None if it exists."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING_THERE
    except OSError as error:
        return str(unreadable(path, error))
    return None


def listing(root: Path, wanted: Callable[[str], bool], skip: Callable[[str], bool]) -> list[File]:
    """The files under the folder `root` (or `root` itself, if a file), sorted by name.

    Symbolic links are followed, each folder once. Pipes, sockets and devices in a folder are left out.

    Args:
        wanted: says of a file's name (without folder) whether it belongs to the source.
        skip: says of a folder's name whether to leave it out with everything below.

    Raises:
        DataError: a folder cannot be listed, a file is a broken link, or `root` is neither file nor folder.
    """
    if not os.path.isdir(root):
        if (file := _file(root, root.name)) is None:
            raise DataError(f"{root} is neither a file nor a folder")
        return [file]
    files = []
    for folder, names in _walk(root, skip):
        for name in filter(wanted, names):
            path = folder / name
            if (file := _file(path, path.relative_to(root).as_posix())) is not None:
                files.append(file)
    return sorted(files)


def identity(root: Path, files: list[File]) -> list[object]:
    """JSON that changes when `files` do."""
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


def parse(text: bytes, where: str) -> Any:
    """The content of JSON.

    Raises:
        DataError: it is not JSON; the message begins with `where` it stands.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of open brackets
        raise DataError(f"{where} not JSON: {error}") from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The error of a file or folder that the system refuses to read."""
    return DataError(f"cannot read {error.filename or path}: {error.strerror or error}")


def _walk(root: Path, skip: Callable[[str], bool]) -> Iterator[tuple[Path, list[str]]]:
    def refuse(error: OSError) -> None:
        raise unreadable(root, error)

    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        # os.walk needs a change in place; sorting makes the same one of two links to a folder win.
        kept = [name for name in sorted(folders) if not skip(name)]
        folders[:] = []
        for name in kept:
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        yield Path(folder), names


def _file(path: Path, name: str) -> File | None:
    """The file at `path`; None if it is no regular file, such as a pipe, which would block."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return File(name, path, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
