"""The one wrapper of the project's own collectives: it records them on request, and costs nothing otherwise.

All take plain process groups. Rows are dim 0. A collective is started, then waited for. None here is
differentiable: see `moesys.parallel.async_collectives`.
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


class Tag(NamedTuple):
    """A communication tag: the purpose of a collective, for records.

    Attributes:
        level: "flat", "inter" nodes or "intra" a node for rows to experts and back, "" for anything else.
        layer: the name of their MoE layer.
        part: "dispatch" to the experts, "combine" back from them; "step", "data" or "context".
        backward: whether it moves gradients.
    """

    level: str = ""
    layer: str = ""
    part: str = ""
    backward: bool = False

    def for_backward(self) -> Tag:
        """The tag of the gradients."""
        return self._replace(backward=True)


UNTAGGED = Tag()

STEP = Tag(part="step")
"""Tag of the sums over all ranks of a step: the gradients' norm, metrics."""

GRADIENTS = Tag(part="data", backward=True)
"""Tag of gradients that are summed over ranks with other data."""

CONTEXT = Tag(part="context")
"""Tag of keys and values of the whole sequence."""


@dataclass
class CollectiveRecord:
    """One collective on this rank.

    Attributes:
        bytes: S of nccl-tests: the bytes that this rank contributes, its own part included (the whole, over all ranks,
            of an all-gather, a reduce-scatter, a gather or a scatter; once the input of an all-reduce, a reduce or a
            broadcast); the size of a message.
        begin: time of its start.
        waited: time at which this rank began to wait for its result.
        end: time at which the result was there.
        tag: its purpose, where the code that started it says so.
        group, ranks: name and ranks of its process group.
        sent: bytes for each of `ranks`, in their order, where that is known.
        met: time at which all ranks had arrived, where an `audit` made them wait for each other first.
        by: the dimension of parallelism whose code started it, where that is known and `tag` does not say so: several
            dimensions may share one group.
    """

    kind: str
    bytes: int
    begin: Time
    waited: Time
    end: Time
    tag: Tag = UNTAGGED
    group: str = ""
    ranks: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()
    met: Time | None = None
    by: str = ""

    @property
    def level(self) -> str:
        """Level of its tag."""
        return self.tag.level

    @property
    def seconds(self) -> float:
        """Seconds from start to end, overlapped ones included."""
        return between(self.begin, self.end)

    @property
    def exposed(self) -> float:
        """Seconds in which this rank waited for it."""
        met = 0.0 if self.met is None else between(self.begin, self.met)
        return met + between(self.waited, self.end)


def between(a: Time, b: Time) -> float:
    """Seconds from a to b; a stream must have reached both events."""
    if isinstance(a, torch.cuda.Event) or isinstance(b, torch.cuda.Event):
        assert isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event)
        return a.elapsed_time(b) / 1e3
    return b - a


_recording: list[CollectiveRecord] | None = None
_kept: Collection[Any] = ()
_audit = False


@contextmanager
def record(audit: bool = False) -> Iterator[list[CollectiveRecord]]:
    """Collect a `CollectiveRecord` of every collective inside; on GPU, synchronise before reading their seconds.

    An outer `record` gets them as well when this one ends. `audit`: all ranks of a group meet before rows are sent to
    experts or back, which ends all overlap of these with computation.
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


def add(event: CollectiveRecord) -> None:
    """Add the record of a collective that this module did not start."""
    if _recording is not None:
        _recording.append(event)


@contextmanager
def replayed(kept: Collection[Any]) -> Iterator[None]:
    """Context of a recomputation that has the results of the operations `kept`: these do not communicate again."""
    global _kept
    outer, _kept = _kept, kept
    try:
        yield
    finally:
        _kept = outer


def is_kept(op: Any) -> bool:
    """Whether `op` returns a kept result instead of communicating."""
    return op in _kept


def now(device: torch.device) -> Time:
    """The host's time; on a GPU an event of its current stream."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Work:
    """Handle of a running collective, as `torch.distributed.Work`: `wait` returns its result."""

    def __init__(self, out: Tensor, event: CollectiveRecord | None):
        self.out, self.event = out, event

    def discard(self) -> None:
        """Wait where nobody wants the result."""
        self.wait()

    def wait(self) -> Tensor:
        """The result."""
        if self.event is None:
            return _wait_tensor(self.out)
        self.event.waited = now(self.out.device)
        out = _wait_tensor(self.out)
        self.event.end = now(self.out.device)
        return out


