"""Bytes of collectives as nccl-tests counts them, of four ranks with eight elements of four bytes each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesys.measure.watch import METHODS

N = 4
PART, WHOLE = torch.zeros(8), torch.zeros(8 * N)
PARTS = [PART] * N


class Group:
    """As much of a process group as sizes are told by."""

    def size(self) -> int:
        return N


@pytest.mark.parametrize(
    ("method", "arguments", "size", "sent"),
    [
        # What is reduced counts once, as often as there are ranks.
        ("allreduce", ([PART],), 32, ()),
        ("allreduce_coalesced", ([PART, PART],), 64, ()),
        ("broadcast", ([PART],), 32, ()),
        ("reduce", ([PART],), 32, ()),
        ("send", ([PART], 1, 0), 32, ()),
        ("recv", ([PART], 1, 0), 32, ()),
        # Of gathered and scattered ones the size of all ranks together.
        ("allgather", ([PARTS], [PART]), 128, ()),
        ("_allgather_base", (WHOLE, PART), 128, ()),
        ("all_gather_single", (WHOLE, PART), 128, ()),
        ("allgather_into_tensor_coalesced", ([WHOLE, WHOLE], [PART, PART]), 256, ()),
        ("reduce_scatter", ([PART], [PARTS]), 128, ()),
        ("_reduce_scatter_base", (PART, WHOLE), 128, ()),
        ("reduce_scatter_tensor_coalesced", ([PART], [WHOLE]), 128, ()),
        ("gather", ([PARTS], [PART]), 128, ()),
        ("scatter", ([PART], [PARTS]), 128, ()),
        # What goes to each rank is known.
        ("alltoall_base", (WHOLE, WHOLE, [], []), 128, (32,) * N),
        ("alltoall_base", (torch.zeros(8), WHOLE, [2] * N, [1, 2, 13, 16]), 128, (4, 8, 52, 64)),
        ("alltoall", (PARTS, [PART, PART[:1], PART[:0], PART]), 68, (32, 4, 0, 32)),
    ],
)
def test_bytes(method: str, arguments: tuple[Any, ...], size: int, sent: tuple[int, ...]) -> None:
    _, sizes = METHODS[method]
    assert sizes(Group(), *arguments) == (size, sent)
