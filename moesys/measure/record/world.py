"""What the ranks of a run tell each other of recorded steps: collectives of small tables on the host."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moesys.measure.record import clocks

Words = NDArray[np.int64]
Table = NDArray[np.float64]


class Peers(Protocol):
    """All ranks, as one of them talks to them. Every method is collective over the world."""

    rank: int
    world: int

    def clock(self) -> float:
        """Seconds to add to this process's clock to get rank 0's."""
        ...

    def names(self, name: str) -> list[str]:
        """What each rank is called."""
        ...

    def first(self, x: Table) -> Table:
        """Rank 0's."""
        ...

    def exchange(self, words: list[Words]) -> list[Words]:
        """To and from each rank."""
        ...

    def total(self, x: Table) -> Table:
        """The sum over ranks, on rank 0; elsewhere anything."""
        ...

    def highest(self, x: Table) -> Table:
        """The maximum over ranks, everywhere."""
        ...

    def rows(self, x: Table) -> Table | None:
        """[ranks, …] on rank 0, None elsewhere."""
        ...


class Gloo:
    """`Peers` over a group of the world on the host."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.world = group, group.rank(), group.size()

    def clock(self) -> float:
        return clocks.offset(self.group)

    def names(self, name: str) -> list[str]:
        found: list[str] = [""] * self.world
        dist.all_gather_object(found, name, group=self.group)
        return found

    def first(self, x: Table) -> Table:
        dist.broadcast(given := torch.from_numpy(x.copy()), 0, group=self.group)
        return given.numpy()

    def exchange(self, words: list[Words]) -> list[Words]:
        sizes = [len(w) for w in words]
        told = torch.empty(self.world, dtype=torch.int64)
        dist.all_to_all_single(told, torch.tensor(sizes), group=self.group)
        come = told.tolist()
        out = torch.empty(sum(come), dtype=torch.int64)
        given = torch.from_numpy(np.concatenate([*words, np.empty(0, np.int64)]))
        dist.all_to_all_single(out, given, come, sizes, group=self.group)
        return np.split(out.numpy(), np.cumsum(come)[:-1])

    def total(self, x: Table) -> Table:
        dist.reduce(given := torch.from_numpy(x.copy()), 0, group=self.group)
        return given.numpy()

    def highest(self, x: Table) -> Table:
        dist.all_reduce(given := torch.from_numpy(x.copy()), dist.ReduceOp.MAX, group=self.group)
        return given.numpy()

    def rows(self, x: Table) -> Table | None:
        mine = torch.from_numpy(x.copy())
        every = [torch.empty_like(mine) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(mine, every, group=self.group)
        return None if every is None else torch.stack(every).numpy()
