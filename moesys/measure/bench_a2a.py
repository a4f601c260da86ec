"""A benchmark of collectives in the manner of nccl-tests, on all ranks of a run. Collective over the world.

Every iteration begins with a barrier, which is not timed. A rank's time is from its begin to its end; on
one clock for all ranks it divides into *wait*, until the last rank of its group began, and *transfer*.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import Config
from moesys.measure import clocks, traffic
from moesys.measure.bench_result import Result, Samples
from moesys.measure.sizes import COLLECTIVES, GROUPS
from moesys.measure.traffic import Matrix
from moesys.parallel import comm
from moesys.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        smallest, largest, factor: sizes in bytes, each `factor` times the one before.
        skew, matrix: also all-to-alls of uneven traffic, by Zipf's law or in this pattern.
        check: validate one result of every case.
        dispatch: also these dispatchers, with `tokens` of `hidden` elements from each rank to `top_k` experts each.
        plain: interleave a bare loop around `torch.distributed.all_to_all_single`, for comparison.
    """

    kinds: Sequence[str] = COLLECTIVES
    groups: Sequence[str] = GROUPS
    dtypes: Sequence[str] = ("float32",)
    smallest: int = 1024
    largest: int = 2**30
    factor: int = 4
    iterations: int = 20
    warmup: int = 3
    skew: float | None = None
    matrix: Matrix | None = None
    check: bool = True
    plain: bool = False
    dispatch: Sequence[str] = ()
    tokens: int = 1024
    hidden: int = 1024
    top_k: int = 2

    def sizes(self) -> Iterator[int]:
        size = self.smallest
        while size <= self.largest:
            yield size
            size *= self.factor


@dataclass(frozen=True)
class Group:
    """This rank's group of a kind, and all groups of that kind, by ranks: they communicate at the same time.

    `also`: other kinds that are the same groups.
    """

    name: str
    own: dist.ProcessGroup
    all: list[list[int]]
    also: tuple[str, ...] = ()


def groups(mesh: ParallelMesh, names: Sequence[str], nodes: list[str]) -> list[Group]:
    """Those of `names` that have more than one rank, each once: of a node, of equal places in all nodes, of experts,
    of all."""
    made = []
    for every, same in divisions(names, nodes, mesh.degrees.ep * mesh.degrees.etp):
        own = [dist.new_group(ranks) for ranks in every]
        mine = next(i for i, ranks in enumerate(every) if mesh.rank in ranks)
        made.append(Group(same[0], own[mine], every, tuple(same[1:])))
    return made


def divisions(names: Sequence[str], nodes: Sequence[str], size: int) -> list[tuple[list[list[int]], list[str]]]:
    """The divisions of the world by `names`, each with the names that divide alike; `size` ranks share the experts."""
    world = list(range(len(nodes)))
    members = [[rank for rank in world if nodes[rank] == node] for node in dict.fromkeys(nodes)]
    found: dict[str, list[list[int]]] = {"world": [world], "intra": members}
    if len({len(m) for m in members}) == 1:
        found["inter"] = [list(rail) for rail in zip(*members, strict=True)]
    found["expert"] = [world[i : i + size] for i in range(0, len(world), size)]
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        every = [ranks for ranks in found.get(name, []) if len(ranks) > 1]
        if sum(map(len, every)) == len(world):
            # Several groups between nodes share their links: what limits them is counted by node.
            rails = name == "inter" and len(every) > 1
            alike.setdefault((rails, tuple(map(tuple, every))), []).append(name)
    return [([list(ranks) for ranks in every], same) for (_, every), same in alike.items()]


