"""Imports of packages that share a name with a folder of this repository."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the package; in a checkout the repository, with `kernels` and `parallel` beside it."""


@contextmanager
def hidden() -> Iterator[None]:
    """A context in which this repository's folders are not on the import path."""
    found = sys.path
    sys.path = [entry for entry in found if Path(entry or ".").resolve() != ROOT]
    try:
        yield
    finally:
        sys.path = found
