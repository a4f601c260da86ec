"""Notes what travels past `moesys.parallel.comm`: torch's FSDP2, tensor parallelism, pipelining, and others' code.

Two doors lead to a process group. Python code calls the methods of `ProcessGroup`, whatever name it
imported; functional collectives, which DTensor uses, are operators. Both are watched only inside
`watched`, so that nothing is slower outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel import comm
from moesys.parallel.comm import Event, now

Sizes = Callable[..., tuple[int, tuple[int, ...]]]
"""Of a method's arguments: bytes that this rank contributes, and how many go to each rank where that is known."""


@contextmanager
def watched(functional: bool = True) -> Iterator[None]:
    """Inside, `comm.record` also gets what travels past `comm`.

    `functional`: also collectives that are operators. Compiled code must see these as they are.
    """
    with ExitStack() as stack:
        waiting: WeakKeyDictionary[Any, Event] = WeakKeyDictionary()
        for name, (kind, sizes) in METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                stack.enter_context(_replaced(dist.ProcessGroup, name, _method(name, kind, sizes, waiting)))
        stack.enter_context(_replaced(dist.Work, "wait", _wait(waiting)))
        if functional:
            in_air: dict[int, Event] = {}
            operators = torch.ops._c10d_functional
            for name, kind in OPERATORS.items():
                stack.enter_context(_replaced(operators, name, _Operator(getattr(operators, name), kind, in_air)))
            arrival = _Arrival(operators.wait_tensor, in_air)
            stack.enter_context(_replaced(operators, "wait_tensor", arrival))
        yield


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    getattr(owner, name)  # operators are found when they are first asked for
    # As it stands there: what getattr gives of a method of a C++ class is no method any more.
    old = vars(owner)[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _first(arguments: tuple[Any, ...]) -> Tensor:
    """The first tensor among arguments, which may lie in lists."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], (Tensor, list)):
            return _first(tuple(argument))
    return torch.empty(0)


def _bytes(given: Any) -> int:
    return sum(map(_bytes, given)) if isinstance(given, (list, tuple)) else int(given.nbytes)


def _own(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """Bytes of the first of the arguments, whole."""
    return _bytes(arguments[0]), ()


def _gathered(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """The larger of output and input, which is that of all ranks together."""
    return max(map(_bytes, arguments[:2])), ()


def _split(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    return _parts(arguments[1], arguments[3], group.size())


def _parts(x: Tensor, rows: list[int] | None, ranks: int) -> tuple[int, tuple[int, ...]]:
    """Bytes of x and of its parts: so many rows to each rank, or as many to each."""
    if not rows:
        return x.nbytes, (x.nbytes // ranks,) * ranks
    per_row = x.nbytes // max(1, len(x))
    return x.nbytes, tuple(n * per_row for n in rows)


def _listed(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """A tensor to each rank."""
    sent = tuple(map(_bytes, arguments[1]))
    return sum(sent), sent


METHODS: dict[str, tuple[str, Sizes]] = {
    "allreduce": ("all_reduce", _own),
    "allreduce_coalesced": ("all_reduce", _own),
    "broadcast": ("broadcast", _own),
    "reduce": ("reduce", _own),
    "allgather": ("all_gather", _gathered),
    "allgather_coalesced": ("all_gather", _gathered),
    "reduce_scatter": ("reduce_scatter", _gathered),
    "gather": ("gather", _gathered),
    "scatter": ("scatter", _gathered),
    "alltoall": ("all_to_all", _listed),
    "send": ("send", _own),
    "recv": ("recv", _own),
    # The names until torch 2.12, and since.
    "_allgather_base": ("all_gather", _gathered),
    "all_gather_single": ("all_gather", _gathered),
    "allgather_into_tensor_coalesced": ("all_gather", _gathered),
    "all_gather_single_coalesced": ("all_gather", _gathered),
    "_reduce_scatter_base": ("reduce_scatter", _gathered),
    "reduce_scatter_single": ("reduce_scatter", _gathered),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _gathered),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _gathered),
    "alltoall_base": ("all_to_all", _split),
    "all_to_all_single": ("all_to_all", _split),
}


def _method(name: str, kind: str, sizes: Sizes, waiting: WeakKeyDictionary[Any, Event]) -> Callable[..., Any]:
    original = getattr(dist.ProcessGroup, name)

    def call(group: dist.ProcessGroup, *arguments: Any, **more: Any) -> Any:
        if group.size() == 1:
            return original(group, *arguments, **more)
        size, sent = sizes(group, *arguments)
        ranks = tuple(dist.get_process_group_ranks(group))
        if kind in ("send", "recv"):
            here, there = ranks[group.rank()], ranks[arguments[1]]
            ranks = (here, there) if kind == "send" else (there, here)
        begin = now(_first(arguments).device)
        work = original(group, *arguments, **more)
        event = Event(kind, size, begin, begin, begin, group=group.group_name, ranks=ranks, sent=sent)
        comm.note(event)
        if work is not None:
            waiting[work] = event
        return work

    return call


def _wait(waiting: WeakKeyDictionary[Any, Event]) -> Callable[..., Any]:
    original = dist.Work.wait

    def wait(work: Any, *arguments: Any, **more: Any) -> Any:
        event = waiting.pop(work, None)
        if event is None:
            return original(work, *arguments, **more)
        device = torch.device("cpu" if isinstance(event.begin, float) else "cuda")
        event.waited = now(device)
        done = original(work, *arguments, **more)
        event.end = now(device)
        return done

    return wait


OPERATORS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}

PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors with memory of their own; those that only stand for shapes have no address."""


class _Operator:
    """An operator that starts a functional collective; the group's name is its last argument."""

    def __init__(self, packet: Any, kind: str, in_air: dict[int, Event]):
        self._packet, self._kind, self._in_air = packet, kind, in_air

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        if type(x) not in PLAIN or comm.is_kept(self._packet.default):
            return self._packet(x, *arguments)
        begin = now(x.device)
        out = self._packet(x, *arguments)
        ranks = tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(arguments[-1])))
        size, sent = x.nbytes * (len(ranks) if self._kind == "all_gather" else 1), cast("tuple[int, ...]", ())
        if self._kind == "all_to_all":
            size, sent = _parts(x, arguments[1], len(ranks))
        event = Event(self._kind, size, begin, begin, begin, group=arguments[-1], ranks=ranks, sent=sent)
        comm.note(event)
        self._in_air[out.data_ptr()] = event
        return out


class _Arrival:
    """The operator that waits for what a functional collective gives."""

    def __init__(self, packet: Any, in_air: dict[int, Event]):
        self._packet, self._in_air = packet, in_air

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def __call__(self, x: Tensor) -> Tensor:
        event = self._in_air.pop(x.data_ptr(), None) if type(x) in PLAIN else None
        if event is None:
            return self._packet(x)
        event.waited = now(x.device)
        out = self._packet(x)
        event.end = now(x.device)
        return out
