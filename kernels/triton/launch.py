"""Launches of kernels on the right device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """`launch` with the device of its first tensor as the current one, on which Triton launches."""

    @wraps(launch)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            return launch(*args, **kwargs)

    return launched
