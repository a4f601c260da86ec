"""Counting without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def occurrences(index: Tensor, bins: int, stays: Tensor | None = None) -> Tensor:
    """Counts int64 [bins] of each number below `bins` in `index` int64, where it `stays` (bool, None: all).

    As `torch.bincount`, which waits for a GPU, because the host reads the largest number first.
    """
    one_A = torch.ones_like(index).flatten() if stays is None else stays.flatten().to(torch.int64)
    return torch.zeros(bins, dtype=torch.int64, device=index.device).scatter_add_(0, index.flatten(), one_A)
