"""Notes what travels past `moesys.parallel.comm`: torch's FSDP2, tensor parallelism, pipelining, and others' code.

Two doors lead to a process group. Python code calls the methods of `ProcessGroup`, whatever name it
imported; functional collectives, which DTensor uses, are operators. Both are record_torch_collectives only inside
`record_torch_collectives`, so that nothing is slower outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.measure.record.cuda_streams import Streams, followed
from moesys.measure.record.purpose import starter
from moesys.parallel import comm
from moesys.parallel.comm import CollectiveRecord, Time, now

Sizes = Callable[..., tuple[int, tuple[int, ...]]]
"""Of a method's arguments: bytes that this rank contributes, and how many go to each rank where that is known."""


@contextmanager
def record_torch_collectives(functional: bool = True) -> Iterator[None]:
    """Inside, `comm.record` also gets what travels past `comm`.

    `functional`: also collectives that are operators. Compiled code must see these as they are.
    """
    with ExitStack() as stack:
        in_flight = _InFlight()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            in_flight.streams = Streams()
            stack.enter_context(followed(in_flight.streams))
        for name, (kind, sizes) in METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                stack.enter_context(_replaced(dist.ProcessGroup, name, _method(name, kind, sizes, in_flight)))
        stack.enter_context(_replaced(dist.ProcessGroup, "_start_coalescing", _start_batch(in_flight)))
        stack.enter_context(_replaced(dist.ProcessGroup, "_end_coalescing", _end_batch(in_flight)))
        stack.enter_context(_replaced(dist.Work, "wait", _wait(in_flight)))
        if functional:
            for packets, names in ((torch.ops._c10d_functional, OPERATORS), (torch.ops._dtensor, DTENSOR)):
                for name, kind in names.items():
                    operator = _Operator(getattr(packets, name), kind, in_flight)
                    stack.enter_context(_replaced(packets, name, operator))
            waits = torch.ops._c10d_functional
            stack.enter_context(_replaced(waits, "wait_tensor", _Arrival(waits.wait_tensor, in_flight)))
        yield


class _InFlight:
    """Collectives that were started, and not waited for.

    Attributes:
        works: by the object that waits for them; several where they were started as one (`_start_coalescing`).
        batches: those of each group whose batch has not ended.
        tensors: by the address of what will be there.
        streams: of a GPU, who has waited for what; None without one.
    """

    def __init__(self) -> None:
        self.works: WeakKeyDictionary[Any, list[CollectiveRecord]] = WeakKeyDictionary()
        self.batches: dict[str, list[CollectiveRecord]] = {}
        self.tensors: dict[int, CollectiveRecord] = {}
        self.streams: Streams | None = None

    def start(self, kind: str, size: int, begin: Time, group: dist.ProcessGroup, **facts: Any) -> CollectiveRecord:
        """Note a collective that was started now."""
        ranks = facts.pop("ranks", None) or tuple(dist.get_process_group_ranks(group))
        by = starter() or ""
        event = CollectiveRecord(kind, size, begin, begin, begin, group=group.group_name, ranks=ranks, by=by, **facts)
        comm.add(event)
        return event

    def arrived(self, events: Sequence[CollectiveRecord], before: Time) -> None:
        """They were waited for since `before`, and are there."""
        for event in events:
            if self.streams is None or isinstance(before, float):
                event.waited, event.end = before, now(_CPU)
            else:
                self.streams.arrived(event, before)


_CPU, _CUDA = torch.device("cpu"), torch.device("cuda")


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


