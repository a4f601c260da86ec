"""Slices of random tensors, drawn without the rest of the tensor.

torch fills a float32 tensor of n ≥ 16 numbers on the CPU in blocks: word i of the generator belongs to element i, and
16 words make 16 normal numbers. If 16 does not divide n, 16 further words replace the last 16 elements. So a generator
that is moved to the first word of a block draws the elements from there on.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from moesys.parallel import jump

BLOCK = 16
"""Elements that torch makes at once."""

CHUNK = 2**20
"""Most elements that are drawn beside the slice (4 MiB), unless one row has more."""

FAR = 2**22
"""Number of elements from which a jump (15 ms) is faster than drawing."""


class Normals:
    """The tensor `torch.empty(shape).normal_(0, std)` of a generator seeded by `key`, of which parts are drawn."""

    def __init__(self, shape: tuple[int, ...], key: str, std: float):
        self.shape, self.std, self.size = shape, std, prod(shape)
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        self.seed = int.from_bytes(digest, "little") >> 1

    def whole(self) -> Tensor:
        """All of it, as torch draws it."""
        return torch.empty(self.shape).normal_(0.0, self.std, generator=self._generator())

    def part(self, slices: tuple[slice, ...]) -> Tensor:
        """`whole()[slices]`, float32, bit for bit; slices of step 1, one for each dim at most.

        Rows (dim 0) before and behind it are not drawn; of the rows in between a chunk at a time is held.
        """
        if self.size < BLOCK or not slices:
            return self.whole()[slices]
        rows, *others = (s.indices(n)[:2] for s, n in zip(slices, self.shape, strict=False))
        inner = tuple(slice(*bounds) for bounds in others)
        width, (begin, end) = self.size // self.shape[0], rows
        out: Tensor | None = None
        drawn = _Drawn(self)
        step = max(1, CHUNK // width)
        for first in range(begin, end, step):
            last = min(first + step, end)
            whole = drawn.between(first * width, last * width).view(last - first, *self.shape[1:])
            chunk = whole[(slice(None), *inner)]
            out = torch.empty(max(0, end - begin), *chunk.shape[1:]) if out is None else out
            out[first - begin : last - begin] = chunk
        return torch.empty(self.shape)[slices] if out is None else out

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


class _Drawn:
    """The elements of `normals`, in order; it keeps elements that are drawn but not returned yet."""

    def __init__(self, normals: Normals):
        self.normals = normals
        self.generator = normals._generator()
        self.at, self.left = 0, torch.empty(0)
        """The next element's place, and elements that end before it."""

    def between(self, begin: int, end: int) -> Tensor:
        """Elements begin to end, not before those of the last call: [end − begin]."""
        size = self.normals.size
        body = size if size % BLOCK == 0 else size - BLOCK
        """The first element that is made of words behind the others."""
        parts = [self._blocks(begin, min(end, body))] if begin < body else []
        if end > body:
            parts.append(self._tail[max(begin - body, 0) : end - body])
        return torch.cat(parts)

    @cached_property
    def _tail(self) -> Tensor:
        self._move(self.normals.size)
        return self._normal(BLOCK)

    def _blocks(self, begin: int, end: int) -> Tensor:
        start = self.at - len(self.left)
        if begin >= self.at:
            self._move(begin // BLOCK * BLOCK)
            start, self.left = self.at, torch.empty(0)
        missing = max(0, -(-end // BLOCK) * BLOCK - self.at)
        found = self._normal(missing) if not len(self.left) else torch.cat([self.left, self._normal(missing)])
        self.at += missing
        self.left = found[end - start :].clone()
        return found[begin - start : end - start]

    def _normal(self, count: int) -> Tensor:
        return torch.empty(count).normal_(0.0, self.normals.std, generator=self.generator)

    def _move(self, to: int) -> None:
        """Move the generator to the word of an element."""
        if to - self.at >= FAR and not self.at and jump.works():
            jump.advance(self.generator, to)
        else:
            jump.draw(self.generator, to - self.at)
        self.at = to
