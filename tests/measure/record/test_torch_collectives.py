"""Bytes of collectives as nccl-tests counts them, and their purposes, on one of four ranks.

The backend "fake" takes every call and moves nothing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesys.measure.record.collective_bytes import METHODS
from moesys.measure.record.functional_collectives import OPERATORS
from moesys.measure.record.purpose import purpose_of, purposes
from moesys.measure.record.torch_collectives import record_torch_collectives
from moesys.parallel import comm
from moesys.parallel.comm import CONTEXT, GRADIENTS, STEP, UNTAGGED, CollectiveRecord, Tag
from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import ParallelMesh

N = 4
SIZE = 32
"""Bytes of `part()`: what a rank has of its own; S of nccl-tests is of all ranks, N · SIZE, where parts differ."""


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=N)
    assert dist.group.WORLD is not None
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def part(rows: int = 8) -> torch.Tensor:
    return torch.zeros(rows)


def whole() -> torch.Tensor:
    return part(8 * N)


Call = Callable[[dist.ProcessGroup], Any]

OWN: dict[str, tuple[Call, str, int]] = {
    "start_all_to_all": (lambda g: comm.start_all_to_all(whole(), [1, 2, 13, 16], [8] * N, g), "all_to_all", N * SIZE),
    "start_all_to_all_counts": (lambda g: comm.start_all_to_all_counts(part(N), g), "all_to_all_counts", N * 4),
    "start_all_gather": (lambda g: comm.start_all_gather(part(), g), "all_gather", N * SIZE),
    "start_reduce_scatter": (lambda g: comm.start_reduce_scatter(whole(), g), "reduce_scatter", N * SIZE),
    "all_gather": (lambda g: comm.all_gather(part(), g), "all_gather", N * SIZE),
    "start_all_reduce": (lambda g: comm.start_all_reduce(part(), g), "all_reduce", SIZE),
    "all_reduce": (lambda g: comm.all_reduce(part(), g), "all_reduce", SIZE),
}
"""Every collective of `comm`: a call, its kind, and S of nccl-tests."""

OTHERS: dict[str, tuple[Call, str, int]] = {
    "all_reduce": (lambda g: dist.all_reduce(part(), group=g), "all_reduce", SIZE),
    "broadcast": (lambda g: dist.broadcast(part(), 0, group=g), "broadcast", SIZE),
    "reduce": (lambda g: dist.reduce(part(), 0, group=g), "reduce", SIZE),
    "all_gather": (lambda g: dist.all_gather([part() for _ in range(N)], part(), group=g), "all_gather", N * SIZE),
    "reduce_scatter": (
        lambda g: dist.reduce_scatter(part(), [part() for _ in range(N)], group=g), "reduce_scatter", N * SIZE,
    ),
    "gather elsewhere": (lambda g: dist.gather(part(), None, 0, group=g), "gather", N * SIZE),
    "gather here": (lambda g: dist.gather(part(), [part() for _ in range(N)], 1, group=g), "gather", N * SIZE),
    "scatter elsewhere": (lambda g: dist.scatter(part(), None, 0, group=g), "scatter", N * SIZE),
    "scatter here": (lambda g: dist.scatter(part(), [part() for _ in range(N)], 1, group=g), "scatter", N * SIZE),
    "all_to_all": (
        lambda g: dist.all_to_all([part() for _ in range(N)], [part() for _ in range(N)], group=g),
        "all_to_all", N * SIZE,
    ),
    "all_to_all_single": (lambda g: dist.all_to_all_single(whole(), whole(), group=g), "all_to_all", N * SIZE),
    "send": (lambda g: dist.send(part(), 0, group=g), "send", SIZE),
    "recv": (lambda g: dist.recv(part(), 0, group=g), "recv", SIZE),
    "functional all_reduce": (lambda g: functional.all_reduce(part(), "sum", g).wait(), "all_reduce", SIZE),
    "functional all_reduce_coalesced": (
        lambda g: tuple(x.wait() for x in functional.all_reduce_coalesced([part(), part()], "sum", g)), "all_reduce",
        2 * SIZE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
def test_bytes_are_s_of_nccl_tests(world: dist.ProcessGroup, name: str) -> None:
    call, kind, size = (OWN | OTHERS)[name]
    with record_torch_collectives(), comm.record() as events:
        found = call(world)
        if isinstance(found, comm.Work):
            found.wait()
    (event,) = events
    assert (event.kind, event.bytes) == (kind, size)
    assert sum(event.sent) in (0, event.bytes)


def test_every_collective_of_comm_is_among_them() -> None:
    functions = [f for f in vars(comm).values() if isinstance(f, FunctionType) and f.__module__ == comm.__name__]
    takes = [f.__name__ for f in functions if "group" in inspect.signature(f).parameters and f.__name__[0] != "_"]
    assert set(takes) == set(OWN)


class Group:
    """The part of a process group that sizes depend on."""

    def size(self) -> int:
        return N


PART, WHOLE = torch.zeros(8), torch.zeros(8 * N)
PARTS = [PART] * N


@pytest.mark.parametrize(
    ("method", "arguments", "size", "sent"),
    [
        # Methods that torch's own functions call, by their names in some version or only where several are one.
        ("allreduce_coalesced", ([PART, PART],), 64, ()),
        ("_allgather_base", (WHOLE, PART), 128, ()),
        ("all_gather_single", (WHOLE, PART), 128, ()),
        ("allgather_into_tensor_coalesced", ([WHOLE, WHOLE], [PART, PART]), 256, ()),
        ("_reduce_scatter_base", (PART, WHOLE), 128, ()),
        ("reduce_scatter_tensor_coalesced", ([PART], [WHOLE]), 128, ()),
        # What goes to each rank is known.
        ("alltoall_base", (WHOLE, WHOLE, [], []), 128, (32,) * N),
        ("alltoall_base", (torch.zeros(8), WHOLE, [2] * N, [1, 2, 13, 16]), 128, (4, 8, 52, 64)),
        ("alltoall", (PARTS, [PART, PART[:1], PART[:0], PART]), 68, (32, 4, 0, 32)),
    ],
)
def test_bytes_of_methods(method: str, arguments: tuple[Any, ...], size: int, sent: tuple[int, ...]) -> None:
    _, sizes = METHODS[method]
    assert sizes(Group(), *arguments) == (size, sent)


def test_every_functional_collective_is_recorded() -> None:
    """All operators that torch's own functions call, except those for messages."""
    called = set(re.findall(r"torch\.ops\._c10d_functional\.(\w+)", inspect.getsource(functional)))
    assert called - set(OPERATORS) <= {"wait_tensor", "isend", "irecv", "batch_p2p_ops"}


