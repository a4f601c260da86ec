"""Shows the progress of long work in a line on stderr."""

from __future__ import annotations

import sys
from time import monotonic

PATIENCE = 2.0
"""Seconds before the line appears, and between two updates."""


class Progress:
    """Shows the name of the work and its progress, once it has taken `PATIENCE` seconds.

    On a terminal the line is updated; elsewhere it is written once.
    """

    def __init__(self, what: str, total: int = 0):
        self.what, self.total, self.done = what, total, 0
        self._next = monotonic() + PATIENCE
        self._shown = False

    def advance(self, amount: int = 0) -> None:
        """Count `amount` more of `total` as done."""
        self.done += amount
        if monotonic() < self._next:
            return
        self._next = monotonic() + PATIENCE
        share = f" {100 * self.done // self.total}%" if self.total else ""
        if sys.stderr.isatty():
            print(f"\rmoesys: {self.what}{share}", end="", file=sys.stderr, flush=True)
        elif not self._shown:
            print(f"moesys: {self.what}{share}", file=sys.stderr, flush=True)
        self._shown = True

    def finish(self) -> None:
        """End the line."""
        if self._shown and sys.stderr.isatty():
            print(f"\rmoesys: {self.what} done", file=sys.stderr, flush=True)
