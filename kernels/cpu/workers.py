"""Work of uneven pieces on CPU, each piece on one core.

A product of some hundred rows loses a tenth of its speed when two cores share it: they pack the same matrix
and wait for each other. Pieces that fill the cores evenly are better done by one core each.
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
"""How much longer than their share the last core may work before the largest pieces are shared instead."""

LEAST = 2**28
"""Multiply-adds of a piece, on average, from which on handing it to a thread costs less than it saves."""

Piece = TypeVar("Piece")
Finish = Callable[[], None]


def each(pieces: Sequence[Piece], sizes: Sequence[int], work: Callable[[Piece], Finish]) -> None:
    """`work(piece)()` of all pieces, the largest first.

    What `work` returns is called for one piece at a time and in that order, so that sums it adds to are
    the same in every run; `work` itself runs for several at once, in threads in which torch uses one core.

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
    """How many of the first pieces all threads should work at together; `sizes` from the largest down.

    So many that the others, handed to whichever thread is free first, keep all threads busy to the end.
    """
    for shared in range(min(len(sizes), threads) + 1):
        loads = [0] * threads
        for size in sizes[shared:]:
            heapq.heapreplace(loads, loads[0] + size)
        if max(loads) * threads <= UNEVEN * sum(loads):
            return shared
    return len(sizes)


class _Turns:
    """Calls what is handed in one after another, by its number."""

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
    # What a thread sets is also what threads that begin later start with.
    torch.set_num_threads(number)
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # a thread takes the process's number at its first use: not after what is set here
    torch.set_num_threads(1)


# A fork has none of its parent's threads.
os.register_at_fork(after_in_child=_threads.cache_clear)