_wait_tensor = _functional.wait_tensor.default


def _start(
    kind: str, tag: Tag, op: Any, x: Tensor, group: dist.ProcessGroup, *arguments: Any, rows: list[int] | None = None
) -> Work:
    """Start `op(x, *arguments, group)`; `rows`: how many of x go to each rank, None if they all go everywhere.

    The record of an all-reduce does not say which rank gets which part.
    """
    # A compiled graph runs without Python: nothing in it can be recorded.
    if torch.compiler.is_compiling() or _recording is None or op in _kept:
        return Work(op(x, *arguments, group.group_name), None)
    ranks = tuple(dist.get_process_group_ranks(group))
    sent: tuple[int, ...] = ()
    if rows is not None:
        per_row = x.nbytes // max(1, len(x))
        sent = tuple(n * per_row for n in rows)
    elif kind != "all_reduce":
        sent = (x.nbytes,) * len(ranks)
    begin = now(x.device)
    size = sum(sent) if sent else x.nbytes
    event = CollectiveRecord(kind, size, begin, begin, begin, tag, group.group_name, ranks, sent)
    _recording.append(event)
    if _audit and tag.level:
        _meet(group, x.device)
        event.met = event.waited = now(x.device)
    return Work(op(x, *arguments, group.group_name), event)


def _meet(group: dist.ProcessGroup, device: torch.device) -> None:
    _wait_tensor(_functional.all_reduce.default(torch.zeros(1, device=device), "sum", group.group_name))


def start_all_to_all(
    x: Tensor,
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    kind: str = "all_to_all",
    tag: Tag = UNTAGGED,
) -> Work:
    """Start an all-to-all of rows: `send[i]` rows go to rank i, `receive[i]` come from it."""
    op = _functional.all_to_all_single.default
    return _start(kind, tag, op, x.contiguous(), group, receive, send, rows=send)


def start_all_to_all_counts(x_R: Tensor, group: dist.ProcessGroup, tag: Tag = UNTAGGED) -> Work:
    """Start an all-to-all of one row per rank: row i goes to rank i."""
    one = [1] * group.size()
    return start_all_to_all(x_R, one, one, group, "all_to_all_counts", tag)


def start_all_gather(x: Tensor, group: dist.ProcessGroup, kind: str = "all_gather", tag: Tag = UNTAGGED) -> Work:
    """Start gathering the rows of all ranks, in group order; every rank gives as many. x [N, …], rows."""
    op = _functional.all_gather_into_tensor.default
    return _start(kind, tag, op, x.contiguous(), group, group.size())


def start_reduce_scatter(
    x: Tensor, group: dist.ProcessGroup, kind: str = "reduce_scatter", tag: Tag = UNTAGGED
) -> Work:
    """Start a sum over the ranks, of which each gets an equal part of the rows, in group order. x [N, …], rows."""
    op, ranks = _functional.reduce_scatter_tensor.default, group.size()
    return _start(kind, tag, op, x.contiguous(), group, "sum", ranks, rows=[len(x) // ranks] * ranks)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, in group order; every rank gives as many. x [N, …], rows."""
    return start_all_gather(x, group).wait()


def start_all_reduce(x: Tensor, group: dist.ProcessGroup | None = None, tag: Tag = UNTAGGED) -> Work:
    """Start a sum over the ranks, in place; `group` None: all ranks. x may have any shape."""
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return _start("all_reduce", tag, _functional.all_reduce_.default, x, group, "sum")


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None, tag: Tag = UNTAGGED) -> Tensor:
    """The sum of x over the ranks, in new memory; `group` None: all ranks. x may have any shape."""
    if torch.compiler.is_compiling() and group is not None:  # nothing in place: graphs may be computed again
        return _start("all_reduce", tag, _functional.all_reduce.default, x, group, "sum").wait()
    return start_all_reduce(x.clone(), group, tag).wait()
