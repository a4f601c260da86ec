"""Times several steps in turn, many times, and compares them round by round: fair on a noisy machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from moesys.data.progress import Progress

Step = Callable[[], object]
Timer = Callable[[Step], float]
"""Runs a step and returns its seconds."""

BUDGET_S = 60.0
"""Seconds of all rounds together, if their number is free."""

FEWEST, MOST = 3, 31
"""Least and most rounds, if their number is free."""

SLOW_S = 1.0
"""A step that takes longer is warm after one run."""


def interleave(
    sides: Mapping[str, Step],
    rounds: int | None,
    timer: Timer,
    warmup: int = 2,
    what: str = "",
    optional: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of every side in every round. Each round runs each side once; the order alternates.

    Args:
        rounds: number of rounds; None for as many as fit into `BUDGET_S` seconds, within limits.
        warmup: most runs of each side before the first round.
        what: name of the work in its line of progress; "" for no line.
        optional: sides that are left out if their first run finds too little memory on the device.
    """
    taken = _first(sides, timer, optional)
    names = list(taken)
    for _ in range(warmup - 1):
        taken |= {name: timer(sides[name]) for name in names if taken[name] < SLOW_S}
    number = affordable(sum(taken.values())) if rounds is None else rounds
    progress = Progress(what, number * len(names)) if what else None
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(number):
        for name in names if turn % 2 else reversed(names):
            seconds[name].append(timer(sides[name]))
            if progress:
                progress.advance(1)
    if progress:
        progress.finish()
    return seconds


def _first(sides: Mapping[str, Step], timer: Timer, optional: Collection[str]) -> dict[str, float]:
    """Seconds of every side's first run, without optional sides that do not fit."""
    taken: dict[str, float] = {}
    for name, step in sides.items():
        try:
            taken[name] = timer(step)
        except torch.OutOfMemoryError:
            if name not in optional:
                raise
    return taken


def affordable(round_s: float) -> int:
    """The number of rounds of `round_s` seconds to run."""
    return max(FEWEST, min(MOST, int(BUDGET_S / max(round_s, 1e-9))))


def alone(device: torch.device) -> Timer:
    """A timer of this process's work on `device`."""
    return _on_gpu if device.type == "cuda" else _on_host


def slowest(step: Step) -> float:
    """Seconds of the slowest process, on CPUs. All processes begin together. Collective."""
    dist.barrier()
    taken = torch.tensor(_on_host(step), dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def _on_host(step: Step) -> float:
    begin = perf_counter()
    step()
    return perf_counter() - begin


def _on_gpu(step: Step) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Median over rounds of `over` / `under`. A disturbance of one round affects both."""
    return median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