def _to_root(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """As many bytes from every rank as this one gives; only the root has an output."""
    return group.size() * _bytes(arguments[1]), ()


def _from_root(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """As many bytes to every rank as this one gets; only the root has an input."""
    return group.size() * _bytes(arguments[0]), ()


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
    "gather": ("gather", _to_root),
    "scatter": ("scatter", _from_root),
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


def _method(name: str, kind: str, sizes: Sizes, in_flight: _InFlight) -> Callable[..., Any]:
    original = getattr(dist.ProcessGroup, name)

    def call(group: dist.ProcessGroup, *arguments: Any, **more: Any) -> Any:
        if group.size() == 1:
            return original(group, *arguments, **more)
        size, sent = sizes(group, *arguments)
        ranks = None
        if kind in ("send", "recv"):
            every = dist.get_process_group_ranks(group)
            here, there = every[group.rank()], every[arguments[1]]
            ranks = (here, there) if kind == "send" else (there, here)
        begin = now(_first(arguments).device)
        work = original(group, *arguments, **more)
        event = in_flight.start(kind, size, begin, group, ranks=ranks, sent=sent)
        if (batch := in_flight.batches.get(group.group_name)) is not None:
            batch.append(event)  # the end of the batch gives what waits for it
        elif work is None:
            in_flight.arrived([event], begin)  # in the order of the stream
        else:
            in_flight.works[work] = [event]
        return work

    return call


def _start_batch(in_flight: _InFlight) -> Callable[..., Any]:
    """NCCL starts messages that go together, as the pipeline's, at once: `batch_isend_irecv`."""
    original = dist.ProcessGroup._start_coalescing

    def start(group: dist.ProcessGroup, *arguments: Any) -> Any:
        in_flight.batches[group.group_name] = []
        return original(group, *arguments)

    return start


def _end_batch(in_flight: _InFlight) -> Callable[..., Any]:
    original = dist.ProcessGroup._end_coalescing

    def end(group: dist.ProcessGroup, *arguments: Any) -> Any:
        events = in_flight.batches.pop(group.group_name, [])
        work = original(group, *arguments)
        if work is not None:
            in_flight.works[work] = events
        elif events:
            in_flight.arrived(events, events[0].begin)
        return work

    return end


def _wait(in_flight: _InFlight) -> Callable[..., Any]:
    original = dist.Work.wait

    def wait(work: Any, *arguments: Any, **more: Any) -> Any:
        events = in_flight.works.pop(work, None)
        if not events:
            return original(work, *arguments, **more)
        before = now(_CPU if isinstance(events[0].begin, float) else _CUDA)
        done = original(work, *arguments, **more)
        in_flight.arrived(events, before)
        return done

    return wait


OPERATORS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "all_reduce_coalesced": "all_reduce",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
}

DTENSOR = {"shard_dim_alltoall": "all_to_all"}
"""Operators of DTensor that end with what they give."""

PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors with memory of their own; those that only stand for shapes have no address."""


class _Operator:
    """An operator that starts a functional collective; the group's name is its last argument."""

    def __init__(self, packet: Any, kind: str, in_flight: _InFlight):
        self._packet, self._kind, self._in_flight = packet, kind, in_flight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def __call__(self, x: Any, *arguments: Any) -> Any:
        inputs = x if isinstance(x, (list, tuple)) else [x]
        if any(type(one) not in PLAIN for one in inputs) or comm.is_kept(self._packet.default):
            return self._packet(x, *arguments)
        begin = now(inputs[0].device)
        out = self._packet(x, *arguments)
        group = dist.distributed_c10d._resolve_process_group(arguments[-1])
        size = _bytes(x) * (group.size() if self._kind == "all_gather" else 1)
        sent: tuple[int, ...] = ()
        if self._kind == "all_to_all":
            size, sent = _parts(x, arguments[1] if isinstance(arguments[1], list) else None, group.size())
        event = self._in_flight.start(self._kind, size, begin, group, sent=sent)
        if self._packet.__name__ in DTENSOR:
            self._in_flight.arrived([event], begin)
        else:  # several that are coalesced travel as one, and are there when the first is
            self._in_flight.tensors[(out[0] if isinstance(out, (list, tuple)) else out).data_ptr()] = event
        return out


class _Arrival:
    """The operator that waits for what a functional collective gives."""

    def __init__(self, packet: Any, in_flight: _InFlight):
        self._packet, self._in_flight = packet, in_flight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def __call__(self, x: Tensor) -> Tensor:
        event = self._in_flight.tensors.pop(x.data_ptr(), None) if type(x) in PLAIN else None
        if event is None:
            return self._packet(x)
        before = now(x.device)
        out = self._packet(x)
        self._in_flight.arrived([event], before)
        return out
