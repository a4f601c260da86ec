"""The one wrapper of the project's own collectives: each can be recorded, and costs nothing if it is not.

All take plain process groups. Rows are dim 0. A collective is started, then waited for; none here is
differentiable: see `moesys.parallel.flight`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_functional = torch.ops._c10d_functional

Time = float | torch.cuda.Event
"""Seconds on the host's clock, or an event of a CUDA stream."""


class Way(NamedTuple):
    """What rows travel for.

    `level`: "flat", "inter" nodes or "intra" a node for rows to experts and back, "" for anything else.
    `layer`: the name of their MoE layer. `part`: "dispatch" to the experts, "combine" back from them; "step", "data"
    or "context". `backward`: whether they are gradients.
    """

    level: str = ""
    layer: str = ""
    part: str = ""
    backward: bool = False

    def back(self) -> Way:
        """The way of the gradients."""
        return self._replace(backward=True)


NOWHERE = Way()

STEP = Way(part="step")
"""Of what all ranks of a step share: the gradients' norm, metrics."""

GRADIENTS = Way(part="data", backward=True)
"""Of gradients that are summed over ranks with other data."""

CONTEXT = Way(part="context")
"""Of keys and values of the whole sequence."""


@dataclass
class Event:
    """One collective on this rank.

    `begin` is when it was started, `waited` when its result was needed, `end` when it was there; `met` is
    when all ranks had arrived, where an `audit` made them wait for each other before anything travelled.
    `bytes` is S of nccl-tests: what this rank contributes, its own part included (the whole, over all ranks, of an
    all-gather, a reduce-scatter, a gather or a scatter; once what is reduced in an all-reduce or a reduce, and what is
    sent in a broadcast); of a message its size. `sent` is how much of it goes to each of `ranks`, in their order, where
    that is known. `by` is the dimension of parallelism whose code started it, where that is known and `way` does not
    say so: several dimensions may have one group.
    """

    kind: str
    bytes: int
    begin: Time
    waited: Time
    end: Time
    way: Way = NOWHERE
    group: str = ""
    ranks: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()
    met: Time | None = None
    by: str = ""

    @property
    def level(self) -> str:
        return self.way.level

    @property
    def seconds(self) -> float:
        """From start to end, whatever was computed meanwhile."""
        return between(self.begin, self.end)

    @property
    def exposed(self) -> float:
        """Seconds in which this rank had nothing else to do."""
        met = 0.0 if self.met is None else between(self.begin, self.met)
        return met + between(self.waited, self.end)


def between(a: Time, b: Time) -> float:
    """Seconds from a to b; events of a stream must have happened."""
    if isinstance(a, torch.cuda.Event) or isinstance(b, torch.cuda.Event):
        assert isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event)
        return a.elapsed_time(b) / 1e3
    return b - a


_recording: list[Event] | None = None
_kept: Collection[Any] = ()
_audit = False


@contextmanager
def record(audit: bool = False) -> Iterator[list[Event]]:
    """Collect an `Event` for every collective inside; on GPU, synchronise before reading their seconds.

    A record around this one gets the events as well, when this one ends. `audit`: all ranks of a group meet
    before rows travel to experts or back, which ends all overlap of these with computation.
    """
    global _recording, _audit
    outer, _recording, audited, _audit = _recording, [], _audit, _audit or audit
    try:
        yield _recording
    finally:
        if outer is not None:
            outer.extend(_recording)
        _recording, _audit = outer, audited


def recording() -> bool:
    """Whether collectives are recorded now."""
    return _recording is not None


def note(event: Event) -> None:
    """Add to the record what travelled past this module."""
    if _recording is not None:
        _recording.append(event)


@contextmanager
def replayed(kept: Collection[Any]) -> Iterator[None]:
    """Inside, the results of the operations `kept` are at hand from a first run: nothing travels again."""
    global _kept
    outer, _kept = _kept, kept
    try:
        yield
    finally:
        _kept = outer


