"""Differentiable collectives that are started, and waited for later.

The two are operations of autograd of their own, so that in backward, too, the gradients of rows travel
while everything between the two is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.comm import NOWHERE, Pending, Way, start_exchange, start_gather, start_reduce_scatter


class Codec(Protocol):
    """How values are written for the way there; gradients come back as they are."""

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, arrived: Tensor) -> Tensor: ...


class _Trip:
    """What the two operations of a flight share: how to go there and back, and what is in the air."""

    def __init__(self, there: Callable[[Tensor], Pending], back: Callable[[Tensor], Pending], codec: Codec | None):
        self.there, self.back, self.codec = there, back, codec
        self.pending: Pending | None = None

    def depart(self, x: Tensor) -> None:
        self.pending = self.there(x if self.codec is None else self.codec.encode(x))

    def turn(self, grad: Tensor) -> None:
        self.pending = self.back(grad)

    def land(self) -> Tensor:
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()

    def arrive(self) -> Tensor:
        return self.land() if self.codec is None else self.codec.decode(self.land())


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trip):  # type: ignore[override]
        ctx.trip = trip
        trip.depart(x)
        # Nothing but the order of operations runs through here.
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[override]
        return ctx.trip.land(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, trip):  # type: ignore[override]
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        ctx.trip.turn(grad)
        return grad.new_empty(0), None


class Flight:
    """Rows on their way: started when this is made, there when `wait` (called once) returns.

    In backward the gradients start where `wait` was called, and are waited for where this was made.
    """

    def __init__(
        self, x: Tensor, there: Callable[[Tensor], Pending], back: Callable[[Tensor], Pending], codec: Codec | None
    ):
        self._trip = _Trip(there, back, codec)
        self._token = _Depart.apply(x, self._trip)

    def wait(self) -> Tensor:
        return _Arrive.apply(self._token, self._trip)

    def abandon(self) -> None:
        """Let nothing stay in the air where the result is not wanted: torch keeps what is never waited for."""
        if self._trip.pending is not None:
            self._trip.land()


def fly(
    x: Tensor,
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    kind: str = "all_to_all",
    way: Way = NOWHERE,
    codec: Codec | None = None,
) -> Flight:
    """All-to-all of rows; gradients go back. Any number of rows may be 0."""
    return Flight(
        x,
        lambda y: start_exchange(y, send, receive, group, kind, way),
        lambda grad: start_exchange(grad, receive, send, group, kind, way.back()),
        codec,
    )


def fly_everywhere(
    x: Tensor, group: dist.ProcessGroup, what: str = "", way: Way = NOWHERE, codec: Codec | None = None
) -> Flight:
    """All-gather of rows; the gradients of each rank's rows are summed there (reduce-scatter)."""
    return Flight(
        x,
        lambda y: start_gather(y, group, "all_gather" + what, way),
        lambda grad: start_reduce_scatter(grad, group, "reduce_scatter" + what, way.back()),
        codec,
    )


def fly_home(x: Tensor, group: dist.ProcessGroup, way: Way = NOWHERE) -> Flight:
    """Reduce-scatter of rows; the gradients of its part go to every rank (all-gather)."""
    return Flight(
        x,
        lambda y: start_reduce_scatter(y, group, way=way),
        lambda grad: start_gather(grad, group, way=way.back()),
        None,
    )


def gather_rows(x: Tensor, group: dist.ProcessGroup, way: Way = NOWHERE) -> Tensor:
    """`gather` whose backward sums the gradients of each rank's rows (reduce-scatter). A compiler takes it."""
    rows: Tensor = _GatherRows.apply(x, group, way)
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, way):  # type: ignore[override]
        ctx.group, ctx.way = group, way
        return start_gather(x, group, way=way).wait()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return start_reduce_scatter(grad, ctx.group, way=ctx.way.back()).wait(), None, None
