"""Differentiable collectives that run asynchronously: one call starts them, `wait` returns the result.

Start and wait are two operations of autograd. So the gradients, too, move while everything between the two is
computed. The functions are named as those of `torch.distributed._functional_collectives`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.comm import UNTAGGED, Tag, Work, start_all_gather, start_all_to_all, start_reduce_scatter


class Codec(Protocol):
    """Encodes rows before they are sent in forward; gradients are sent as they are."""

    def encode(self, x: Tensor) -> Tensor:
        """The rows as they are sent. x [N, …], rows."""
        ...

    def decode(self, received: Tensor) -> Tensor:
        """The rows that `encode` was given on their source ranks. `received` [N, …], rows."""
        ...


class _Exchange:
    """State that the start and the wait of one collective share: both directions, and the one that is running."""

    def __init__(self, forward: Callable[[Tensor], Work], backward: Callable[[Tensor], Work], codec: Codec | None):
        self.forward, self.backward, self.codec = forward, backward, codec
        self.work: Work | None = None

    def start_forward(self, x: Tensor) -> None:
        self.work = self.forward(x if self.codec is None else self.codec.encode(x))

    def start_backward(self, grad: Tensor) -> None:
        self.work = self.backward(grad)

    def wait(self) -> Tensor:
        assert self.work is not None
        work, self.work = self.work, None
        return work.wait()

    def wait_forward(self) -> Tensor:
        return self.wait() if self.codec is None else self.codec.decode(self.wait())


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, exchange):  # type: ignore[override]
        ctx.exchange = exchange
        exchange.start_forward(x)
        # An empty tensor: it carries the order of the operations alone.
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[override]
        return ctx.exchange.wait(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, started, exchange):  # type: ignore[override]
        ctx.exchange = exchange
        return exchange.wait_forward()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        ctx.exchange.start_backward(grad)
        return grad.new_empty(0), None


class AsyncCollective:
    """A running collective with a gradient: it starts when this is made, and `wait` (called once) returns its result.

    In backward the collective of the gradients starts where `wait` was called, and is waited for where this was made.
    """

    def __init__(
        self, x: Tensor, forward: Callable[[Tensor], Work], backward: Callable[[Tensor], Work], codec: Codec | None
    ):
        self._exchange = _Exchange(forward, backward, codec)
        self._started = _Start.apply(x, self._exchange)

    def wait(self) -> Tensor:
        """The result."""
        return _Wait.apply(self._started, self._exchange)

    def discard(self) -> None:
        """Wait where nobody wants the result: torch holds the memory of a collective until someone waits for it."""
        if self._exchange.work is not None:
            self._exchange.wait()


def all_to_all_autograd(
    x: Tensor,
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    kind: str = "all_to_all",
    tag: Tag = UNTAGGED,
    codec: Codec | None = None,
) -> AsyncCollective:
    """All-to-all of rows; gradients return the same way. Any number of rows may be 0. x [N, …], rows."""
    return AsyncCollective(
        x,
        lambda y: start_all_to_all(y, send, receive, group, kind, tag),
        lambda grad: start_all_to_all(grad, receive, send, group, kind, tag.for_backward()),
        codec,
    )


def all_gather_autograd(
    x: Tensor, group: dist.ProcessGroup, suffix: str = "", tag: Tag = UNTAGGED, codec: Codec | None = None
) -> AsyncCollective:
    """All-gather of rows; backward sums the gradients of each rank's rows there (reduce-scatter).

    x [N, …], rows.

    `suffix` is added to the kinds of both in records.
    """
    return AsyncCollective(
        x,
        lambda y: start_all_gather(y, group, "all_gather" + suffix, tag),
        lambda grad: start_reduce_scatter(grad, group, "reduce_scatter" + suffix, tag.for_backward()),
        codec,
    )


def reduce_scatter_autograd(x: Tensor, group: dist.ProcessGroup, tag: Tag = UNTAGGED) -> AsyncCollective:
    """Reduce-scatter of rows; backward gathers the gradients on every rank (all-gather). x [N, …], rows."""
    return AsyncCollective(
        x,
        lambda y: start_reduce_scatter(y, group, tag=tag),
        lambda grad: start_all_gather(grad, group, tag=tag.for_backward()),
        None,
    )


def gather_rows(x: Tensor, group: dist.ProcessGroup, tag: Tag = UNTAGGED) -> Tensor:
    """All-gather whose backward is a reduce-scatter; both block. `torch.compile` traces it. x [N, …], rows."""
    rows: Tensor = _GatherRows.apply(x, group, tag)
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, tag):  # type: ignore[override]
        ctx.group, ctx.tag = group, tag
        return start_all_gather(x, group, tag=tag).wait()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return start_reduce_scatter(grad, ctx.group, tag=ctx.tag.for_backward()).wait(), None, None
