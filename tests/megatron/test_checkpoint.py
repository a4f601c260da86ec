"""Parts of flat ranges, as the distributed optimizer has them, in the shapes of parameters."""

from __future__ import annotations

from math import prod

import pytest
import torch

from moesys.megatron.checkpoint import boxes, placed
from moesys.megatron.names import Piece


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 4, 2, 3)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    for start in range(prod(shape) + 1):
        for stop in range(start, prod(shape) + 1):
            found = list(boxes(shape, start, stop))
            parts = [whole[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in found]
            assert [part.shape for part in parts] == [size for _, size in found]
            assert torch.cat([torch.empty(0), *(part.flatten() for part in parts)]).tolist() == list(range(start, stop))
            assert len(found) <= 2 * len(shape) - 1


def test_a_box_lies_in_the_whole_where_its_rows_do() -> None:
    """Rows 4 … 7 of Megatron's tensor are the second quarter of a weight of 16 rows, columns 3 … 5 of its 6."""
    piece = Piece("x", (16, 6), slice(4, 8), ((0, 1, 4), (1, 1, 2)), "tp")
    assert placed(piece, ((2, 0), (4, 3))) == ((4, 3), (2, 3))
    assert placed(piece, ((6, 1), (1, 2))) == ((6, 4), (1, 2))
    assert placed(piece, ((0, 0), (4, 3))) is None
    assert placed(piece, ((8, 0), (1, 3))) is None
