"""Lines that libraries print for their own authors. They stay in logs and are not shown."""

from __future__ import annotations

import re

NOISE = re.compile(
    r"\[[IW]\d{4} \d\d:\d\d:\d\d"  # PyTorch's C++ notes and warnings: "[W1127 23:05:05.123 socket.cpp:767] [c10d] …"
    r"|(USDT|STAGE|INFO|WARNING):\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \d+:\d+ "  # Kineto, PyTorch's profiler
    r"|\[Gloo\] Rank \d+ is connected to \d+ peer ranks"
)


def is_noise(line: str) -> bool:
    """True if a line of a worker's output is of no use to the user."""
    return NOISE.match(line) is not None
