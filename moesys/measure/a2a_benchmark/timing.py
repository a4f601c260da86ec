"""Times of repeated calls on all ranks. The ranks begin each iteration together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.parallel import comm

Stamp = tuple[comm.Time, comm.Time]
Span = tuple[float, float]


def timed(
    call: Callable[[], object],
    bare: Callable[[], object] | None,
    options: BenchmarkOptions,
    on_host: dist.ProcessGroup,
    offset: float,
    device: torch.device,
) -> tuple[list[Span], list[Span]]:
    """(begin, end) of every iteration of `call`, and of `bare` before and after each, on rank 0's clock. Collective."""
    own: list[Stamp] = []
    plain: list[Stamp] = []
    sides: list[tuple[list[Stamp], Callable[[], object]]] = [(own, call)]
    if bare is not None:
        sides = [(plain, bare), *sides, (plain, bare)]
    together = AlignedStart(device, on_host)
    for number in range(options.warmup + options.iterations):
        for stamps, run_once in sides:
            together.meet()
            begin = comm.now(device)
            run_once()
            stamp = begin, comm.now(device)
            if number >= options.warmup:
                stamps.append(stamp)
    return _seconds(own, offset, device), _seconds(plain, offset, device)


class AlignedStart:
    """Aligns the begin of an iteration on all ranks.

    A barrier of the hosts does not align their GPUs. There the streams meet in an all-reduce of one number. Earlier
    work on
    the stream gives the hosts time to launch the timed call before it begins, so launch time is not measured. (DeepEP's
    benchmarks put a GPU to sleep for that.) The work also empties the cache.
    """

    def __init__(self, device: torch.device, on_host: dist.ProcessGroup):
        self.device, self.on_host = device, on_host
        if device.type == "cuda":
            self.work = torch.empty(2**28, dtype=torch.uint8, device=device)
            self.one = torch.zeros(1, device=device)

    def meet(self) -> None:
        """Return when all ranks are here. Collective over the world."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.on_host)
        if self.device.type == "cuda":
            for _ in range(4):
                self.work.zero_()
            dist.all_reduce(self.one)


def _seconds(stamps: list[Stamp], offset: float, device: torch.device) -> list[Span]:
    """(begin, end) on rank 0's clock; on a GPU from 0, the time at which all streams met."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return [(0.0, comm.between(a, b)) for a, b in stamps]
    return [(a + offset, b + offset) for a, b in stamps if isinstance(a, float) and isinstance(b, float)]
