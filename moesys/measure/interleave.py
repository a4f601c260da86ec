"""Timing several things side by side on a noisy machine: in turn, many times, compared round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import torch

Step = Callable[[], object]


def interleave(sides: Mapping[str, Step], rounds: int, device: torch.device, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every side in every round; in each round each side runs once, the order alternating."""
    names = list(sides)
    for _ in range(warmup):
        for name in names:
            sides[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            seconds[name].append(_time(sides[name], device))
    return seconds


def _time(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        begin = perf_counter()
        step()
        return perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize(device)
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1]) / 1e3


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Median over the rounds of `over` / `under`: what the machine does to one round it does to both."""
    return median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
