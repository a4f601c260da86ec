"""Why each rank waited in a recorded step: matches the travels of all ranks and takes them apart.

A collective cannot end before its last rank has begun it. What a rank waits until then is *wait*, what
follows is *transfer*. Of the wait for results of experts, the part by which the last rank computed
longer because it had more rows is *uneven*; the rest is *late*.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from moesys.measure.explanation import Causes
from moesys.measure.step import RankStep, Step, Travel

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
    computed = {r.rank: dict(_computed(r)) for r in step.ranks}
    found: dict[int, list[Cost]] = {r.rank: [] for r in step.ranks}
    for travels in matched(step).values():
        for cost in _taken_apart(travels, computed):
            found[cost.rank].append(cost)
    return {rank: sorted(mine, key=lambda c: c.travel.waited) for rank, mine in found.items()}


def matched(step: Step) -> dict[tuple[object, ...], dict[int, Travel]]:
    """The travels of each collective or message, by rank."""
    found: dict[tuple[object, ...], dict[int, Travel]] = defaultdict(dict)
    for r in step.ranks:
        for travel in r.travels:
            message = travel.kind in ("send", "recv")
            found[travel.purpose, travel.ranks, message, travel.number][r.rank] = travel
    return found


def _taken_apart(travels: Mapping[int, Travel], computed: Mapping[int, Mapping[int, float]]) -> Iterator[Cost]:
    last = max(travels, key=lambda rank: travels[rank].begin)
    whole, even = set(travels) == set(travels[last].ranks) and len(travels) > 1, evenness(travels)
    for rank, t in _without_meeting(travels).items():
        seconds = sum(max(0.0, end - begin) for begin, end in t.exposed)
        wait, arrived = 0.0, travels[last].begin
        if t.met is not None:
            wait = t.met - t.begin
        elif t.kind != "send":
            wait = max(0.0, min(t.end, arrived) - t.waited)
        uneven = 0.0
        if rank != last and wait > 0 and (t.part, t.backward) in AFTER_EXPERTS:
            here, there = (computed[r].get(id(travels[r])) for r in (rank, last))
            uneven = min(wait, _longer(t, travels[last], here, there))
        rest = (seconds - wait, 0.0) if whole else (0.0, seconds - wait)
        yield Cost(rank, t, wait, *rest, uneven, last if rank != last and wait > 0 else None, even)


def _without_meeting(travels: Mapping[int, Travel]) -> Mapping[int, Travel]:
    """In an audit: without what the meeting itself took, which the last rank to come tells."""
    met = {rank: t.met - t.begin for rank, t in travels.items() if t.met is not None}
    if len(met) < len(travels):
        return travels
    least = min(met.values())
    return {rank: replace(t, met=t.begin + met[rank] - least) for rank, t in travels.items()}


def evenness(travels: Mapping[int, Travel]) -> float:
    """Of a collective: bytes to and from others, mean over its ranks / most; 1 if any rank's are not known."""
    sent = {rank: dict(zip(t.ranks, t.sent, strict=False)) for rank, t in travels.items()}
    if any(rank not in row for rank, row in sent.items()) or len(sent) < len(next(iter(travels.values())).ranks):
        return 1.0
    moved = []
    for rank in sent:
        others = [peer for peer in sent if peer != rank]
        moved.append(max(sum(sent[rank].get(p, 0) for p in others), sum(sent[p].get(rank, 0) for p in others)))
    return sum(moved) / len(moved) / max(moved) if max(moved) > 0 else 1.0


def _longer(mine: Travel, theirs: Travel, here: float | None, there: float | None) -> float:
    """Seconds by which the other rank's experts computed longer for having more rows.

    Never more than rows explain: a rank that has a tenth more rows may take a tenth longer. Rows can be
    told from bytes where each row returns to where it came from.
    """
    if here is None or there is None:
        return 0.0
    longer = max(0.0, there - here)
    if theirs.kind.startswith("all_to_all") and theirs.level == "flat":
        longer = min(longer, there * max(0.0, 1 - mine.bytes / theirs.bytes)) if theirs.bytes else 0.0
    return longer


def _computed(r: RankStep) -> Iterator[tuple[int, float]]:
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


def experts_seconds(steps: Iterable[Step]) -> float:
    """Seconds that experts computed, per step and rank, as told by what travelled before and after."""
    ranks = [r for step in steps for r in step.ranks]
    return sum(seconds for r in ranks for _, seconds in _computed(r)) / max(1, len(ranks))


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
