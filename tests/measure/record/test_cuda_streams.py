"""Waits of a GPU's computing stream, on a simulated GPU: streams, events, and NCCL as in torch.

No GPU is needed. Every stream has a time until which it is busy; an event copies it, a wait moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesys.measure.explain.intervals import length, union
from moesys.measure.record.torch_collectives import record_torch_collectives
from moesys.parallel import comm
from moesys.parallel.comm import CollectiveRecord


class Stream:
    device_index = 0

    def __init__(self, number: int):
        self.stream_id, self.time = number, 0.0

    def record_event(self) -> Marker:
        marker = torch.cuda.Event()
        marker.record(self)
        return marker

    def wait_event(self, marker: Marker) -> None:
        marker.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())


class Marker:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = (torch.cuda.current_stream() if stream is None else stream).time

    def wait(self, stream: Any = None) -> None:
        stream = torch.cuda.current_stream() if stream is None else stream
        stream.time = max(stream.time, self.at)

    def elapsed_time(self, later: Marker) -> float:
        return (later.at - self.at) * 1e3


class Work(dist.Work):
    """A stream waits for it, not the host."""

    done = 0.0


class Gpu:
    """Streams, one of them current, and NCCL, which works on its own. All durations are given."""

    def __init__(self) -> None:
        self.compute, self.nccl = Stream(0), Stream(100)
        self.current = self.compute
        self.seconds = 0.0
        self.waited: list[tuple[float, float]] = []

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        outer, self.current = self.current, stream
        yield
        self.current = outer

    def start(self, *_: Any, **__: Any) -> Work:
        """A collective: it begins when the current stream gets here and those before it are done."""
        self.nccl.time = max(self.nccl.time, self.current.time) + self.seconds
        work = Work()
        work.done = self.nccl.time
        return work

    def wait(self, work: Work, *_: Any) -> bool:
        self.current.time = max(self.current.time, work.done)
        return True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    made = Gpu()
    for name, value in {
        "Event": Marker, "current_stream": lambda: made.current, "is_available": lambda: True,
        "is_initialized": lambda: True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    for name in ("all_gather_single", "_allgather_base", "allreduce", "send", "recv"):
        if hasattr(dist.ProcessGroup, name):
            monkeypatch.setattr(dist.ProcessGroup, name, made.start)
    monkeypatch.setattr(dist.ProcessGroup, "_get_backend", lambda *_: SimpleNamespace(supports_coalescing=True))
    monkeypatch.setattr(dist.ProcessGroup, "_start_coalescing", lambda *_: None)
    monkeypatch.setattr(dist.ProcessGroup, "_end_coalescing", made.start)
    monkeypatch.setattr(dist.Work, "wait", lambda work, *a: made.wait(work, *a))
    yield made
    dist.destroy_process_group()


with FakeTensorMode():
    ROWS = torch.empty(8, device="cuda")


def tensor() -> torch.Tensor:
    return ROWS


def seconds(event: CollectiveRecord) -> tuple[float, float, float]:
    """The times of its begin, of its need, and of its result."""
    return event.begin.at, event.waited.at, event.end.at  # type: ignore[union-attr]


def gather(gpu: Gpu, stream: Stream, duration: float) -> Marker:
    """FSDP2's gathering of weights: a stream of its own waits, and an event says when they are there."""
    gpu.seconds = duration
    with gpu.on(stream):
        dist.all_reduce(tensor())  # which, as FSDP's all-gather, waits inside if it is not asynchronous
        return stream.record_event()


def test_a_prefetched_gather_costs_only_what_the_computation_waits(gpu: Gpu) -> None:
    side = Stream(1)
    with record_torch_collectives(), comm.record() as events:
        hidden = gather(gpu, side, 5.0)
        gpu.compute.time += 8.0
        gpu.compute.wait_event(hidden)
        late = gather(gpu, side, 5.0)
        gpu.compute.time += 2.0
        gpu.compute.wait_event(late)
        side.wait_stream(gpu.compute)
        never = gather(gpu, side, 5.0)
    first, second, third = events
    assert (first.exposed, second.exposed, third.exposed) == (0.0, pytest.approx(0.0), 0.0)
    assert seconds(first) == (0.0, 8.0, 8.0)
    assert seconds(second) == (5.0, 10.0, 10.0)  # began where its stream was, five seconds before it was there
    assert seconds(third) == (10.0, 15.0, 15.0)
    assert never.at == 15.0


