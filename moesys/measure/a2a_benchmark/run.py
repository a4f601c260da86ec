"""A benchmark of collectives in the manner of nccl-tests, on all ranks of a run. Collective over the world.

Every iteration begins with a barrier, which is not timed. A rank's time is from its begin to its end; on
one clock for all ranks it divides into *wait*, until the last rank of its group began, and *transfer*. On GPUs no
clock is shared: there streams meet in an all-reduce first, and a rank's time is the duration between two events.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import Config
from moesys.measure.a2a_benchmark import payload, traffic
from moesys.measure.a2a_benchmark.result import Result, Samples
from moesys.measure.a2a_benchmark.sizes import COLLECTIVES, GROUPS
from moesys.measure.a2a_benchmark.traffic import Matrix
from moesys.measure.record import clocks
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
    from moesys.measure.a2a_benchmark import dispatch

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
            dispatching = dispatch.Dispatching(kind, config, mesh, getattr(torch, dtype), options)
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
        self._fill()
        self.call()
        wrong = self.differing(self.x if self.kind == "all_reduce" else self.out)
        if self.kind == "all_reduce":
            self.x.zero_()  # sums of sums would grow beyond all numbers
        return wrong

    def differing(self, result: Tensor) -> int:
        """Elements of `result` that are not what this rank must have after a call, found where they lie."""
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
        """The elements at places `place` of what this rank must have, float32."""
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
        """The place behind which each sender's part of what arrives ends, and the distance from there to its place in
        what that rank sent: int64 [ranks] each."""
        matrix = np.asarray(self.sent) // self.grain
        column = matrix[:, self.rank]
        behind = column.cumsum()
        shift = matrix[:, : self.rank].sum(1) - (behind - column)
        return torch.from_numpy(behind).to(self.device), torch.from_numpy(shift).to(self.device)

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
    together = Together(device, on_host)
    for number in range(options.warmup + options.iterations):
        for stamps, run_once in sides:
            together.meet()
            begin = comm.now(device)
            run_once()
            stamp = begin, comm.now(device)
            if number >= options.warmup:
                stamps.append(stamp)
    return _seconds(own, offset, device), _seconds(plain, offset, device)


class Together:
    """The begin of an iteration on all ranks at one time, as near as can be.

    A barrier of the hosts does not align what their GPUs do. There the streams meet in an all-reduce of one number,
    behind so much work that the hosts have started what is timed before it begins: what the launch itself takes is
    not in the times. (DeepEP's benchmarks put a GPU to sleep for that.) The work also empties the cache.
    """

    def __init__(self, device: torch.device, on_host: dist.ProcessGroup):
        self.device, self.on_host = device, on_host
        if device.type == "cuda":
            self.work = torch.empty(2**28, dtype=torch.uint8, device=device)
            self.one = torch.zeros(1, device=device)

    def meet(self) -> None:
        """Collective over the world."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.on_host)
        if self.device.type == "cuda":
            for _ in range(4):
                self.work.zero_()
            dist.all_reduce(self.one)


Stamp = tuple[comm.Time, comm.Time]
Span = tuple[float, float]


def _seconds(stamps: list[Stamp], offset: float, device: torch.device) -> list[Span]:
    """Begins and ends on rank 0's clock; on a GPU from 0, where all ranks' streams have met."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return [(0.0, comm.between(a, b)) for a, b in stamps]
    return [(a + offset, b + offset) for a, b in stamps if isinstance(a, float) and isinstance(b, float)]


def _chunks(elements: int) -> Iterator[slice]:
    """So many elements at a time that arithmetic on them needs little memory."""
    for begin in range(0, elements, CHUNK):
        yield slice(begin, min(elements, begin + CHUNK))


SUMS = ("reduce_scatter", "all_reduce")

CHUNK = 2**22
"""Elements that are made or checked at a time."""
