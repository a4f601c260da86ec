"""Keeps the communication of processes on this machine."""

from __future__ import annotations

import os
import sys

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""Variables for workers of one machine: their libraries then listen on the loopback interface alone. By default gloo
looks up the host's name, which may resolve to any address, and NCCL takes any other interface."""


def stay_here() -> None:
    """Let this process and its children communicate on this machine alone, and keep torch's hints off the terminal.

    Proofs and benchmarks call it before their processes connect. Variables that are set already stay.
    """
    for key, value in (LOOPBACK | {"TORCH_CPP_LOG_LEVEL": "ERROR"}).items():
        os.environ.setdefault(key, value)
