"""What recorded steps say of each MoE layer, and of who sends how much to whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from moesys.measure.attribute import AFTER_EXPERTS, Cost, matched, passes
from moesys.measure.explanation import Causes, Layer, Leg
from moesys.measure.links import limits
from moesys.measure.step import Step, Travel

CLEAR_S = 20e-6
"""A rank that waited longer than this for a result saw when it arrived."""

ROWS = ("all_to_all", "all_gather", "reduce_scatter")
"""Kinds that carry rows; the others carry counts, names and weights."""

Key = tuple[str, str, bool]
"""Layer, part, and whether backward."""


def order(key: Key) -> tuple[object, ...]:
    """Layers by number; forward before backward, and the way there before the way back."""
    layer, part, backward = key
    numbers = tuple(int(word) for word in layer.split(".") if word.isdigit())
    return (numbers, layer, backward, (part, backward) in AFTER_EXPERTS)


@dataclass
class _Sums:
    """Of one leg over all recorded steps."""

    by_rank: dict[int, Causes] = field(default_factory=lambda: defaultdict(Causes))
    inter: int = 0
    intra: int = 0
    rates: int = 0
    rate_bytes: int = 0
    rate_seconds: float = 0.0
    inside: float = 0.0
    between: float = 0.0

    def add(self, cost: Cost, hosts: Mapping[int, str]) -> None:
        t, rank = cost.travel, cost.rank
        self.by_rank[rank] += cost.causes
        for peer, size in zip(t.ranks, t.sent, strict=False):
            if hosts.get(peer) != hosts[rank]:
                self.inter += size
            elif peer != rank:
                self.intra += size

    def add_rate(self, travels: Mapping[int, Travel], hosts: Mapping[int, str]) -> None:
        """Bytes of a collective of rows, and how long they took, where a rank saw when they arrived."""
        ends = [t.end for t in travels.values() if t.end - t.waited > CLEAR_S]
        arrived = max(t.begin if t.met is None else t.met for t in travels.values())
        if ends and max(ends) > arrived:
            self.rate_bytes += max(t.bytes - kept(rank, t) for rank, t in travels.items())
            self.rate_seconds += max(ends) - arrived
            sent = [
                [dict(zip(t.ranks, t.sent, strict=False)).get(peer, 0) for peer in travels] for t in travels.values()
            ]
            inside, between = limits(sent, [hosts[rank] for rank in travels])
            self.rates, self.inside, self.between = self.rates + 1, self.inside + inside, self.between + between


def legs(steps: Sequence[Step], taken: Sequence[Mapping[int, Sequence[Cost]]]) -> list[Leg]:
    """Every leg; `taken` are the costs of the steps. Means over the ranks that hold the layer."""
    sums: dict[Key, _Sums] = defaultdict(_Sums)
    for step, by_rank in zip(steps, taken, strict=True):
        hosts = {r.rank: r.host for r in step.ranks}
        for cost in (c for mine in by_rank.values() for c in mine if c.travel.layer):
            t = cost.travel
            sums[t.layer, t.part, t.backward].add(cost, hosts)
        for travels in matched(step).values():
            t = next(iter(travels.values()))
            if t.layer and t.kind in ROWS and len(travels) > 1:
                sums[t.layer, t.part, t.backward].add_rate(travels, hosts)
    return [_leg(key, sums[key], steps) for key in sorted(sums, key=order)]


def _leg(key: Key, s: _Sums, steps: Sequence[Step]) -> Leg:
    n, holders, seen = len(steps), len(s.by_rank), max(1, s.rates)
    return Leg(
        *key,
        causes=sum(s.by_rank.values(), Causes()).scaled(1 / (n * holders)),
        bytes_inter=s.inter // n,
        bytes_intra=s.intra // n,
        bandwidth=s.rate_bytes / s.rate_seconds if s.rate_seconds > 0 else None,
        by_rank=[s.by_rank.get(r.rank, Causes()).scaled(1 / n) for r in steps[0].ranks],
        each=s.rate_seconds / seen if s.rates else None,
        inside=s.inside / seen,
        between=s.between / seen,
    )


def layers(steps: Sequence[Step], taken: Sequence[Mapping[int, Sequence[Cost]]]) -> list[Layer]:
    """Every MoE layer. Means over the ranks that hold it."""
    seconds: dict[str, list[float]] = defaultdict(list)
    even: dict[str, list[float]] = defaultdict(list)
    rows: dict[str, list[dict[int, float]]] = defaultdict(list)
    for step, by_rank in zip(steps, taken, strict=True):
        received: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for r in step.ranks:
            spent: dict[str, float] = defaultdict(float)
            for one in passes(r.travels):
                spent[one[0].layer] += max(t.end for t in one) - min(t.begin for t in one)
            for name, s in spent.items():
                mine = [c for c in by_rank[r.rank] if c.travel.layer == name]
                seconds[name].append(s)
                even[name].append(s - sum(c.uneven + c.transfer * (1 - c.evenness) for c in mine))
            for t in (t for t in r.travels if t.layer):
                received[t.layer][r.rank] += computed_rows(t)
        for name, by in received.items():
            rows[name].append(by)
    return [
        _layer(name, fmean(seconds[name]), fmean(even[name]), rows[name], steps)
        for name in sorted(seconds, key=lambda name: order((name, "", False)))
    ]


def _layer(name: str, seconds: float, even: float, rows: Sequence[Mapping[int, float]], steps: Sequence[Step]) -> Layer:
    loads = [load for step in steps if (load := step.load.get(name))]
    total = [sum(column) for column in zip(*loads, strict=False)]
    by_rank = {rank: sum(row.get(rank, 0.0) for row in rows) for row in rows for rank in row}
    return Layer(
        name,
        seconds,
        even,
        rank_imbalance=fmean(imbalance(list(row.values())) for row in rows),
        expert_imbalance=fmean(map(imbalance, loads)) if loads else None,
        busiest_rank=max(by_rank, key=lambda rank: by_rank[rank]) if any(by_rank.values()) else None,
        busiest_expert=total.index(max(total)) if total else None,
    )


def imbalance(loads: Sequence[float]) -> float:
    """Largest / mean; 1 of nothing."""
    return max(loads) / fmean(loads) if loads and sum(loads) > 0 else 1.0


def computed_rows(t: Travel) -> float:
    """What tells how many rows this rank's experts computed, in any unit: what goes back from them."""
    return t.bytes if t.kind in ROWS and (t.part, t.backward) == ("combine", False) and t.level != "inter" else 0.0


def kept(rank: int, t: Travel) -> int:
    """Bytes of t that its rank keeps for itself."""
    return t.sent[t.ranks.index(rank)] if t.sent else 0


def matrix(steps: Iterable[Step]) -> list[list[int]]:
    """Bytes per step from each rank (row) to each other of dispatch and combine, in the order of the steps' ranks."""
    every = list(steps)
    place = {r.rank: i for i, r in enumerate(every[0].ranks)}
    found = [[0] * len(place) for _ in place]
    for r in (r for step in every for r in step.ranks):
        for t in (t for t in r.travels if t.purpose == "expert"):
            for peer, size in zip(t.ranks, t.sent, strict=False):
                if peer != r.rank and peer in place:
                    found[place[r.rank]][place[peer]] += size
    return [[size // len(every) for size in row] for row in found]
