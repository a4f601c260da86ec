"""What the ranks of a benchmark send to each other: small whole numbers that tell where they come from.

Every value, and every sum that a reduction makes of them, is exact in the type that carries it, on any number of
ranks and in any order. What must arrive is known by arithmetic from the place alone: no rank makes what others send.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = 6
"""Elements in a row of which the ranks' numbers in base 8 make all different: up to 8^6 ranks."""

ADDENDS = 64
"""Most ranks that add something to an element."""


def sent(rank: int | Tensor, place: Tensor) -> Tensor:
    """The elements at places `place` of what `rank` sends (a number, or one for each element), int64 in 1 … 8.

    Among any six that follow one another some tell this rank from any other, and other places from these.
    """
    digit = (rank >> (3 * (place % DIGITS))) & 7
    return ((digit + _mixed(place // DIGITS)) & 7) + 1


def _mixed(number: Tensor) -> Tensor:
    """Spread over all bits from 13 on (Knuth, The Art of Computer Programming, 6.4)."""
    return (number * 2654435761) >> 13


def added(rank: int, place: Tensor, ranks: int, dtype: torch.dtype) -> Tensor:
    """What `rank` of `ranks` adds to the elements at places `place` of a sum in `dtype`, int64 in 0 … 3.

    A type knows all whole numbers up to a limit (bfloat16 256, float8_e4m3fn 16), so each rank adds to some elements.
    """
    stride, reach = _stride(ranks, dtype), 1 + place % 3
    turn = place + rank
    return torch.where(turn % stride == 0, turn // stride % reach + 1, 0)


def totals(place: Tensor, ranks: int, dtype: torch.dtype) -> Tensor:
    """The sum of `added` over all ranks, int64, as arithmetic series: as long for a thousand ranks as for two."""
    stride, reach = _stride(ranks, dtype), 1 + place % 3
    first, behind = -(-place // stride), (place + ranks - 1) // stride + 1
    return _series(behind, reach) - _series(first, reach) + (behind - first)


def _series(count: Tensor, reach: Tensor) -> Tensor:
    """Σ of i mod `reach` over i < `count`."""
    rest = count % reach
    return count // reach * (reach * (reach - 1) // 2) + rest * (rest - 1) // 2


def _stride(ranks: int, dtype: torch.dtype) -> int:
    """Every how many elements a rank adds something, so that at most a sum of 3 · addends is needed."""
    exact = int(2 / torch.finfo(dtype).eps)
    return -(-ranks // max(1, min(ADDENDS, exact // 3 - 1)))
