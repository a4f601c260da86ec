"""Collectives of small tables between all ranks, on the host: how recorded steps come to rank 0."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moesys.measure.record import clocks

Words = NDArray[np.int64]
Table = NDArray[np.float64]


class World(Protocol):
    """All ranks of a run, as one of them talks to them. Every method is collective.

    Attributes:
        rank: number of this rank.
        size: number of all ranks.
    """

    rank: int
    size: int

    def clock_offset(self) -> float:
        """Seconds to add to this process's clock to get rank 0's."""
        ...

    def all_gather_names(self, name: str) -> list[str]:
        """The name that each rank gave."""
        ...

    def broadcast(self, x: Table) -> Table:
        """Rank 0's table."""
        ...

    def all_to_all(self, words: list[Words]) -> list[Words]:
        """The words that each rank sent here; `words` go to each rank."""
        ...

    def reduce_sum(self, x: Table) -> Table:
        """The sum over ranks, on rank 0. Other ranks get values without meaning."""
        ...

    def all_reduce_max(self, x: Table) -> Table:
        """The maximum over ranks, on all ranks."""
        ...

    def gather(self, x: Table) -> Table | None:
        """All ranks' tables [ranks, …] on rank 0; None elsewhere."""
        ...


class GlooWorld:
    """`World` over a gloo group of all ranks."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def clock_offset(self) -> float:
        """Seconds to add to this process's clock to get rank 0's."""
        return clocks.offset(self.group)

    def all_gather_names(self, name: str) -> list[str]:
        """The name that each rank gave."""
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, name, group=self.group)
        return found

    def broadcast(self, x: Table) -> Table:
        """Rank 0's table."""
        dist.broadcast(table := torch.from_numpy(x.copy()), 0, group=self.group)
        return table.numpy()

    def all_to_all(self, words: list[Words]) -> list[Words]:
        """The words that each rank sent here; `words` go to each rank."""
        sizes = [len(w) for w in words]
        counts = torch.empty(self.size, dtype=torch.int64)
        dist.all_to_all_single(counts, torch.tensor(sizes), group=self.group)
        arriving = counts.tolist()
        out = torch.empty(sum(arriving), dtype=torch.int64)
        sent = torch.from_numpy(np.concatenate([*words, np.empty(0, np.int64)]))
        dist.all_to_all_single(out, sent, arriving, sizes, group=self.group)
        return np.split(out.numpy(), np.cumsum(arriving)[:-1])

    def reduce_sum(self, x: Table) -> Table:
        """The sum over ranks, on rank 0. Other ranks get values without meaning."""
        dist.reduce(table := torch.from_numpy(x.copy()), 0, group=self.group)
        return table.numpy()

    def all_reduce_max(self, x: Table) -> Table:
        """The maximum over ranks, on all ranks."""
        dist.all_reduce(table := torch.from_numpy(x.copy()), dist.ReduceOp.MAX, group=self.group)
        return table.numpy()

    def gather(self, x: Table) -> Table | None:
        """All ranks' tables [ranks, …] on rank 0; None elsewhere."""
        mine = torch.from_numpy(x.copy())
        tables = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(mine, tables, group=self.group)
        return None if tables is None else torch.stack(tables).numpy()
