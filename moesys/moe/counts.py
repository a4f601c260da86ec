"""Counting without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def occurrences(index: Tensor, bins: int, stays: Tensor | None = None) -> Tensor:
    """How often each number below `bins` occurs in `index` int64, where it `stays` (bool, None: all): int64 [bins].

    As `torch.bincount`, which reads the largest number on the host first, so that a GPU is waited for.
    """
    one_A = torch.ones_like(index).flatten() if stays is None else stays.flatten().to(torch.int64)
    return torch.zeros(bins, dtype=torch.int64, device=index.device).scatter_add_(0, index.flatten(), one_A)
