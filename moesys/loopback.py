"""Processes that talk to each other on this machine alone."""

from __future__ import annotations

import os
import sys

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""For workers of one machine: their libraries listen where other machines do not reach. gloo else looks the
host's name up, and where that leads is anybody's guess; NCCL takes any interface but this one."""


def stay_here() -> None:
    """Let this process and its children talk on this machine alone, and keep torch's hints off the terminal.

    For processes that the terminal shows, of proofs and benchmarks; to be called before they connect. What the
    caller has set stays.
    """
    for key, value in (LOOPBACK | {"TORCH_CPP_LOG_LEVEL": "ERROR"}).items():
        os.environ.setdefault(key, value)
