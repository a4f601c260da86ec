"""The breakdown of one rank's step: compute, exposed communication by purpose, bubble and idle time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence

from moesys.measure.explain.attribution import Attribution
from moesys.measure.explain.explanation import Breakdown
from moesys.measure.explain.intervals import Interval, common, length, union, without
from moesys.measure.step import PURPOSES, RankStep

OTHERS = tuple(p for p in PURPOSES if p not in ("expert", "step"))
"""Purposes of communication other than dispatch and combine."""


def breakdown(r: RankStep, mine: Sequence[Attribution]) -> Breakdown:
    """The breakdown of a rank's step. Overlapping waits count once, for the collective that was waited for first."""
    whole = [(r.begin, r.end)]
    busy = None if r.compute is None else common(union(r.compute), whole)
    spent: dict[str, float] = defaultdict(float)
    piped = any(item.span.purpose == "pipeline" for item in mine)
    own = exposures(r, mine, busy or [])
    for item, seconds in zip(mine, map(length, own), strict=True):
        waited = seconds * item.wait / (item.wait + item.transfer + item.unattributed) if item.wait > 0 else 0.0
        purpose = item.span.purpose
        if purpose == "step":
            # In a pipeline, stages wait for the last one in the first collective that all ranks share.
            spent["bubble" if piped else "idle"] += waited
            spent["idle"] += seconds - waited
            piped = False
        elif purpose == "pipeline":
            spent["bubble"] += waited
            spent["pipeline"] += seconds - waited
        else:
            spent[purpose] += seconds
    taken = union(i for pieces in own for i in pieces)
    compute = r.seconds - length(taken) if busy is None else length(busy)
    spent["idle"] += r.seconds - compute - length(taken)
    hidden = None
    if busy is not None:
        moving = common(union((t.begin, t.end) for t in r.collectives if t.purpose == "expert"), whole)
        hidden = length(common(moving, busy))
    used = {item.span.purpose for item in mine}
    others: dict[str, float] = {name: spent[name] for name in OTHERS if name in used}
    return Breakdown(r.seconds, compute, spent["expert"], others, spent["bubble"], spent["idle"], hidden)


def exposures(r: RankStep, mine: Sequence[Attribution], busy: list[Interval]) -> list[list[Interval]]:
    """The intervals in which the rank waited for each of `mine` alone, not for an earlier one, and was not `busy`."""
    found: list[list[Interval]] = [[] for _ in mine]
    begins, ends = [b for b, _ in busy], [e for _, e in busy]
    covered = r.begin
    for begin, end, i in sorted((b, e, i) for i, item in enumerate(mine) for b, e in item.span.exposed):
        begin, end = max(begin, covered), min(end, r.end)
        if end > begin:
            found[i] += without([(begin, end)], busy[bisect_right(ends, begin) : bisect_left(begins, end)])
            covered = end
    return found