def run(
    config: Config, mesh: ParallelMesh, options: Options, nodes: list[str], tell: Callable[[Result], None]
) -> list[Result]:
    """Measure every case; `tell` gets each result on rank 0 as it comes. All results on rank 0, else none."""
    from moesys.measure import bench_dispatch

    on_host = dist.group.WORLD if mesh.device.type == "cpu" else dist.new_group(backend="gloo")
    assert on_host is not None
    offset, results = clocks.offset(on_host), []
    for group in groups(mesh, options.groups, nodes):
        for kind, dtype in ((k, d) for k in _kinds(options) for d in options.dtypes):
            for size in options.sizes():
                if not _fits(size, mesh.device, on_host, len(nodes) // len(set(nodes))):
                    break
                case = Case(kind, group, size, getattr(torch, dtype), mesh.device, options)
                result = case.measure(on_host, offset, nodes)
                if result is not None:
                    tell(result)
                    results.append(result)
    for kind in options.dispatch:
        for dtype in options.dtypes:
            dispatching = bench_dispatch.Dispatching(kind, config, mesh, getattr(torch, dtype), options)
            result = dispatching.measure(on_host, offset, nodes)
            if result is not None:
                tell(result)
                results.append(result)
    return results


def _kinds(options: Options) -> list[str]:
    uneven = options.skew is not None or options.matrix is not None
    return [*options.kinds, *(["all_to_all_uneven"] if uneven and "all_to_all" in options.kinds else [])]


def _fits(size: int, device: torch.device, on_host: dist.ProcessGroup, neighbours: int) -> bool:
    """Whether every rank has memory for a buffer of `size` bytes to send and one to receive, and copies."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // neighbours
    enough = torch.tensor([float(free > 6 * size)])
    dist.all_reduce(enough, dist.ReduceOp.MIN, group=on_host)
    return bool(enough.item())


class Case:
    """One collective of one size: buffers, the call, and what must come out."""

    def __init__(self, kind: str, group: Group, size: int, dtype: torch.dtype, device: torch.device, options: Options):
        self.kind, self.group, self.size, self.dtype, self.options = kind, group, size, dtype, options
        self.device, self.grain = device, dtype.itemsize
        self.n, self.rank = group.own.size(), group.own.rank()
        self.sent = self._sent()
        row = [value // self.grain for value in self.sent[self.rank]]
        column = [line[self.rank] // self.grain for line in self.sent]
        self.splits = row, column
        elements, arriving = self._elements(row, column)
        self.x = self._pattern(self.rank, elements).to(device)
        self.out = torch.zeros(arriving, dtype=dtype, device=device)

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
        part = self.size // self.n // self.grain
        if self.kind == "all_gather":
            return part, part * self.n
        if self.kind == "reduce_scatter":
            return part * self.n, part
        return (part * self.n, 0) if self.kind == "all_reduce" else (sum(row), sum(column))

    def call(self) -> None:
        """The collective, to its end."""
        own = self.group.own
        if self.kind.startswith("all_to_all"):
            dist.all_to_all_single(self.out, self.x, self.splits[1], self.splits[0], group=own)
        elif self.kind == "all_gather":
            gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
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
        """Elements that a call gets wrong on this rank."""
        if self.kind == "all_reduce":
            self.x = self._pattern(self.rank, len(self.x)).to(self.device)
        self.call()
        result = self.x if self.kind == "all_reduce" else self.out
        wrong = int((result.cpu() != self.expected()).sum())
        if self.kind == "all_reduce":
            self.x.zero_()  # sums of sums would grow beyond all numbers
        return wrong

    def expected(self) -> Tensor:
        """What this rank must have after a call, computed without communication."""
        ranks = range(self.n)
        if self.kind == "all_gather":
            return torch.cat([self._pattern(i, len(self.x)) for i in ranks])
        if self.kind in SUMS:
            total = torch.zeros(len(self.x), dtype=self.dtype)
            for i in ranks:
                total += self._pattern(i, len(self.x))
            part = len(self.out)
            return total[self.rank * part :][:part] if part else total
        parts = []
        for i in ranks:
            ends = [0]
            for value in self.sent[i]:
                ends.append(ends[-1] + value // self.grain)
            a, b = list(pairwise(ends))[self.rank]
            parts.append(self._pattern(i, ends[-1])[a:b])
        return torch.cat(parts)

    def _pattern(self, rank: int, elements: int) -> Tensor:
        return pattern(rank, elements, self.dtype, self.n if self.kind in SUMS else 1)

    def measure(self, on_host: dist.ProcessGroup, offset: float, nodes: list[str]) -> Result | None:
        """Time it on all ranks; the result on rank 0, else None."""
        wrong = self.wrong() if self.options.check else 0
        bare = self._bare if self.options.plain and self.kind.startswith("all_to_all") else None
        told = timed(self.call, bare, self.options, on_host, offset, self.device)
        everyone: list[Any] = [None] * len(nodes)
        dist.all_gather_object(everyone, Samples(*told, wrong), group=on_host)
        if dist.get_rank() != 0:
            return None
        name = str(self.dtype).removeprefix("torch.")
        g = self.group
        return Result.of(self.kind, g.name, g.all, self.size, name, self.grain, self.sent, everyone, g.also)

    def _bare(self) -> None:
        dist.all_to_all_single(self.out, self.x, self.splits[1], self.splits[0], group=self.group.own)


def timed(
    call: Callable[[], object],
    bare: Callable[[], object] | None,
    options: Options,
    on_host: dist.ProcessGroup,
    offset: float,
    device: torch.device,
) -> tuple[list[Span], list[Span]]:
    """Begins and ends of every iteration of `call`, and of `bare` before and after each, on rank 0's clock.

    Collective.
    """
    own: list[Stamp] = []
    plain: list[Stamp] = []
    sides: list[tuple[list[Stamp], Callable[[], object]]] = [(own, call)]
    if bare is not None:
        sides = [(plain, bare), *sides, (plain, bare)]
    for number in range(options.warmup + options.iterations):
        for stamps, run_once in sides:
            dist.barrier(on_host)
            begin = comm.now(device)
            run_once()
            stamp = begin, comm.now(device)
            if number >= options.warmup:
                stamps.append(stamp)
    return _seconds(own, offset, device), _seconds(plain, offset, device)


Stamp = tuple[comm.Time, comm.Time]
Span = tuple[float, float]


def _seconds(stamps: list[Stamp], offset: float, device: torch.device) -> list[Span]:
    """Begins and ends on rank 0's clock; on a GPU since the first begin, which a barrier has put at one time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return [(comm.between(stamps[0][0], a), comm.between(stamps[0][0], b)) for a, b in stamps]
    return [(a + offset, b + offset) for a, b in stamps if isinstance(a, float) and isinstance(b, float)]


SUMS = ("reduce_scatter", "all_reduce")

ADDENDS = 64
"""Most ranks that add something to an element: their sum, at most 3 · (64 + 1), is exact in any type, in any order."""


def pattern(rank: int, elements: int, dtype: torch.dtype, summed: int = 1) -> Tensor:
    """The elements that rank `rank` sends, [elements]: small whole numbers that differ from rank to rank.

    Where `summed` ranks are added, each adds to some of the elements only: bfloat16 knows whole numbers to 256. Sums
    differ from element to element, too.
    """
    stride, i = -(-summed // ADDENDS), torch.arange(elements)
    places = i + rank
    return torch.where(places % stride == 0, places // stride % (1 + i % 3) + 1, 0).to(dtype)