def test_a_resharding_of_dtensor_is_told_as_tensor_parallelism_over_whatever_group(world: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (N,))  # one axis over all ranks: the world's own group
    x = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False)
    with record_torch_collectives(), comm.record() as events:
        x.redistribute(placements=[Replicate()])
    assert [e.group for e in events] == [world.group_name]
    assert [purpose_of(e, {world.group_name: ("data", "tensor")}) for e in events] == ["tensor"]


def test_gathered_weights_are_data_parallelism_over_whatever_group(world: dist.ProcessGroup) -> None:
    from torch.distributed.fsdp import fully_shard

    module = fully_shard(torch.nn.Linear(8, 8, bias=False), mesh=init_device_mesh("cpu", (N,)))
    with record_torch_collectives(), comm.record() as events:
        module(torch.ones(2, 8)).sum().backward()
    assert {e.kind for e in events} == {"all_gather", "reduce_scatter"}
    assert {purpose_of(e, {world.group_name: ("tensor", "data")}) for e in events} == {"data"}


SPANS = {
    "tp": (Degrees(tp=N, edp_replicate=N), ("tensor", "data")),
    "cp": (Degrees(cp=N, edp_replicate=N), ("data", "context")),
    "cp and sharded data": (Degrees(dp_shard=2, cp=2, ep=N), ("data",)),
    "ep": (Degrees(dp_replicate=N, ep=N), ("data",)),
    "pp": (Degrees(pp=N), ("pipeline",)),
}
"""Degrees whose axes span the world, and what its own group, or one of the same ranks, then serves."""


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported")
@pytest.mark.parametrize("name", SPANS)
def test_an_axis_that_spans_the_world_keeps_its_purpose(world: dist.ProcessGroup, name: str) -> None:
    degrees, served = SPANS[name]
    mesh = ParallelMesh(degrees, torch.device("cpu"), 60.0)
    groups = purposes(mesh)
    wide = [n for _, g in mesh.groups() if g.size() == N for n in [g.group_name] if n in groups]
    assert {purpose for n in wide for purpose in groups[n]} == set(served)

    def purpose_found(tag: Tag = UNTAGGED, kind: str = "all_reduce", by: str = "", group: str = wide[0]) -> str:
        return purpose_of(CollectiveRecord(kind, 1, 0.0, 0.0, 0.0, tag, group, by=by), groups)

    for group in wide:
        assert purpose_found(STEP, group=group) == "step"
        assert purpose_found(Tag("flat", "layers.0", "dispatch"), "all_to_all", group=group) == "expert"
        assert purpose_found(CONTEXT.for_backward(), "reduce_scatter", group=group) == "context"
        assert purpose_found(GRADIENTS, group=group) == ("pipeline" if served == ("pipeline",) else "data")
        assert purpose_found(by="data", group=group) == "data"
        assert purpose_found(by="tensor", group=group) == "tensor"
        assert purpose_found(by="step", group=group) == "step"
        assert purpose_found(kind="send", group=group) == "pipeline"
    # Where nobody says it: not data, which always says so, if the group serves something else as well.
    assert purpose_found() == next(p for p in watch_order() if p in groups[wide[0]])


def watch_order() -> tuple[str, ...]:
    from moesys.measure.record.purpose import SPECIFIC

    return SPECIFIC


def test_what_the_trainer_itself_shares_is_the_steps(world: dist.ProcessGroup) -> None:
    from moesys.measure.record.purpose import starter

    source = "def call(f):\n    return f()\n"
    trainer: dict[str, Any] = {"__name__": "moesys.train.guard"}
    exec(source, trainer)
    assert starter() is None
    assert trainer["call"](starter) == "step"
    fsdp: dict[str, Any] = {"__name__": "torch.distributed.fsdp._fully_shard"}
    exec(source, fsdp)
    assert trainer["call"](lambda: fsdp["call"](starter)) == "data"  # the innermost one


def test_nothing_is_replaced_outside(world: dist.ProcessGroup) -> None:
    before = dist.ProcessGroup.allreduce, dist.Work.wait, torch.ops._c10d_functional.all_reduce
    with record_torch_collectives():
        assert dist.ProcessGroup.allreduce is not before[0]
    assert (dist.ProcessGroup.allreduce, dist.Work.wait, torch.ops._c10d_functional.all_reduce) == before
