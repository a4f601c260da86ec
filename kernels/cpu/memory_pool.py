"""A pool of memory for large results on CPU, as CUDA's caching allocator on GPU.

The C library returns large blocks to the system as soon as they are free, and gets fresh pages for the next ones. The
system zeroes each page at its first use, which takes several times as long as writing a result into used memory.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import Lock

import torch
from torch import Tensor, UntypedStorage

SMALLEST = 2**18
"""Smallest block of the pool in bytes; the C library keeps smaller blocks itself."""


class Pool:
    """Blocks of memory, each lent to one tensor and its views at a time. It never holds more than was lent at once.

    Any thread may ask for memory or free a tensor. A block is free when only the pool refers to its storage; torch
    counts the references, so that no Python runs when a tensor is freed.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] | None = None
        self.held = self.peak = 0
        self._blocks: dict[int, list[UntypedStorage]] = {}
        self._lock = Lock()

    @property
    def lent(self) -> int:
        """Bytes that tensors use now."""
        return sum(size for size, blocks in self._blocks.items() for block in blocks if not _is_free(block))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`torch.empty` on CPU, in memory of the pool where it is large."""
        elements = prod(shape)
        bytes_ = elements * dtype.itemsize
        if bytes_ < SMALLEST:
            return torch.empty(tuple(shape), dtype=dtype)
        size = _rounded(bytes_)
        if self.events is not None:
            return _noted(self.events, size).view(dtype)[:elements].view(tuple(shape))
        with self._lock:
            return torch.empty(0, dtype=dtype).set_(self._take(size), 0, (elements,), (1,)).view(tuple(shape))

    def _take(self, size: int) -> UntypedStorage:
        """A free block of about `size` bytes, or a new one."""
        for have in sorted(have for have in self._blocks if size <= have <= size * 5 // 4):
            for place, block in enumerate(self._blocks[have]):
                if _is_free(block):
                    if not block.is_shared():
                        return block
                    # Its tensor was moved to where other processes may still look at it.
                    self._forget(have, place)
                    return self._take(size)
        self.peak = max(self.peak, self.lent + size)
        while (excess := self.held + size - self.peak) > 0:
            self._drop(excess)
        block = UntypedStorage(size)
        self._blocks.setdefault(size, []).append(block)
        self.held += size
        return block

    def _drop(self, excess: int) -> None:
        """Return the smallest free block of at least `excess` bytes, or the largest free one, to the system."""
        free = {size: place for size, blocks in self._blocks.items() if (place := _first_free(blocks)) is not None}
        size = min((size for size in free if size >= excess), default=max(free))
        self._forget(size, free[size])

    def _forget(self, size: int, place: int) -> None:
        blocks = self._blocks[size]
        del blocks[place]
        if not blocks:
            del self._blocks[size]
        self.held -= size


def _is_free(block: UntypedStorage) -> bool:
    return torch._C._storage_Use_Count(block._cdata) == 1


def _first_free(blocks: Sequence[UntypedStorage]) -> int | None:
    return next((place for place, block in enumerate(blocks) if _is_free(block)), None)


def _noted(events: list[tuple[int, int]], size: int) -> Tensor:
    """A tensor of `size` bytes outside of the pool, whose allocation and release are noted."""
    owner = (ctypes.c_char * size)()
    _note(events, size)
    # The tensor's storage holds `owner`: it ends with the last view of the tensor.
    weakref.finalize(owner, _note, events, -size).atexit = False
    return torch.frombuffer(owner, dtype=torch.uint8)


def _note(events: list[tuple[int, int]], bytes_: int) -> None:
    events.append((time.time_ns(), bytes_))


def _rounded(size: int) -> int:
    """`size` rounded up by at most a sixteenth of its power of two, so that similar sizes share blocks."""
    step = 1 << (size.bit_length() - 5)
    return -(-size // step) * step


_POOL = Pool()

# A forked process has no threads of its parent: a lock that one of them holds would never be released there.
_held = _POOL._lock
os.register_at_fork(before=_held.acquire, after_in_parent=_held.release, after_in_child=_held.release)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on CPU; large tensors come from the pool."""
    return _POOL.empty(shape, dtype)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on CPU; large tensors come from the pool."""
    return empty(shape, dtype).zero_()


@contextmanager
def recorded() -> Iterator[list[tuple[int, int]]]:
    """Record every large allocation inside, of all threads; results then come from outside of the pool.

    Each entry is (time in nanoseconds since the epoch, bytes); bytes are negative where memory is released.
    """
    before = _POOL.events
    events: list[tuple[int, int]] = []
    _POOL.events = events
    try:
        yield events
    finally:
        _POOL.events = before
