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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import Lock

import torch
from torch import Tensor, UntypedStorage

SMALLEST = 2**18
"""Bytes from which on memory is kept: less than this the C library keeps itself."""


class Pool:
    """Blocks of memory, each lent to one tensor and its views at a time. Never holds more than was lent at once.

    Any thread may ask, and any thread may drop a tensor last: a block is free when nothing but the pool refers
    to its storage, which torch counts, so that no Python runs where a tensor ends.
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
        """Give back the smallest free block of at least `excess` bytes, or the largest that there is."""
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
    """Bytes of memory of their own, whose begin and end are noted."""
    owner = (ctypes.c_char * size)()
    _note(events, size)
    # The tensor's storage holds `owner`: it ends with the last view of the tensor.
    weakref.finalize(owner, _note, events, -size).atexit = False
    return torch.frombuffer(owner, dtype=torch.uint8)


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
