"""Where kernels are launched."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Result = TypeVar("Result")


def on_its_device(launch: Callable[Given, Result]) -> Callable[Given, Result]:
    """`launch` with the device of its first tensor as the current one, on which Triton launches."""

    @wraps(launch)
    def launched(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        first = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            return launch(*args, **kwargs)

    return launched
