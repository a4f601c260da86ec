"""A micro-batch spread over the context and tensor ranks of a stage."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.routing import MicroBatch, Tokens
from moesys.parallel import comm


class WholeMicroBatch(MicroBatch):
    """A micro-batch on one rank, while the ranks of `data` run other ones; None: there are no others."""

    def __init__(self, data: dist.ProcessGroup | None):
        self.data = data

    def sum_global(self, x: Tensor) -> Tensor:
        """Sum of x, of any shape, over all ranks that run a micro-batch now."""
        x = self.sum(x)
        return x if self.data is None else comm.all_reduce(x, self.data)


class SplitMicroBatch(WholeMicroBatch):
    """Statistics over all ranks that hold a part of each of the micro-batch's sequences.

    Args:
        data: ranks that run other micro-batches at the same place, or None.
        group: the ranks, each with as many tokens.
        positions: sequence positions of this context rank's tokens, int64 [S_local].
        tp, tp_rank: the tensor ranks, each of which sees an equal part of them.
    """

    def __init__(
        self, data: dist.ProcessGroup | None, group: dist.ProcessGroup, positions: Tensor, tp: int, tp_rank: int
    ):
        super().__init__(data)
        self.group, self.positions, self.tp, self.tp_rank = group, positions.chunk(tp)[tp_rank], tp, tp_rank
        self.size = group.size()

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x, of any shape, over the ranks that share the micro-batch."""
        return comm.all_reduce(x, self.group)

    def gather(self, x_T: Tensor) -> Tensor:
        return comm.all_gather(x_T, self.group)

    def mine(self, rows: int) -> slice:
        return slice(self.group.rank() * rows, (self.group.rank() + 1) * rows)

    def part(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(self.tp, dim=1)[self.tp_rank]

    def mark(self, tokens: Tensor | None, batch: int, sequence: int, device: torch.device) -> Tokens:
        if tokens is not None:
            return super().mark(tokens, batch, sequence, device)
        rows = torch.arange(batch, device=device)[:, None] * (sequence * self.size)
        return Tokens((rows + self.positions.to(device)).flatten(), batch)
