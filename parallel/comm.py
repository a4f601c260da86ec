"""The one wrapper of the project's own collectives: each can be recorded, and costs nothing if it is not.

All take plain process groups. Rows are dim 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

_functional = torch.ops._c10d_functional


@dataclass
class Event:
    """One collective on this rank. `begin` and `end` are seconds, or CUDA events until resolved."""

    kind: str
    bytes: int
    begin: float | torch.cuda.Event
    end: float | torch.cuda.Event

    @property
    def seconds(self) -> float:
        if isinstance(self.begin, torch.cuda.Event):
            assert isinstance(self.end, torch.cuda.Event)
            return self.begin.elapsed_time(self.end) / 1e3
        assert isinstance(self.end, float)
        return self.end - self.begin


_recording: list[Event] | None = None


@contextmanager
def record() -> Iterator[list[Event]]:
    """Collect an `Event` for every collective inside; on GPU, synchronise before reading their seconds."""
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def _recorded(kind: str, x: Tensor) -> Iterator[None]:
    if _recording is None:
        yield
        return
    begin = _now(x.device)
    yield
    _recording.append(Event(kind, x.numel() * x.element_size(), begin, _now(x.device)))


def exchange(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, kind: str = "all_to_all"
) -> Tensor:
    """All-to-all of rows, not differentiable: `send[i]` rows go to rank i, `receive[i]` come from it."""
    with _recorded(kind, x):
        out = _functional.all_to_all_single(x.contiguous(), receive, send, group.group_name)
        return _functional.wait_tensor(out)


def exchange_counts(x_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all of one row per rank: row i goes to rank i."""
    one = [1] * group.size()
    return exchange(x_R, one, one, group, kind="all_to_all_counts")


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):  # type: ignore[override]
        ctx.reverse = (receive, send, group)
        return exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return exchange(grad, *ctx.reverse), None, None, None


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """`exchange` whose backward sends the gradients back. Any number of rows may be 0."""
    return _AllToAll.apply(x, send, receive, group)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks in group order, not differentiable; every rank gives as many."""
    with _recorded("all_gather", x):
        out = _functional.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
        return _functional.wait_tensor(out)


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks, not differentiable."""
    with _recorded("all_reduce", x):
        return _functional.wait_tensor(_functional.all_reduce(x, "sum", group.group_name))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[override]
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        with _recorded("reduce_scatter", grad):
            out = _functional.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.group.size(), ctx.group.group_name)
            return _functional.wait_tensor(out), None


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gather` whose backward sums the gradients of each rank's rows (reduce-scatter)."""
    return _GatherRows.apply(x, group)
