"""Megatron-Core warns, when it is imported and when it is built, of what is not installed or will change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
