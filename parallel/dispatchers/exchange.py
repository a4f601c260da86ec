"""The all-to-alls of one level of hierarchical dispatch: rows for each destination, and their assignments.

T tokens, A assignments, D destinations of the level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.kernels.permute import sort_by_expert
from moesys.parallel.async_collectives import AsyncCollective, Codec, all_to_all_autograd
from moesys.parallel.comm import Tag
from moesys.parallel.dispatchers.levels import Level
from moesys.parallel.dispatchers.payload import dense


@dataclass(frozen=True)
class Sizes:
    """Counts of rows and of assignments that a chunk sends to, and receives from, each rank of a level."""

    send: list[int]
    send_assigned: list[int]
    receive: list[int]
    receive_assigned: list[int]
    received: tuple[Tensor, Tensor]
    """`receive` and `receive_assigned` on the device."""

    @classmethod
    def of(cls, counts: list[list[int]], rows: Tensor, assigned: Tensor) -> Sizes:
        """The sizes of `counts`, in the order of the fields; `rows` and `assigned` int64 are those on the device.

        rows, assigned: [ranks of the level].
        """
        send, send_assigned, receive, receive_assigned = counts
        return cls(send, send_assigned, receive, receive_assigned, (rows, assigned))


class LevelExchange:
    """The all-to-alls of a chunk on one level: rows by destination, and for each assignment the row that carries it.

    Attributes:
        p: tokens to rows, which are sorted by destination, then token.
        order_A, row_A: assignments by row, and the row of each, counted within what its destination gets.
    """

    def __init__(self, level: Level, size: Sizes, token_A: Tensor, destination_A: Tensor, tokens: int):
        self.level, self.size = level, size
        ways = level.group.size()
        pair_A = token_A * ways + destination_A
        wanted_TD = torch.zeros(tokens * ways, dtype=torch.bool, device=token_A.device)
        wanted_TD = wanted_TD.index_fill_(0, pair_A, True).view(tokens, ways)
        pair_token, pair_destination = torch.nonzero_static(wanted_TD, size=sum(size.send)).t().contiguous()
        self.p = sort_by_expert(pair_token, pair_destination, tokens, ways)
        number_A = wanted_TD.flatten().cumsum(0)[pair_A] - 1
        row_A, self.order_A = self.p.row_A[number_A].sort(stable=True)
        self.row_A = row_A - (self.p.counts_E.cumsum(0) - self.p.counts_E)[destination_A[self.order_A]]

    def send(self, rows: Tensor, tag: Tag, codec: Codec | None) -> AsyncCollective:
        """Start sending rows [N, H], sorted by destination."""
        size, level = self.size, self.level
        return all_to_all_autograd(rows, size.send, size.receive, level.group, "all_to_all", tag, codec)

    def send_ids(self, weight_A: Tensor, ids: IdCodec, tag: Tag) -> AsyncCollective:
        """Start sending routing weights [A], with the numbers that `ids` holds beside them."""
        size, level = self.size, self.level
        send, receive = size.send_assigned, size.receive_assigned
        return all_to_all_autograd(weight_A, send, receive, level.group, "all_to_all_weights", tag, ids)

    def rows_of(self, received_A: Tensor) -> Tensor:
        """Numbers [A] among all rows that were received, of rows counted within those of one source."""
        rows, assigned = self.size.received
        starts = rows.cumsum(0) - rows
        return received_A + starts.repeat_interleave(assigned, output_size=len(received_A))


class IdCodec:
    """Encodes routing weights [A] beside the numbers `sent` int64 [A], as int32 [A, 3] (float32) or [A, 4].

    Attributes:
        received: the numbers int64 that came with the weights of the last `decode`.
    """

    def __init__(self, sent: Tensor):
        self.sent = self.received = sent
        self.dtype = torch.float32

    def encode(self, weight_A: Tensor) -> Tensor:
        """Numbers and weights as int32, one row for each."""
        self.dtype = weight_A.dtype
        return torch.cat([x.unsqueeze(1).view(torch.int32) for x in (self.sent, weight_A)], 1)

    def decode(self, received: Tensor) -> Tensor:
        """The weights that were received; their numbers are kept in `received`. `received` [N, …], rows."""
        self.received = dense(received[:, :2]).view(torch.int64).squeeze(1)
        return dense(received[:, 2:]).view(self.dtype).squeeze(1)
