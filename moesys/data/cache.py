"""Caches tokenized text on disk: written once per machine, read by all its processes.

An entry is three files: KEY.train.npy, KEY.heldout.npy and, written last, KEY.json with their lengths and checksums.
All are complete or absent. A damaged entry is written again; if the folder cannot be used, the run goes on without a
cache.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from time import sleep
from typing import Any, BinaryIO

import numpy as np

from moesys.data.progress import Progress
from moesys.data.tokenized import from_memory

FORMAT = 1
"""A part of every key: an entry of another format has another key."""
SIDES = ("train", "heldout")
BLOCK, BLOCKS = 1 << 20, 256
"""The checksum reads this many blocks of this many bytes at most."""
log = logging.getLogger("moesys.data")

Write = Callable[[BinaryIO, BinaryIO], None]


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/moesys`, or `~/.cache/moesys`; for a user without a home, in the temporary folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(tempfile.gettempdir() if caches.startswith("~") else caches) / "moesys"


def key(facts: object) -> str:
    """The name of the entry for `facts`, JSON of everything that the tokens depend on."""
    return blake2b(json.dumps([FORMAT, facts]).encode(), digest_size=16).hexdigest()


def open_or_make(folder: Path, name: str, dtype: np.dtype, write: Write) -> tuple[np.ndarray, np.ndarray]:
    """The entry's two arrays, memory-mapped and read-only; written first if they are missing.

    One process writes them while the others wait.

    Args:
        folder: of the cache, made if absent.
        name: from `key`.
        dtype: of the tokens.
        write: writes the two arrays as .npy to the two files. Its exceptions pass through, except OSError of these
            files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entry = _read(folder, name, dtype)
        if entry is None:
            with _lock(folder / f"{name}.lock"):
                entry = _read(folder, name, dtype)
                if entry is None:
                    _make(folder, name, write)
                    entry = _read(folder, name, dtype)
        if entry is not None:
            return entry
        reason = "what was written there does not read back"
    except OSError as error:
        reason = f"{error.strerror or error}"
    log.warning("moesys: no cache of tokenized text in %s (data.cache): %s", folder, reason)
    return _in_memory(dtype, write)


def _in_memory(dtype: np.dtype, write: Write) -> tuple[np.ndarray, np.ndarray]:
    train, heldout = io.BytesIO(), io.BytesIO()
    write(train, heldout)
    return from_memory(train.getbuffer(), dtype), from_memory(heldout.getbuffer(), dtype)


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.{side}.npy" for side in SIDES]


def _read(folder: Path, name: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray] | None:
    """The entry, or None if it is absent, incomplete or damaged."""
    try:
        facts = json.loads((folder / f"{name}.json").read_bytes())
        # asarray keeps slices from being memmap objects of their own.
        train, heldout = (np.asarray(np.load(path, mmap_mode="r")) for path in _paths(folder, name))
    except Exception:  # whatever a damaged file makes the readers raise
        return None
    fits = train.dtype == heldout.dtype == dtype and train.ndim == heldout.ndim == 1
    return (train, heldout) if fits and facts == _facts(train, heldout) else None


def _facts(*arrays: np.ndarray) -> dict[str, Any]:
    return {side: [len(tokens), checksum(tokens)] for side, tokens in zip(SIDES, arrays, strict=True)}


def checksum(tokens: np.ndarray) -> int:
    """CRC-32 of all bytes, or of evenly spaced blocks where there are more than 256 MiB."""
    data = tokens.view(np.uint8)
    count = min(BLOCKS, -(-len(data) // BLOCK))
    value = 0
    for begin in np.linspace(0, max(0, len(data) - BLOCK), count, dtype=np.int64) if count > 1 else [0]:
        value = zlib.crc32(data[begin : begin + BLOCK].data, value)
    return value


def _make(folder: Path, name: str, write: Write) -> None:
    for leftover in folder.glob(f"{name}.*.tmp"):  # left by a killed process; this one holds the lock
        leftover.unlink(missing_ok=True)
    targets = [*_paths(folder, name), folder / f"{name}.json"]
    temporary = [target.with_name(f"{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        with ExitStack() as stack:
            train, heldout, facts = (stack.enter_context(path.open("w+b")) for path in temporary)
            write(train, heldout)
            arrays = [np.load(path, mmap_mode="r") for path in temporary[:2]]
            facts.write(json.dumps(_facts(*arrays)).encode())
            for file in (train, heldout, facts):
                file.flush()
                os.fsync(file.fileno())
        for path, target in zip(temporary, targets, strict=True):
            os.replace(path, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the file's lock, which the end of the process releases."""
    progress = Progress("waiting for another process that tokenizes the text")
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress.advance()
                sleep(0.05)
        progress.finish()
        yield
