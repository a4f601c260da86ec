"""Where the seconds of one rank's step went."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence

from moesys.measure.explain.attribution import Cost
from moesys.measure.explain.explanation import Breakdown
from moesys.measure.explain.intervals import Interval, common, length, union, without
from moesys.measure.step import PURPOSES, RankStep

OTHERS = tuple(p for p in PURPOSES if p not in ("expert", "step"))


def breakdown(r: RankStep, mine: Sequence[Cost]) -> Breakdown:
    """Where one rank's step went; what overlaps is counted once, for what was waited for first."""
    whole = [(r.begin, r.end)]
    busy = None if r.compute is None else common(union(r.compute), whole)
    spent: dict[str, float] = defaultdict(float)
    piped = any(cost.travel.purpose == "pipeline" for cost in mine)
    own = exposures(r, mine, busy or [])
    for cost, seconds in zip(mine, map(length, own), strict=True):
        waited = seconds * cost.wait / (cost.wait + cost.transfer + cost.untold) if cost.wait > 0 else 0.0
        purpose = cost.travel.purpose
        if purpose == "step":
            # With pipelining the first thing that all ranks share is where stages wait for the last one.
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
        air = common(union((t.begin, t.end) for t in r.travels if t.purpose == "expert"), whole)
        hidden = length(common(air, busy))
    used = {cost.travel.purpose for cost in mine}
    others: dict[str, float] = {name: spent[name] for name in OTHERS if name in used}
    return Breakdown(r.seconds, compute, spent["expert"], others, spent["bubble"], spent["idle"], hidden)


def exposures(r: RankStep, mine: Sequence[Cost], busy: list[Interval]) -> list[list[Interval]]:
    """When the rank waited for each of `mine` inside its step, and neither for one before nor was `busy`."""
    found: list[list[Interval]] = [[] for _ in mine]
    begins, ends = [b for b, _ in busy], [e for _, e in busy]
    covered = r.begin
    for begin, end, i in sorted((b, e, i) for i, cost in enumerate(mine) for b, e in cost.travel.exposed):
        begin, end = max(begin, covered), min(end, r.end)
        if end > begin:
            found[i] += without([(begin, end)], busy[bisect_right(ends, begin) : bisect_left(begins, end)])
            covered = end
    return found
