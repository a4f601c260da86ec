"""The interface of the tokens that the trainer reads."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Tokens(Protocol):
    """A flat sequence of token ids of any integer type: an array, or a view that gathers it on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray:
        """Tokens [stop - start]; slices have no step."""
        ...