def test_what_the_computation_waits_for_is_exposed_from_its_own_wait_on(gpu: Gpu) -> None:
    side, other = Stream(1), Stream(2)
    with record_torch_collectives(), comm.record() as events:
        gathered = gather(gpu, side, 5.0)
        other.wait_event(gathered)  # through a second stream, as copies out of a buffer
        gpu.compute.time += 2.0
        gpu.compute.wait_stream(other)
        gpu.compute.wait_event(gathered)  # once more: nothing is left of it
    (event,) = events
    assert seconds(event) == (0.0, 2.0, 5.0)
    assert event.exposed == pytest.approx(3.0)


def test_an_event_stands_for_what_was_before_it(gpu: Gpu) -> None:
    side = Stream(1)
    with record_torch_collectives(), comm.record() as events:
        gather(gpu, side, 1.0)
        early = side.record_event()
        late = gather(gpu, side, 9.0)
        gpu.compute.wait_event(early)
        assert [e.exposed for e in events] == [pytest.approx(1.0), 0.0]
        gpu.compute.wait_event(late)
    assert [e.exposed for e in events] == [pytest.approx(1.0), pytest.approx(9.0)]


def test_messages_that_are_started_together_are_seen(gpu: Gpu) -> None:
    """torch's `batch_isend_irecv` on NCCL: one object waits for all messages."""
    gpu.seconds = 4.0
    with record_torch_collectives(), comm.record() as events:
        ops = [dist.P2POp(dist.isend, tensor(), 1), dist.P2POp(dist.irecv, tensor(), 1)]
        works = dist.batch_isend_irecv(ops)
        gpu.compute.time += 1.0
        for work in works:
            work.wait()
        dist.all_reduce(tensor())  # after the batch it is as before
    assert [(e.kind, e.ranks) for e in events] == [("send", (0, 1)), ("recv", (1, 0)), ("all_reduce", (0, 1))]
    assert [e.exposed for e in events[:2]] == [pytest.approx(events[0].waited.elapsed_time(events[0].end) / 1e3)] * 2
    assert events[0].exposed > 0
    assert events[2].exposed == pytest.approx(4.0)


def test_what_ends_in_the_order_of_its_stream_has_nobody_to_wait(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL returns no Work for a synchronous collective: its stream goes on after it."""

    def at_once(*_: Any, **__: Any) -> None:
        gpu.current.time += 3.0

    monkeypatch.setattr(dist.ProcessGroup, "allreduce", at_once)
    with record_torch_collectives(), comm.record() as events:
        dist.all_reduce(tensor())
        side = Stream(1)
        marker = gather(gpu, side, 0.0)
        gpu.compute.wait_event(marker)
    assert [e.exposed for e in events] == [pytest.approx(3.0), 0.0]


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(("compute", "gather", "await", "chain", "here")), st.integers(0, 2), st.integers(0, 5)),
    max_size=25,
)


@settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PROGRAMS)
def test_exposed_seconds_are_those_in_which_the_computing_stream_stood(
    gpu: Gpu, program: list[tuple[str, int, int]]
) -> None:
    """For any gathers and any waiting streams: exactly the seconds in which the computing stream stood still."""
    gpu.__init__()  # type: ignore[misc]
    streams = [Stream(i + 1) for i in range(3)]
    stood = 0.0

    def stand(wait: Callable[[], Any]) -> float:
        before = gpu.compute.time
        wait()
        return gpu.compute.time - before

    with record_torch_collectives(), comm.record() as events:
        for what, number, duration in program:
            stream = streams[number]
            if what == "compute":
                gpu.compute.time += duration
            elif what == "gather":
                gather(gpu, stream, float(duration))
            elif what == "await":
                stood += stand(lambda stream=stream: gpu.compute.wait_stream(stream))
            elif what == "chain":
                streams[(number + 1) % 3].wait_stream(stream)
            else:
                gpu.seconds = float(duration)
                stood += stand(lambda: dist.all_reduce(tensor()))
    spans = union((e.waited.at, e.end.at) for e in events if e.waited.at != e.end.at)
    assert length(spans) == pytest.approx(stood)
    assert all(max(e.begin.at, e.waited.at) <= e.end.at for e in events)


def test_events_are_as_before_outside(gpu: Gpu) -> None:
    before = Marker.record, Marker.wait
    with record_torch_collectives():
        assert Marker.record is not before[0]
    assert (Marker.record, Marker.wait) == before
