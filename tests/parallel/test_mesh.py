"""What the process groups of a thousand ranks cost each of them at start."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import ParallelMesh

c10d = dist.distributed_c10d


@contextmanager
def counted(world: int) -> Iterator[Counter[str]]:
    """Inside, this process is one of `world` pretended ranks; counts what making groups does."""
    found: Counter[str] = Counter()

    def counting(name: str, plain):
        def call(*arguments, **more):
            found[name] += 1
            return plain(*arguments, **more)

        return call

    def meeting(x, *arguments, group, **more):
        found[f"all_reduce of {dist.get_world_size(group)}"] += 1

    dist.init_process_group("fake", store=FakeStore(), rank=world // 3, world_size=world)
    try:
        with (
            patch.object(c10d, "_new_process_group_helper", counting("groups", c10d._new_process_group_helper)),
            patch.object(c10d, "_store_based_barrier", counting("world barriers", lambda *_: None)),
            patch.object(dist, "barrier", counting("world barriers", lambda *_: None)),
            patch.object(dist, "all_reduce", meeting),
            warnings.catch_warnings(action="ignore"),
        ):
            yield found
    finally:
        dist.destroy_process_group()


def made(degrees: Degrees) -> Counter[str]:
    with counted(degrees.world) as found:
        ParallelMesh(degrees, torch.device("cpu"), 60.0)
    return found


@pytest.mark.parametrize("world", [256, 1024])
def test_no_rank_waits_for_the_world_for_each_group(world):
    """A rank meets its own groups alone, once each: all pp, dp, tp, ep and what is flattened of them."""
    shard = world // 64
    found = made(Degrees(pp=8, dp_shard=shard, tp=8, ep=32, edp_shard=world // 256))
    assert found["world barriers"] == 0
    # pp and tp are axes of 8.
    expected = {"all_reduce of 8": 2, f"all_reduce of {shard}": 1, "all_reduce of 32": 1}
    if world > 256:
        expected[f"all_reduce of {world // 256}"] = 1
    meetings = {name: count for name, count in found.items() if name.startswith("all_reduce")}
    assert meetings == expected


def test_making_groups_grows_with_the_ranks_and_not_with_their_square():
    few, many = (made(Degrees(pp=8, dp_shard=w // 64, tp=8, ep=32, edp_shard=w // 256))["groups"] for w in (256, 1024))
    assert many <= 4 * few + 16 and many < 6 * 1024
