"""Clock offsets between hosts: seconds from each host's clock to rank 0's."""

from __future__ import annotations

import socket
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

ROUNDS = 20
"""Questions to each host's clock. The fastest answer counts."""


def host_clock() -> str:
    """A name that processes share if they share a clock: this machine since its last boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def offset(group: dist.ProcessGroup) -> float:
    """Seconds to add to this process's `perf_counter` to get rank 0's. Collective; `group` is the world on CPU.

    Hosts answer to rank 0 one after another, and the error is at most half of the fastest round trip
    (Cristian, "Probabilistic clock synchronization", 1989). Processes of rank 0's host are at 0.
    """
    rank = dist.get_rank()
    clocks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(clocks, host_clock(), group=group)
    leaders = {clock: clocks.index(clock) for clock in clocks}
    mine = torch.zeros(1, dtype=torch.float64)
    for clock, leader in leaders.items():
        if clock != clocks[0] and rank in (0, leader):
            _compare(mine, leader, group)
    dist.all_gather(found := [torch.zeros_like(mine) for _ in clocks], mine, group=group)
    return found[leaders[clocks[rank]]].item()


def _compare(mine: torch.Tensor, leader: int, group: dist.ProcessGroup) -> None:
    """Rank 0 answers with its time. `leader` writes the difference of the fastest answer to `mine` [1]."""
    answer, best = torch.zeros(1, dtype=torch.float64), float("inf")
    for _ in range(ROUNDS):
        if dist.get_rank() == 0:
            dist.recv(answer, leader, group=group)
            dist.send(torch.tensor([perf_counter()], dtype=torch.float64), leader, group=group)
            continue
        asked_at = perf_counter()
        dist.send(answer, 0, group=group)
        dist.recv(answer, 0, group=group)
        answered_at = perf_counter()
        if answered_at - asked_at < best:
            best = answered_at - asked_at
            mine[0] = answer.item() - (asked_at + answered_at) / 2
