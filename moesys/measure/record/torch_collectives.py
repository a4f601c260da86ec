"""Records the collectives of torch and of other packages: FSDP2, tensor parallelism, pipelining, and users' code.

They bypass `moesys.parallel.comm`. Python code calls the methods of `ProcessGroup`; functional collectives, which
DTensor uses, are operators. Both are replaced inside `record_torch_collectives` alone, so nothing is slower outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.measure.record.collective_bytes import METHODS, Sizes
from moesys.measure.record.cuda_streams import Streams, followed
from moesys.measure.record.functional_collectives import DTENSOR, OPERATORS, StartOperator, WaitOperator
from moesys.measure.record.in_flight import CPU, CUDA, InFlight
from moesys.parallel.comm import now


@contextmanager
def record_torch_collectives(functional: bool = True) -> Iterator[None]:
    """A context in which `comm.record` also gets collectives that bypass `comm`.

    functional: also those that are operators. Set it to False for compiled code, which must see its operators.
    """
    with ExitStack() as stack:
        in_flight = InFlight()
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
                    operator = StartOperator(getattr(packets, name), kind, in_flight)
                    stack.enter_context(_replaced(packets, name, operator))
            waits = torch.ops._c10d_functional
            stack.enter_context(_replaced(waits, "wait_tensor", WaitOperator(waits.wait_tensor, in_flight)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    getattr(owner, name)  # operators are made at their first use
    # Not by getattr: for a C++ class it returns no method.
    old = vars(owner)[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _first(arguments: tuple[Any, ...]) -> Tensor:
    """The first tensor among arguments, which may be in lists."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], (Tensor, list)):
            return _first(tuple(argument))
    return torch.empty(0)


def _method(name: str, kind: str, sizes: Sizes, in_flight: InFlight) -> Callable[..., Any]:
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
            batch.append(event)  # the end of the batch returns the Work
        elif work is None:
            in_flight.arrived([event], begin)  # the stream orders it
        else:
            in_flight.works[work] = [event]
        return work

    return call


def _start_batch(in_flight: InFlight) -> Callable[..., Any]:
    """`_start_coalescing`: NCCL starts a batch of messages at once, as the pipeline does (`batch_isend_irecv`)."""
    original = dist.ProcessGroup._start_coalescing

    def start(group: dist.ProcessGroup, *arguments: Any) -> Any:
        in_flight.batches[group.group_name] = []
        return original(group, *arguments)

    return start


def _end_batch(in_flight: InFlight) -> Callable[..., Any]:
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


def _wait(in_flight: InFlight) -> Callable[..., Any]:
    original = dist.Work.wait

    def wait(work: Any, *arguments: Any, **more: Any) -> Any:
        events = in_flight.works.pop(work, None)
        if not events:
            return original(work, *arguments, **more)
        before = now(CPU if isinstance(events[0].begin, float) else CUDA)
        done = original(work, *arguments, **more)
        in_flight.arrived(events, before)
        return done

    return wait
