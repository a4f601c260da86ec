"""One collective of one size: its buffers, its call, its check and its times."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.measure.a2a_benchmark import payload, traffic
from moesys.measure.a2a_benchmark.groups import BenchmarkGroup
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.result import CollectiveResult, RankTimes
from moesys.measure.a2a_benchmark.timing import timed
from moesys.measure.a2a_benchmark.traffic import Matrix

SUMS = ("reduce_scatter", "all_reduce")
"""Collectives that add up."""

CHUNK = 2**22
"""Elements that are made or checked at a time."""


class CollectiveCase:
    """One collective of one size: its buffers, its call and its right result."""

    def __init__(
        self,
        kind: str,
        group: BenchmarkGroup,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        options: BenchmarkOptions,
    ):
        self.kind, self.group, self.size, self.dtype, self.options = kind, group, size, dtype, options
        self.device, self.grain = device, dtype.itemsize
        self.n, self.rank = group.own.size(), group.own.rank()
        self.sent = self._sent()
        row = [value // self.grain for value in self.sent[self.rank]]
        column = [line[self.rank] // self.grain for line in self.sent]
        self.splits = row, column
        elements, arriving = self._elements(row, column)
        self.x = torch.empty(elements, dtype=dtype, device=device)
        self.out = torch.zeros(arriving, dtype=dtype, device=device)
        self._fill()

    def _sent(self) -> Matrix:
        """Bytes from each rank of the group to each."""
        if self.kind == "all_to_all_uneven":
            if self.options.matrix is not None:
                return traffic.scaled(self.options.matrix, self.size, self.grain)
            return traffic.zipf(self.n, self.size, self.grain, self.options.skew or 0.0)
        if self.kind == "send_recv":
            whole = self.size // self.grain * self.grain
            return [[whole * (i == 0 and j == self.n - 1) for j in range(self.n)] for i in range(self.n)]
        return traffic.even(self.n, self.size, self.grain)

    def _elements(self, row: list[int], column: list[int]) -> tuple[int, int]:
        """Elements of the input and of the output."""
        part = self.size // self.n // self.grain
        if self.kind == "all_gather":
            return part, part * self.n
        if self.kind == "reduce_scatter":
            return part * self.n, part
        return (part * self.n, 0) if self.kind == "all_reduce" else (sum(row), sum(column))

    def call(self) -> None:
        """Run the collective to its end."""
        own = self.group.own
        if self.kind.startswith("all_to_all"):
            dist.all_to_all_single(self.out, self.x, self.splits[1], self.splits[0], group=own)
        elif self.kind == "all_gather":
            gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name since torch 2.13
            gather(self.out, self.x, group=own)
        elif self.kind == "reduce_scatter":
            scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
            scatter(self.out, self.x, group=own)
        elif self.kind == "all_reduce":
            dist.all_reduce(self.x, group=own)
        else:
            ranks = dist.get_process_group_ranks(own)
            ops = [dist.P2POp(dist.isend, self.x, ranks[-1], own)] if self.rank == 0 else []
            ops += [dist.P2POp(dist.irecv, self.out, ranks[0], own)] if self.rank == self.n - 1 else []
            for work in dist.batch_isend_irecv(ops) if ops else []:
                work.wait()

    def wrong(self) -> int:
        """The number of elements that a call gets wrong on this rank."""
        self._fill()
        self.call()
        wrong = self.differing(self.x if self.kind == "all_reduce" else self.out)
        if self.kind == "all_reduce":
            self.x.zero_()  # repeated sums would overflow
        return wrong

    def differing(self, result: Tensor) -> int:
        """The number of elements of `result` [N] that differ from this rank's right result, found on its device."""
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for part in _chunks(len(result)):
            wrong += (result[part].float() != self._expected(self._places(part))).sum()
        return int(wrong)

    def _fill(self) -> None:
        for part in _chunks(len(self.x)):
            place = self._places(part)
            if self.kind in SUMS:
                values = payload.added(self.rank, place, self.n, self.dtype)
            else:
                values = payload.sent(self.rank, place)
            self.x[part] = values.float().to(self.dtype)

    def _places(self, part: slice) -> Tensor:
        return torch.arange(part.start, part.stop, device=self.device)

    def _expected(self, place: Tensor) -> Tensor:
        """The right elements at the places `place` [N], float32."""
        if self.kind in SUMS:
            first = self.rank * len(self.out) if self.kind == "reduce_scatter" else 0
            return payload.totals(place + first, self.n, self.dtype).float()
        if self.kind == "all_gather":
            return payload.sent(place // len(self.x), place % len(self.x)).float()
        behind, shift = self._arrivals
        sender = torch.searchsorted(behind, place, right=True)
        return payload.sent(sender, place + shift[sender]).float()

    @cached_property
    def _arrivals(self) -> tuple[Tensor, Tensor]:
        """Ends of each sender's part in the output, and shifts from there to the sender's input: int64 [ranks] each."""
        matrix = np.asarray(self.sent) // self.grain
        column = matrix[:, self.rank]
        behind = column.cumsum()
        shift = matrix[:, : self.rank].sum(1) - (behind - column)
        return torch.from_numpy(behind).to(self.device), torch.from_numpy(shift).to(self.device)

    def measure(self, on_host: dist.ProcessGroup, offset: float, nodes: list[str]) -> CollectiveResult | None:
        """Time the collective on all ranks; the result on rank 0, else None. Collective."""
        wrong = self.wrong() if self.options.check else 0
        bare = self._bare if self.options.plain and self.kind.startswith("all_to_all") else None
        times = timed(self.call, bare, self.options, on_host, offset, self.device)
        everyone: list[Any] = [None] * len(nodes)
        dist.all_gather_object(everyone, RankTimes(*times, wrong), group=on_host)
        if dist.get_rank() != 0:
            return None
        name = str(self.dtype).removeprefix("torch.")
        g = self.group
        return CollectiveResult.of(self.kind, g.name, g.all, self.size, name, self.grain, self.sent, everyone, g.also)

    def _bare(self) -> None:
        dist.all_to_all_single(self.out, self.x, self.splits[1], self.splits[0], group=self.group.own)


def _chunks(elements: int) -> Iterator[slice]:
    """Slices of a tensor, small enough that arithmetic on each needs little memory."""
    for begin in range(0, elements, CHUNK):
        yield slice(begin, min(elements, begin + CHUNK))
