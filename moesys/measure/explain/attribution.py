"""Attributes the time that a rank waited for a collective to its causes.

A collective cannot end before its last rank has begun it. The time until then is *wait*; the time after it is
*transfer*. A wait for results of experts has two causes. The last rank computed longer because it had more rows:
this part is *uneven*. The rest is *late*.
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
    """One collective of a rank with the causes of its exposed time.

    Attributes:
        wait: exposed seconds until the last rank of the group began.
        transfer: exposed seconds after that, if all ranks of the group were recorded.
        unattributed: the same if some were not: transfer, or wait for ranks that were not recorded.
        uneven: the part of `wait` that uneven experts caused.
        last: the rank that began last; None if it is this one, or unknown.
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
        """The exposed seconds by cause."""
        return Causes(self.transfer, self.wait - self.uneven, self.uneven, self.unattributed)


def attributions(step: Step) -> dict[int, list[Attribution]]:
    """The attribution of every collective of a step, by rank, in the order of waiting."""
    met = arrivals(step)
    return {r.rank: rank_attributions(r, met[r.rank]) for r in step.ranks}


def rank_attributions(r: RankStep, met: Sequence[GroupArrival]) -> list[Attribution]:
    """The attribution of every collective of a rank, in the order of waiting. `met`: their group arrivals."""
    here = dict(computed(r))
    found = [_attributed(r.rank, t, m, here.get(id(t))) for t, m in zip(r.collectives, met, strict=True)]
    return sorted(found, key=lambda c: c.span.waited)


def _attributed(rank: int, t: CollectiveSpan, met: GroupArrival, here: float | None) -> Attribution:
    """The attribution of one collective. `here`: seconds that this rank's experts computed before it."""
    if t.met is not None and met.least is not None:
        t = replace(t, met=t.met - met.least)  # the barrier itself took the last rank this long
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
    """Seconds by which the last rank's experts computed longer because they had more rows.

    The rows bound it: a rank with a tenth more rows may take a tenth longer. Bytes stand for rows where each row
        returns
    to the rank that it came from.
    """
    there = met.computed
    if here is None or there is None:
        return 0.0
    longer = max(0.0, there - here)
    if mine.kind.startswith("all_to_all") and mine.level == "flat":
        longer = min(longer, there * max(0.0, 1 - mine.bytes / met.bytes)) if met.bytes else 0.0
    return longer