def is_kept(op: Any) -> bool:
    """Whether `op` only gives back what it gave before."""
    return op in _kept


def now(device: torch.device) -> Time:
    """On a GPU, when its current stream gets here."""
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
            return _arrived(self.out)
        self.event.waited = now(self.out.device)
        out = _arrived(self.out)
        self.event.end = now(self.out.device)
        return out


_arrived = _functional.wait_tensor.default


def _start(
    kind: str, way: Way, op: Any, x: Tensor, group: dist.ProcessGroup, *arguments: Any, rows: list[int] | None = None
) -> Pending:
    """`op(x, *arguments, group)`; `rows`: how many of x go to each rank, None if they all go everywhere.

    Nobody says to whom the parts of an all-reduce go.
    """
    # A compiled graph runs without Python: nothing in it can be recorded.
    if torch.compiler.is_compiling() or _recording is None or op in _kept:
        return Pending(op(x, *arguments, group.group_name), None)
    ranks = tuple(dist.get_process_group_ranks(group))
    sent: tuple[int, ...] = ()
    if rows is not None:
        per_row = x.nbytes // max(1, len(x))
        sent = tuple(n * per_row for n in rows)
    elif kind != "all_reduce":
        sent = (x.nbytes,) * len(ranks)
    begin = now(x.device)
    size = sum(sent) if sent else x.nbytes
    event = Event(kind, size, begin, begin, begin, way, group.group_name, ranks, sent)
    _recording.append(event)
    if _audit and way.level:
        _meet(group, x.device)
        event.met = event.waited = now(x.device)
    return Pending(op(x, *arguments, group.group_name), event)


def _meet(group: dist.ProcessGroup, device: torch.device) -> None:
    _arrived(_functional.all_reduce.default(torch.zeros(1, device=device), "sum", group.group_name))


def start_exchange(
    x: Tensor,
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    kind: str = "all_to_all",
    way: Way = NOWHERE,
) -> Pending:
    """All-to-all of rows, not differentiable: `send[i]` rows go to rank i, `receive[i]` come from it."""
    op = _functional.all_to_all_single.default
    return _start(kind, way, op, x.contiguous(), group, receive, send, rows=send)


def start_counts(x_R: Tensor, group: dist.ProcessGroup, way: Way = NOWHERE) -> Pending:
    """All-to-all of one row per rank: row i goes to rank i."""
    one = [1] * group.size()
    return start_exchange(x_R, one, one, group, "all_to_all_counts", way)


def start_gather(x: Tensor, group: dist.ProcessGroup, kind: str = "all_gather", way: Way = NOWHERE) -> Pending:
    """Rows of all ranks in group order, not differentiable; every rank gives as many."""
    op = _functional.all_gather_into_tensor.default
    return _start(kind, way, op, x.contiguous(), group, group.size())


def start_reduce_scatter(
    x: Tensor, group: dist.ProcessGroup, kind: str = "reduce_scatter", way: Way = NOWHERE
) -> Pending:
    """Sum over the ranks, of which each gets an equal part of the rows, in group order."""
    op, ranks = _functional.reduce_scatter_tensor.default, group.size()
    return _start(kind, way, op, x.contiguous(), group, "sum", ranks, rows=[len(x) // ranks] * ranks)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`start_gather`, waited for."""
    return start_gather(x, group).wait()


def start_total(x: Tensor, group: dist.ProcessGroup | None = None, way: Way = NOWHERE) -> Pending:
    """Sum over the ranks, in place, not differentiable; None: all ranks."""
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return _start("all_reduce", way, _functional.all_reduce_.default, x, group, "sum")


def total(x: Tensor, group: dist.ProcessGroup | None = None, way: Way = NOWHERE) -> Tensor:
    """`start_total` of a copy, waited for."""
    if torch.compiler.is_compiling() and group is not None:  # nothing in place: graphs may be computed again
        return _start("all_reduce", way, _functional.all_reduce.default, x, group, "sum").wait()
    return start_total(x.clone(), group, way).wait()
