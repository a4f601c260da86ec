"""How tensors of a released checkpoint and a model's weights are the same numbers in other orders. Needs no torch.

The gate projection of expert 3 lies in a Mixtral file as w1 [F, H], and here in fc1 [E, H, 2, F] at [3, :, 0, :]:

    Stored("model.layers.0.block_sparse_moe.experts.3.w1.weight",
           box=((3, 4), (0, H), (0, 1), (0, F)), dims=((3,), (1,)))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

Range = tuple[int, int]
"""First index, and the index after the last."""
Box = tuple[Range, ...]
"""A rectangular part of a tensor: a range per dim."""
Runs = tuple[Range, ...]
"""Indices along one dim as ascending ranges that do not touch."""


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def meet(one: Box, other: Box) -> Box | None:
    """The part that two boxes share; None: there is none."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(a >= b for a, b in shared) else shared


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


@dataclass(frozen=True)
class Stored:
    """One tensor of the files, and the part of a weight that holds the same numbers.

    Attributes:
        name: the tensor's name in the files.
        box: the part of the weight.
        dims: for each dim of the tensor, the weight's dims that it runs over, the outermost first. Dims of the weight
            that no dim of the tensor runs over have the size 1 in `box`.
        rows: for each row of the part, in its order, the tensor's row; None: the same one. `dims[0]` gives the order.
        height: rows of the tensor, where `rows` does not name them all.
        float32: it stays float32, whatever the type of the files.
        leading: dims of size 1 before these (ERNIE's [1, E]).
    """

    name: str
    box: Box
    dims: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...] | None = None
    height: int | None = None
    float32: bool = False
    leading: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the files."""
        size = sizes(self.box)
        found = [prod(size[d] for d in run) for run in self.dims]
        if self.height is not None:
            found[0] = self.height
        return (1,) * self.leading + tuple(found)

    def taken(self, part: Box) -> tuple[list[int], ...]:
        """For each dim of the tensor, its indices that make up `part` of the weight, in the weight's order."""
        size, start = sizes(self.box), [a for a, _ in self.box]
        found: list[list[int]] = [[0]] * self.leading
        for place, run in enumerate(self.dims):
            strides = [prod(size[d] for d in run[i + 1 :]) for i in range(len(run))]
            ranges = [range(part[d][0] - start[d], part[d][1] - start[d]) for d in run]
            if len(run) == 1:
                indices = list(ranges[0])
            else:
                indices = [sum(i * s for i, s in zip(at, strides, strict=True)) for at in product(*ranges)]
            if place == 0 and self.rows is not None:
                indices = [self.rows[i] for i in indices]
            found.append(indices)
        return tuple(found)


def runs(indices: Sequence[int]) -> Runs:
    """The ranges that hold `indices`, which are different."""
    return tuple(_runs(sorted(indices)))


def _runs(ascending: Sequence[int]) -> Iterator[Range]:
    start = last = ascending[0]
    for index in ascending[1:]:
        if index != last + 1:
            yield start, last + 1
            start = index
        last = index
    yield start, last + 1


def identity(name: str, shape: Sequence[int], rows: tuple[int, ...] | None = None, height: int | None = None) -> Stored:
    """A tensor that is a whole weight in the same order, but for its rows."""
    return Stored(name, whole(shape), tuple((d,) for d in range(len(shape))), rows, height)


def halves_from_pairs(heads: int, size: int, first: int = 0, turned: int | None = None) -> tuple[int, ...]:
    """Rows of heads whose rotary part lies in the files as pairs (2i, 2i + 1), where ours has (i, i + d/2).

    Args:
        heads, size: heads, and rows of each.
        first: rows of each head before its rotary part.
        turned: size of the rotary part; default: all after `first`.
    """
    d = size - first if turned is None else turned
    head = [*range(first), *range(first, first + d, 2), *range(first + 1, first + d, 2), *range(first + d, size)]
    return tuple(h * size + row for h in range(heads) for row in head)
