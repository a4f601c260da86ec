"""Why each rank waited in a recorded step: matches the travels of all ranks and takes them apart.

A collective cannot end before its last rank has begun it. What a rank waits until then is *wait*, what
follows is *transfer*. Of the wait for results of experts, the part by which the last rank computed
longer because it had more rows is *uneven*; the rest is *late*.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moesys.measure.explain.arrivals import Member, meeting
from moesys.measure.explain.explanation import Causes
from moesys.measure.step import Meeting, RankStep, Step, Travel

AFTER_EXPERTS = {("combine", False), ("dispatch", True)}
"""What travels when experts have computed: part, and whether backward."""


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


def computed(r: RankStep) -> Iterator[tuple[int, float]]:
    """For every travel that follows experts' computation, by identity: the seconds that these took.

    From the end of the last travel towards the experts that had ended before it began.
    """
    for occurrence in passes(r.travels):
        towards = [t for t in occurrence if (t.part, t.backward) not in AFTER_EXPERTS]
        for t in occurrence:
            if (t.part, t.backward) in AFTER_EXPERTS:
                ended = [u.end for u in towards if u.end <= t.begin]
                if ended:
                    yield id(t), t.begin - max(ended)


def experts_seconds(r: RankStep) -> float:
    """Seconds that its experts computed, as told by what travelled before and after."""
    return sum(seconds for _, seconds in computed(r))


def passes(travels: Iterable[Travel]) -> list[list[Travel]]:
    """Those of MoE layers, one list for each time that rows went to a layer's experts and came back."""
    found: list[list[Travel]] = []
    current: dict[tuple[str, bool], list[Travel]] = {}
    for t in sorted((t for t in travels if t.layer), key=lambda t: t.begin):
        key, there = (t.layer, t.backward), (t.part, t.backward) not in AFTER_EXPERTS
        before = current.get(key)
        if before is None or (
            there and (before[-1].part, before[-1].backward) in AFTER_EXPERTS and not _open(before, t)
        ):
            current[key] = before = []
            found.append(before)
        before.append(t)
    return found


def _open(before: list[Travel], t: Travel) -> bool:
    """Whether t belongs to a pass whose first results are already on their way back: another chunk's rows."""
    returned = min(u.end for u in before if (u.part, u.backward) in AFTER_EXPERTS)
    return t.begin < returned
