"""The one wrapper of the project's own collectives: each can be recorded, and costs nothing if it is not.

All take plain process groups. Rows are dim 0. A collective is started, then waited for; none here is
differentiable: see `moesys.parallel.flight`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_functional = torch.ops._c10d_functional

Time = float | torch.cuda.Event
"""Seconds on the host's clock, or an event of a CUDA stream."""


@dataclass
class Event:
    """One collective on this rank.

    `begin` is when it was started, `waited` when its result was needed, `end` when it was there.
    `bytes` is what this rank contributes, its own part included (the gathered size of an all-gather or a
    reduce-scatter); `sent` how much of it goes to each of `ranks`, in their order, where that is known.
    `level` is the way of rows to experts: "flat", "inter" nodes, "intra" a node; else "".
    """

    kind: str
    bytes: int
    begin: Time
    waited: Time
    end: Time
    level: str = ""
    ranks: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()

    @property
    def seconds(self) -> float:
        """From start to end, whatever was computed meanwhile."""
        return _between(self.begin, self.end)

    @property
    def exposed(self) -> float:
        """Seconds in which this rank had nothing else to do."""
        return _between(self.waited, self.end)


def _between(a: Time, b: Time) -> float:
    if isinstance(a, torch.cuda.Event) or isinstance(b, torch.cuda.Event):
        assert isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event)
        return a.elapsed_time(b) / 1e3
    return b - a


_recording: list[Event] | None = None
_kept: Collection[Any] = ()


@contextmanager
def record() -> Iterator[list[Event]]:
    """Collect an `Event` for every collective inside; on GPU, synchronise before reading their seconds."""
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


@contextmanager
def replayed(kept: Collection[Any]) -> Iterator[None]:
    """Inside, the results of the operations `kept` are at hand from a first run: nothing travels again."""
    global _kept
    outer, _kept = _kept, kept
    try:
        yield
    finally:
        _kept = outer


def _now(device: torch.device) -> Time:
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Pending:
    """A collective that was started: `wait` returns its result."""

    def __init__(self, out: Tensor, event: Event | None):
        self.out, self.event = out, event

    def abandon(self) -> None:
        """`wait` where the result is not wanted."""
        self.wait()

    def wait(self) -> Tensor:
        if self.event is None:
            return _functional.wait_tensor(self.out)
        self.event.waited = _now(self.out.device)
        out = _functional.wait_tensor(self.out)
        self.event.end = _now(self.out.device)
        return out


def _start(
    kind: str, level: str, op: Any, x: Tensor, group: dist.ProcessGroup, *arguments: Any, rows: list[int] | None = None
) -> Pending:
    """`op(x, *arguments, group)`; `rows`: how many of x go to each rank, None if they all go everywhere."""
    if _recording is None or op in _kept:
        return Pending(op(x, *arguments, group.group_name), None)
    ranks = tuple(dist.get_process_group_ranks(group))
    if rows is None:
        sent = (x.nbytes,) * len(ranks)
    else:
        per_row = x.nbytes // max(1, len(x))
        sent = tuple(n * per_row for n in rows)
    begin = _now(x.device)
    event = Event(kind, sum(sent), begin, begin, begin, level, ranks, sent)
    _recording.append(event)
    return Pending(op(x, *arguments, group.group_name), event)


def start_exchange(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, kind: str = "all_to_all", level: str = ""
) -> Pending:
    """All-to-all of rows, not differentiable: `send[i]` rows go to rank i, `receive[i]` come from it."""
    op = _functional.all_to_all_single.default
    return _start(kind, level, op, x.contiguous(), group, receive, send, rows=send)


def start_counts(x_R: Tensor, group: dist.ProcessGroup, level: str = "") -> Pending:
    """All-to-all of one row per rank: row i goes to rank i."""
    one = [1] * group.size()
    return start_exchange(x_R, one, one, group, "all_to_all_counts", level)


def start_gather(x: Tensor, group: dist.ProcessGroup, kind: str = "all_gather", level: str = "") -> Pending:
    """Rows of all ranks in group order, not differentiable; every rank gives as many."""
    op = _functional.all_gather_into_tensor.default
    return _start(kind, level, op, x.contiguous(), group, group.size())


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup, kind: str = "reduce_scatter", level: str = "") -> Pending:
    """Sum over the ranks, of which each gets an equal part of the rows, in group order."""
    op, ranks = _functional.reduce_scatter_tensor.default, group.size()
    return _start(kind, level, op, x.contiguous(), group, "sum", ranks, rows=[len(x) // ranks] * ranks)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`start_gather`, waited for."""
    return start_gather(x, group).wait()


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks, not differentiable."""
    event = None
    if _recording is not None:
        begin = _now(x.device)
        event = Event("all_reduce", x.nbytes, begin, begin, begin)
        _recording.append(event)
    return Pending(_functional.all_reduce(x, "sum", group.group_name), event).wait()
