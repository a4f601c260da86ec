"""Initial values of weights that are not `nn.Linear`'s."""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn


def like_linear(weight: Tensor, inputs: int) -> None:
    """Fill the weight of a linear map of `inputs` inputs as `nn.Linear` does: uniform in ±1 / √inputs.

    `weight` may have any shape.
    """
    bound = 1 / sqrt(inputs)
    nn.init.uniform_(weight, -bound, bound)
