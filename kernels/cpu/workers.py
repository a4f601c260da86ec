"""Worker threads for uneven pieces of work on CPU, one core for each piece.

A product of some hundred rows loses a tenth of its speed when two cores share it: both pack the same matrix and wait
for each other. Pieces that fill the cores evenly run faster on one core each.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock
from typing import TypeVar

import torch

UNEVEN = 1.08
"""Most that the last core may work, in units of the mean; beyond it all cores share the largest pieces."""

LEAST = 2**28
"""Fewest multiply-adds of a piece, on average, for which a thread of its own pays."""

Piece = TypeVar("Piece")
Finish = Callable[[], None]


def each(pieces: Sequence[Piece], sizes: Sequence[int], work: Callable[[Piece], Finish]) -> None:
    """Call `work(piece)()` for all pieces, the largest first.

    `work` runs for several pieces at once, in threads in which torch uses one core. The functions that it returns run
    one at a time and in that order, so that their sums are the same in every run.

    Args:
        sizes: multiply-adds of each piece.
    """
    order = sorted(range(len(pieces)), key=lambda i: -sizes[i])
    threads = torch.get_num_threads()
    large = threads > 1 and sum(sizes) >= LEAST * len(sizes)
    shared = to_share([sizes[i] for i in order], threads) if large else len(order)
    for i in order[:shared]:
        work(pieces[i])()
    turns, inference = _Turns(), torch.is_inference_mode_enabled()

    def run(turn: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            turns.take(turn, work(pieces[order[shared + turn]]))

    if shared < len(order):
        for _ in _threads(threads).map(run, range(len(order) - shared)):
            pass


def to_share(sizes: Sequence[int], threads: int) -> int:
    """Number of first pieces that all threads should share; `sizes` from the largest down.

    It is the least number for which the other pieces, each given to the next free thread, keep all threads busy.
    """
    for shared in range(min(len(sizes), threads) + 1):
        loads = [0] * threads
        for size in sizes[shared:]:
            heapq.heapreplace(loads, loads[0] + size)
        if max(loads) * threads <= UNEVEN * sum(loads):
            return shared
    return len(sizes)


class _Turns:
    """Calls functions one at a time, in the order of their numbers."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._early: dict[int, Finish] = {}
        self._next = 0

    def take(self, turn: int, finish: Finish) -> None:
        with self._lock:
            self._early[turn] = finish
            while self._next in self._early:
                self._early.pop(self._next)()
                self._next += 1


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(number, "moesys-worker", initializer=_use_one_core)
    all_there = Barrier(number)
    for _ in pool.map(lambda _: all_there.wait(), range(number)):
        pass
    # A thread's setting is also the start value of later threads.
    torch.set_num_threads(number)
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # reads the process's number now, not after the line below
    torch.set_num_threads(1)


# A forked process has no threads of its parent.
os.register_at_fork(after_in_child=_threads.cache_clear)
