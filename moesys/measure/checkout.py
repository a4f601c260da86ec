"""Imports of other packages where this repository's folders bear their names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the package; in a checkout the repository, with `kernels` and `parallel` beside it."""


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, imports do not find the checkout's folders; those of `moesys` go on.

    transformers asks whether a package `kernels` is installed. At the repository's root, or with it in $PYTHONPATH,
    it would find ours, which refuses that name.
    """
    found = sys.path
    sys.path = [entry for entry in found if Path(entry or ".").resolve() != ROOT]
    try:
        yield
    finally:
        sys.path = found
