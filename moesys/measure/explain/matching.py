"""Matches the collectives of all ranks: which spans are one collective, and who began last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from moesys.measure.explain.arrivals import MemberTimes, group_arrival
from moesys.measure.explain.expert_compute import computed
from moesys.measure.step import CollectiveSpan, GroupArrival, Step


def arrivals(step: Step) -> dict[int, Sequence[GroupArrival]]:
    """The group arrival of each rank's collectives, in their order: from the record, else from matched spans."""
    if all(r.arrivals is not None for r in step.ranks):
        return {r.rank: r.arrivals or () for r in step.ranks}
    found = {}
    for collectives, members in matched_members(step):
        arrival = group_arrival(members, next(iter(collectives.values())).ranks)
        found.update({id(t): arrival for t in collectives.values()})
    # A damaged record may have a collective twice.
    return {r.rank: [found.get(id(t)) or _alone(r.rank, t) for t in r.collectives] for r in step.ranks}


def _alone(rank: int, t: CollectiveSpan) -> GroupArrival:
    """The group arrival of a collective that no other rank recorded."""
    return GroupArrival(t.begin, rank, False, None, t.bytes, 1.0, None)


def matched_members(step: Step) -> Iterator[tuple[dict[int, CollectiveSpan], list[MemberTimes]]]:
    """Every collective or message: its spans by rank, and its members' times."""
    after = {r.rank: dict(computed(r)) for r in step.ranks}
    for collectives in match_collectives(step).values():
        yield collectives, [member(rank, t, after[rank].get(id(t))) for rank, t in collectives.items()]


def member(rank: int, t: CollectiveSpan, after: float | None) -> MemberTimes:
    """A span as its rank sends it to the group. `after`: seconds that the rank's experts computed before it."""
    return MemberTimes(rank, t.begin, t.waited, t.end, t.met, t.bytes, after, t.sent)


def key_of(span: CollectiveSpan) -> tuple[object, ...]:
    """A key that is the same on all ranks of a collective or message."""
    return span.purpose, span.ranks, span.kind in ("send", "recv"), span.number


def match_collectives(step: Step) -> dict[tuple[object, ...], dict[int, CollectiveSpan]]:
    """The spans of every collective or message, by rank."""
    found: dict[tuple[object, ...], dict[int, CollectiveSpan]] = defaultdict(dict)
    for r in step.ranks:
        for span in r.collectives:
            found[key_of(span)][r.rank] = span
    return found
