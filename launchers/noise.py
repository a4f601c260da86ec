"""Lines that libraries print for their own authors: they stay in logs, and are not shown."""

from __future__ import annotations

import re

from moesys.launchers.follow import Tail

NOISE = re.compile(
    r"\[[IW]\d{4} \d\d:\d\d:\d\d"  # PyTorch's C++ notes and warnings: "[W1127 23:05:05.123 socket.cpp:767] [c10d] …"
    r"|(USDT|STAGE|INFO|WARNING):\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \d+:\d+ "  # Kineto, PyTorch's profiler
    r"|\[Gloo\] Rank \d+ is connected to \d+ peer ranks"
)


class Quiet(Tail):
    """A log of a worker without the lines that are noise."""

    def lines(self) -> list[str]:
        return [line for line in super().lines() if not NOISE.match(line)]

    def last(self) -> list[str]:
        return [line for line in super().last() if not NOISE.match(line)]
