"""Silences Megatron-Core's warnings, at import and construction, of missing packages and coming changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore all warnings inside this context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
