"""Why each rank waited in a recorded step: matched_members the collectives of all ranks and takes them apart.

A collective cannot end before its last rank has begun it. What a rank waits until then is *wait*, what
follows is *transfer*. Of the wait for results of experts, the part by which the last rank computed
longer because it had more rows is *uneven*; the rest is *late*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesys.measure.explain.expert_compute import AFTER_EXPERTS, computed
from moesys.measure.explain.explanation import Causes
from moesys.measure.explain.matching import arrivals
from moesys.measure.step import CollectiveSpan, GroupArrival, RankStep, Step


@dataclass(frozen=True)
class Attribution:
    """One collective of a rank, taken apart.

    Attributes:
        wait: seconds of its exposed time until the last rank of the group began.
        transfer: the rest of its exposed time, where all ranks of the group were seen.
        unattributed: the rest where they were not: bytes moving, or waiting for ranks that were not seen.
        uneven: the part of `wait` that uneven experts caused.
        last: the rank that began last, None if it is this one or the group's collectives are not known.
        evenness: bytes that a rank moves to and from others, mean over the group / most of any rank; 1 if unknown.
    """

    rank: int
    span: CollectiveSpan
    wait: float
    transfer: float
    unattributed: float = 0.0
    uneven: float = 0.0
    last: int | None = None
    evenness: float = 1.0

    @property
    def causes(self) -> Causes:
        return Causes(self.transfer, self.wait - self.uneven, self.uneven, self.unattributed)


def attributions(step: Step) -> dict[int, list[Attribution]]:
    """Every collective of the step taken apart, by rank, in the order in which they were waited for."""
    met = arrivals(step)
    return {r.rank: rank_attributions(r, met[r.rank]) for r in step.ranks}


def rank_attributions(r: RankStep, met: Sequence[GroupArrival]) -> list[Attribution]:
    """Every collective of a rank taken apart, given its group_arrival, in the order in which they were waited for."""
    here = dict(computed(r))
    found = [_attributed(r.rank, t, m, here.get(id(t))) for t, m in zip(r.collectives, met, strict=True)]
    return sorted(found, key=lambda c: c.span.waited)


def _attributed(rank: int, t: CollectiveSpan, met: GroupArrival, here: float | None) -> Attribution:
    if t.met is not None and met.least is not None:
        t = replace(t, met=t.met - met.least)  # without what the group_arrival itself took, which the last rank tells
    seconds = sum(max(0.0, end - begin) for begin, end in t.exposed)
    wait = 0.0
    if t.met is not None:
        wait = t.met - t.begin
    elif t.kind != "send":
        wait = max(0.0, min(t.end, met.arrived) - t.waited)
    uneven = 0.0
    if rank != met.last and wait > 0 and (t.part, t.backward) in AFTER_EXPERTS:
        uneven = min(wait, _longer(t, met, here))
    rest = (seconds - wait, 0.0) if met.whole else (0.0, seconds - wait)
    return Attribution(rank, t, wait, *rest, uneven, met.last if rank != met.last and wait > 0 else None, met.evenness)


def _longer(mine: CollectiveSpan, met: GroupArrival, here: float | None) -> float:
    """Seconds by which the last rank's experts computed longer for having more rows.

    Never more than rows explain: a rank that has a tenth more rows may take a tenth longer. Rows can be
    told from bytes where each row returns to where it came from.
    """
    there = met.computed
    if here is None or there is None:
        return 0.0
    longer = max(0.0, there - here)
    if mine.kind.startswith("all_to_all") and mine.level == "flat":
        longer = min(longer, there * max(0.0, 1 - mine.bytes / met.bytes)) if met.bytes else 0.0
    return longer
