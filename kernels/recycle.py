"""Memory for large results on CPU that is used again, as CUDA's caching allocator does on GPU.

The C library gives large blocks back to the system as soon as they are free, and gets fresh pages for the
next ones: at the first touch of each page it is zeroed, which takes several times as long as writing a
result into memory that is there.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import Lock

import torch
from torch import Tensor

SMALLEST = 2**18
"""Bytes from which on memory is kept: less than this the C library keeps itself."""


class Pool:
    """Blocks of memory, each lent to one tensor at a time. Never holds more than was lent at once.

    Any thread may ask, and any thread may drop a tensor last.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] | None = None
        self.lent = self.kept = self.peak = 0
        self._free: dict[int, list[Tensor]] = {}
        # Dropping a tensor can happen anywhere, inside `_take` too: it must not wait for the lock.
        self._returned: deque[Tensor] = deque()
        self._lock = Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`torch.empty` on CPU, in memory of the pool where it is large."""
        elements = prod(shape)
        bytes_ = elements * dtype.itemsize
        if bytes_ < SMALLEST:
            return torch.empty(tuple(shape), dtype=dtype)
        size = _rounded(bytes_)
        # The tensor's storage holds `owner`: when the last view of it is gone, the block comes back.
        if self.events is None:
            block = self._take(size)
            owner = (ctypes.c_char * len(block)).from_address(block.data_ptr())
            weakref.finalize(owner, self._returned.append, block).atexit = False
        else:
            owner = (ctypes.c_char * size)()
            _note(self.events, size)
            weakref.finalize(owner, _note, self.events, -size).atexit = False
        return torch.frombuffer(owner, dtype=dtype, count=elements).view(tuple(shape))

    def _take(self, size: int) -> Tensor:
        with self._lock:
            while self._returned:
                block = self._returned.popleft()
                self._free.setdefault(len(block), []).append(block)
                self.lent -= len(block)
                self.kept += len(block)
            fitting = self._smallest(size)
            if fitting is not None and fitting <= size * 5 // 4:
                self._lend(fitting)
                return self._pop(fitting)
            self._lend(size)
            while (excess := self.lent + self.kept - self.peak) > 0:
                fitting = self._smallest(excess)
                self._pop(max(self._free) if fitting is None else fitting)
        return torch.empty(size, dtype=torch.uint8)

    def _lend(self, size: int) -> None:
        self.lent += size
        self.peak = max(self.peak, self.lent)

    def _smallest(self, size: int) -> int | None:
        """Size of the smallest free block of at least `size`."""
        return min((have for have in self._free if have >= size), default=None)

    def _pop(self, size: int) -> Tensor:
        blocks = self._free[size]
        block = blocks.pop()
        if not blocks:
            del self._free[size]
        self.kept -= size
        return block


def _note(events: list[tuple[int, int]], bytes_: int) -> None:
    events.append((time.time_ns(), bytes_))


def _rounded(size: int) -> int:
    """Up to a sixteenth of its power of two more, so that sizes that differ little share blocks."""
    step = 1 << (size.bit_length() - 5)
    return -(-size // step) * step


_POOL = Pool()

# A fork has none of its parent's threads, so that a lock which one of them holds would stay held in it.
_held = _POOL._lock
os.register_at_fork(before=_held.acquire, after_in_parent=_held.release, after_in_child=_held.release)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on CPU, in memory that earlier large tensors have left."""
    return _POOL.empty(shape, dtype)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on CPU, in memory that earlier large tensors have left."""
    return empty(shape, dtype).zero_()


@contextmanager
def recorded() -> Iterator[list[tuple[int, int]]]:
    """Within, large results have memory of their own, noted in the list, whichever thread asks for it.

    Each entry is the time in nanoseconds since the epoch, and the bytes: negative where they are given back.
    """
    before = _POOL.events
    events: list[tuple[int, int]] = []
    _POOL.events = events
    try:
        yield events
    finally:
        _POOL.events = before
