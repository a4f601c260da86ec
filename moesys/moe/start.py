"""Initial values of weights that are not `nn.Linear`'s."""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn


def like_linear(weight: Tensor, inputs: int) -> None:
    """Fill a weight of a map of so many inputs as `nn.Linear` fills its own: uniform in ±1 / √inputs."""
    bound = 1 / sqrt(inputs)
    nn.init.uniform_(weight, -bound, bound)
