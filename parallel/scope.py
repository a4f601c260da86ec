"""A micro-batch spread over the context and tensor ranks of a stage."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.routing import MicroBatch
from moesys.parallel import comm


class SplitMicroBatch(MicroBatch):
    """Statistics over all ranks that hold a part of each of the micro-batch's sequences.

    Args:
        group: the ranks, each with as many tokens.
        positions: sequence positions of the tokens that this rank's MoE layers see, int64 [S_local].
    """

    def __init__(self, group: dist.ProcessGroup, positions: Tensor):
        self.group, self.positions = group, positions
        self.size = group.size()

    def sum(self, x: Tensor) -> Tensor:
        return comm.total(x, self.group)

    def gather(self, x_T: Tensor) -> Tensor:
        return comm.gather(x_T, self.group)

    def mine(self, rows: int) -> slice:
        return slice(self.group.rank() * rows, (self.group.rank() + 1) * rows)

    def order(self, batch: int, sequence: int, device: torch.device) -> Tensor:
        rows = torch.arange(batch, device=device)[:, None] * (sequence * self.size)
        return (rows + self.positions.to(device)).flatten()
