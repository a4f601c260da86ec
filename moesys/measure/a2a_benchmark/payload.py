"""The data of the benchmark: small whole numbers that identify their sender and place.

Every value, and every sum of a reduction, is exact in its type, for any number of ranks and any order. The right result
follows from the place alone by arithmetic: no rank makes the data of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = 6
"""Elements in a row that identify a rank: its number in base 8 with six digits, up to 8^6 ranks."""

ADDENDS = 64
"""Most ranks that add to one element."""


def sent(rank: int | Tensor, place: Tensor) -> Tensor:
    """The elements at the places `place` [N] of a rank's data: int64 in 1 … 8.

    rank: a number, or one for each element [N]. Six elements in a row differ between ranks, and mostly between places.
    """
    digit = (rank >> (3 * (place % DIGITS))) & 7
    return ((digit + _mixed(place // DIGITS)) & 7) + 1


def _mixed(number: Tensor) -> Tensor:
    """A hash that spreads over the bits from 13 on (Knuth, The Art of Computer Programming, 6.4)."""
    return (number * 2654435761) >> 13


def added(rank: int, place: Tensor, ranks: int, dtype: torch.dtype) -> Tensor:
    """The elements that `rank` adds at the places `place` [N] of a sum in `dtype`: int64 in 0 … 3.

    A type represents whole numbers up to a limit (bfloat16 256, float8_e4m3fn 16), so each rank adds to some elements
    only.
    """
    stride, reach = _stride(ranks, dtype), 1 + place % 3
    turn = place + rank
    return torch.where(turn % stride == 0, turn // stride % reach + 1, 0)


def totals(place: Tensor, ranks: int, dtype: torch.dtype) -> Tensor:
    """The sum of `added` over all ranks at the places `place` [N], int64, at a cost that does not depend on `ranks`."""
    stride, reach = _stride(ranks, dtype), 1 + place % 3
    first, behind = -(-place // stride), (place + ranks - 1) // stride + 1
    return _series(behind, reach) - _series(first, reach) + (behind - first)


def _series(count: Tensor, reach: Tensor) -> Tensor:
    """Σ of i mod `reach` over i < `count`."""
    rest = count % reach
    return count // reach * (reach * (reach - 1) // 2) + rest * (rest - 1) // 2


def _stride(ranks: int, dtype: torch.dtype) -> int:
    """Distance of the elements to which a rank adds, so that no sum exceeds 3 · addends."""
    exact = int(2 / torch.finfo(dtype).eps)
    return -(-ranks // max(1, min(ADDENDS, exact // 3 - 1)))
