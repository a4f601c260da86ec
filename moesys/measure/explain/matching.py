"""Matches the collectives of all ranks: who took part in each, and who came last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from moesys.measure.explain.arrivals import Member, meeting
from moesys.measure.explain.expert_compute import computed
from moesys.measure.step import Meeting, Step, Travel


def meetings(step: Step) -> dict[int, Sequence[Meeting]]:
    """The meetings of each rank's travels, in their order: as its ranks told them, else by matching their travels."""
    if all(r.meetings is not None for r in step.ranks):
        return {r.rank: r.meetings or () for r in step.ranks}
    found = {}
    for travels, members in matches(step):
        told = meeting(members, next(iter(travels.values())).ranks)
        found.update({id(t): told for t in travels.values()})
    # A damaged record may have a collective twice.
    return {r.rank: [found.get(id(t)) or _alone(r.rank, t) for t in r.travels] for r in step.ranks}


def _alone(rank: int, t: Travel) -> Meeting:
    """The meeting of a travel that nobody else has told of."""
    return Meeting(t.begin, rank, False, None, t.bytes, 1.0, None)


def matches(step: Step) -> Iterator[tuple[dict[int, Travel], list[Member]]]:
    """Every collective or message: its travels by rank, and the same as its members tell each other."""
    after = {r.rank: dict(computed(r)) for r in step.ranks}
    for travels in matched(step).values():
        yield travels, [member(rank, t, after[rank].get(id(t))) for rank, t in travels.items()]


def member(rank: int, t: Travel, after: float | None) -> Member:
    """The travel as its rank tells the group; `after`: seconds that its experts had computed before."""
    return Member(rank, t.begin, t.waited, t.end, t.met, t.bytes, after, t.sent)


def key_of(travel: Travel) -> tuple[object, ...]:
    """The same for all ranks of a collective or message."""
    return travel.purpose, travel.ranks, travel.kind in ("send", "recv"), travel.number


def matched(step: Step) -> dict[tuple[object, ...], dict[int, Travel]]:
    """The travels of each collective or message, by rank."""
    found: dict[tuple[object, ...], dict[int, Travel]] = defaultdict(dict)
    for r in step.ranks:
        for travel in r.travels:
            found[key_of(travel)][r.rank] = travel
    return found
