"""Counting without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def occurrences(index_A: Tensor, bins: int) -> Tensor:
    """How often each number below `bins` occurs in `index_A` int64 [A]: int64 [bins].

    As `torch.bincount`, which reads the largest number on the host first, so that a GPU is waited for.
    """
    counts = torch.zeros(bins, dtype=torch.int64, device=index_A.device)
    return counts.scatter_add_(0, index_A, torch.ones_like(index_A))
