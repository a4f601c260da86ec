"""Runs the benchmark of collectives on all ranks, in the manner of nccl-tests. Collective over the world.

Every iteration begins with a barrier, which is not timed. A rank's time is from its begin to its end. On one clock for
all ranks it divides into *wait*, until the last rank of its group began, and *transfer*. GPUs share no clock: their
streams meet in an all-reduce first, and a rank's time is the duration between two events.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.measure.a2a_benchmark.collective import CollectiveCase
from moesys.measure.a2a_benchmark.dispatch import DispatchCase
from moesys.measure.a2a_benchmark.groups import groups
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.result import CollectiveResult
from moesys.measure.record import clocks
from moesys.parallel.mesh import ParallelMesh


def run(
    config: Config,
    mesh: ParallelMesh,
    options: BenchmarkOptions,
    nodes: list[str],
    tell: Callable[[CollectiveResult], None],
) -> list[CollectiveResult]:
    """Measure every case; returns all results on rank 0, else none. Rank 0 calls `tell` with each result."""
    on_host = dist.group.WORLD if mesh.device.type == "cpu" else dist.new_group(backend="gloo")
    assert on_host is not None
    offset, results = clocks.offset(on_host), []
    for group in groups(mesh, options.groups, nodes):
        for kind, dtype in ((k, d) for k in _kinds(options) for d in options.dtypes):
            for size in options.sizes():
                if not _fits(size, mesh.device, on_host, len(nodes) // len(set(nodes))):
                    break
                case = CollectiveCase(kind, group, size, getattr(torch, dtype), mesh.device, options)
                result = case.measure(on_host, offset, nodes)
                if result is not None:
                    tell(result)
                    results.append(result)
    for kind in options.dispatch:
        for dtype in options.dtypes:
            dispatching = DispatchCase(kind, config, mesh, getattr(torch, dtype), options)
            result = dispatching.measure(on_host, offset, nodes)
            if result is not None:
                tell(result)
                results.append(result)
    return results


def _kinds(options: BenchmarkOptions) -> list[str]:
    uneven = options.skew is not None or options.matrix is not None
    return [*options.kinds, *(["all_to_all_uneven"] if uneven and "all_to_all" in options.kinds else [])]


def _fits(size: int, device: torch.device, on_host: dist.ProcessGroup, neighbours: int) -> bool:
    """Whether every rank has memory for an input and an output of `size` bytes, and for copies."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // neighbours
    enough = torch.tensor([float(free > 6 * size)])
    dist.all_reduce(enough, dist.ReduceOp.MIN, group=on_host)
    return bool(enough.item())
