"""Where the seconds of one rank's step went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from moesys.measure.attribute import Cost
from moesys.measure.explanation import Breakdown
from moesys.measure.intervals import Interval, common, length, union, without
from moesys.measure.step import PURPOSES, RankStep

OTHERS = tuple(p for p in PURPOSES if p not in ("expert", "step"))


def breakdown(r: RankStep, mine: Sequence[Cost]) -> Breakdown:
    """Where one rank's step went; what overlaps is counted once, for what was waited for first."""
    busy = None if r.compute is None else union(r.compute)
    taken: list[Interval] = []
    spent: dict[str, float] = defaultdict(float)
    whole = [(r.begin, r.end)]
    first_common = True
    for cost in mine:
        t = cost.travel
        own = without(common(union(t.exposed), whole), taken)
        if busy is not None:
            own = without(own, busy)
        seconds = length(own)
        taken = union([*taken, *own])
        waited = seconds * cost.wait / (cost.wait + cost.transfer) if cost.wait > 0 else 0.0
        if t.purpose == "step":
            # With pipelining the first thing that all ranks share is where stages wait for the last one.
            piped = first_common and any(u.purpose == "pipeline" for u in r.travels)
            spent["bubble" if piped else "idle"] += waited
            spent["idle"] += seconds - waited
            first_common = False
        elif t.purpose == "pipeline":
            spent["bubble"] += waited
            spent["pipeline"] += seconds - waited
        else:
            spent[t.purpose] += seconds
    air = union((t.begin, t.end) for t in r.travels if t.purpose == "expert")
    everything = common(union((t.begin, t.end) for t in r.travels), whole)
    if busy is None:
        compute = r.seconds - length(taken)
        hidden = length(without(common(air, whole), taken))
    else:
        compute = length(common(busy, whole))
        hidden = length(common(air, busy))
        spent["idle"] += r.seconds - length(union([*common(busy, whole), *everything]))
    others: dict[str, float] = {name: spent[name] for name in OTHERS if any(t.purpose == name for t in r.travels)}
    return Breakdown(r.seconds, compute, spent["expert"], others, spent["bubble"], spent["idle"], hidden)


def mean(parts: Iterable[Breakdown]) -> Breakdown:
    """Of each figure."""
    every = list(parts)
    names = [name for name in OTHERS if any(name in b.others for b in every)]
    return Breakdown(
        step=fmean(b.step for b in every),
        compute=fmean(b.compute for b in every),
        exposed=fmean(b.exposed for b in every),
        others={name: fmean(b.others.get(name, 0.0) for b in every) for name in names},
        bubble=fmean(b.bubble for b in every),
        idle=fmean(b.idle for b in every),
        hidden=fmean(b.hidden for b in every),
    )
