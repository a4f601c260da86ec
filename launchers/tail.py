"""Follows a text file that another process is still writing."""

from __future__ import annotations

import os
from pathlib import Path

from moesys.launchers.noise import is_noise


class Tail:
    """Reads the lines appended to a file, each once; the file need not exist yet.

    Lines that are there already when the object is made, or when another file takes its place, are left
    out: a resumed run replaces its metrics by those up to its checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offset, self._rest = 0, b""
        self._inode: int | None = path.stat().st_ino if path.exists() else None
        if self._inode is not None:
            self._offset = path.stat().st_size

    def lines(self) -> list[str]:
        """The lines completed since the last call, without their line ends and without noise; bad UTF-8 is replaced."""
        try:
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                if self._inode not in (None, state.st_ino) or state.st_size < self._offset:
                    self._offset, self._rest = state.st_size, b""
                self._inode = state.st_ino
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *complete, self._rest = (self._rest + data).split(b"\n")
        lines = (line.decode(errors="replace").rstrip("\r") for line in complete)
        return [line for line in lines if not is_noise(line)]

    def last(self) -> list[str]:
        """The lines not read yet and the unfinished last one, once nothing more will be written."""
        lines = self.lines()
        rest, self._rest = self._rest.decode(errors="replace"), b""
        return [*lines, rest] if rest and not is_noise(rest) else lines
