"""Why each rank waited in a recorded step: matches the travels of all ranks and takes them apart.

A collective cannot end before its last rank has begun it. What a rank waits until then is *wait*, what
follows is *transfer*. Of the wait for results of experts, the part by which the last rank computed
longer because it had more rows is *uneven*; the rest is *late*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesys.measure.explain.expert_compute import AFTER_EXPERTS, computed
from moesys.measure.explain.explanation import Causes
from moesys.measure.explain.matching import meetings
from moesys.measure.step import Meeting, RankStep, Step, Travel


@dataclass(frozen=True)
class Cost:
    """One travel of a rank, taken apart.

    Attributes:
        wait: seconds of its exposed time until the last rank of the group began.
        transfer: the rest of its exposed time, where all ranks of the group were seen.
        untold: the rest where they were not: bytes moving, or waiting for ranks that were not seen.
        uneven: the part of `wait` that uneven experts caused.
        last: the rank that began last, None if it is this one or the group's travels are not known.
        evenness: bytes that a rank moves to and from others, mean over the group / most of any rank; 1 if unknown.
    """

    rank: int
    travel: Travel
    wait: float
    transfer: float
    untold: float = 0.0
    uneven: float = 0.0
    last: int | None = None
    evenness: float = 1.0

    @property
    def causes(self) -> Causes:
        return Causes(self.transfer, self.wait - self.uneven, self.uneven, self.untold)


def costs(step: Step) -> dict[int, list[Cost]]:
    """Every travel of the step taken apart, by rank, in the order in which they were waited for."""
    met = meetings(step)
    return {r.rank: rank_costs(r, met[r.rank]) for r in step.ranks}


def rank_costs(r: RankStep, met: Sequence[Meeting]) -> list[Cost]:
    """Every travel of a rank taken apart, given its meeting, in the order in which they were waited for."""
    here = dict(computed(r))
    found = [_taken_apart(r.rank, t, m, here.get(id(t))) for t, m in zip(r.travels, met, strict=True)]
    return sorted(found, key=lambda c: c.travel.waited)


def _taken_apart(rank: int, t: Travel, met: Meeting, here: float | None) -> Cost:
    if t.met is not None and met.least is not None:
        t = replace(t, met=t.met - met.least)  # without what the meeting itself took, which the last rank tells
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
    return Cost(rank, t, wait, *rest, uneven, met.last if rank != met.last and wait > 0 else None, met.evenness)


def _longer(mine: Travel, met: Meeting, here: float | None) -> float:
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
