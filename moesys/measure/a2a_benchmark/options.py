"""The options of `moesys bench a2a`. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moesys.measure.a2a_benchmark.sizes import COLLECTIVES, GROUPS
from moesys.measure.a2a_benchmark.traffic import Matrix


@dataclass(frozen=True)
class BenchmarkOptions:
    """The collectives, groups and sizes to measure.

    Attributes:
        kinds: collectives.
        groups: kinds of groups of ranks.
        smallest, largest, factor: sizes in bytes; each is `factor` times the one before.
        skew, matrix: additional all-to-alls with uneven traffic, by Zipf's law or in this pattern.
        check: validate one result of every case.
        plain: interleave a bare loop around `torch.distributed.all_to_all_single`, for comparison.
        dispatch: additional dispatchers, with `tokens` of `hidden` elements from each rank to `top_k` experts each.
    """

    kinds: Sequence[str] = COLLECTIVES
    groups: Sequence[str] = GROUPS
    dtypes: Sequence[str] = ("float32",)
    smallest: int = 1024
    largest: int = 2**30
    factor: int = 4
    iterations: int = 20
    warmup: int = 3
    skew: float | None = None
    matrix: Matrix | None = None
    check: bool = True
    plain: bool = False
    dispatch: Sequence[str] = ()
    tokens: int = 1024
    hidden: int = 1024
    top_k: int = 2

    def sizes(self) -> Iterator[int]:
        """All sizes in bytes."""
        size = self.smallest
        while size <= self.largest:
            yield size
            size *= self.factor
