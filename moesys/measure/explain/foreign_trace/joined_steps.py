"""Joins the steps of all ranks' traces."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from moesys.measure.step import CollectiveSpan, RankStep, Step


def joined(number_: int, parts: Sequence[tuple[RankStep, bool]]) -> tuple[Step, bool]:
    """The step of all ranks from the first begin on, and whether the ranks of each group made equally many collectives.

    If they did not, some are missing, and the rest cannot be matched.
    """
    start = min(r.begin for r, _ in parts)
    made: dict[_Key, Counter[int]] = defaultdict(Counter)
    for r, _ in parts:
        for t in r.collectives:
            made[_group(t)][r.rank] += 1
    present = {r.rank for r, _ in parts}
    unequal = {
        key for key, by_rank in made.items() if len({by_rank.get(rank, 0) for rank in key[0] if rank in present}) > 1
    }
    ranks = tuple(_shifted(r, start, unequal) for r, _ in parts)
    return Step(number_, ranks, marked=all(marked for _, marked in parts)), not unequal


_Key = tuple[tuple[int, ...], str, bool]
"""A key to count collectives by: ranks, purpose, and whether it is a message."""


def _group(t: CollectiveSpan) -> _Key:
    return t.ranks, t.purpose, t.kind == "send"


def _shifted(r: RankStep, start: float, unequal: Collection[_Key]) -> RankStep:
    """The step with its times from `start`. Collectives of `unequal` groups lose their group."""
    collectives = tuple(
        replace(
            t, begin=t.begin - start, waited=t.waited - start, end=t.end - start,
            ranks=(r.rank,) if _group(t) in unequal else t.ranks,
        )
        for t in r.collectives
    )  # fmt: skip
    compute = None if r.compute is None else tuple((a - start, b - start) for a, b in r.compute)
    return RankStep(r.rank, r.host, r.begin - start, r.end - start, collectives, compute)
