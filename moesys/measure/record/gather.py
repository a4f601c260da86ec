"""Gathers what ranks recorded: each sums up its own travels, and rank 0 gets sums alone.

To take a wait apart a rank must know when the last rank of the group began. For each collective one of its ranks, in
turn, is told by all of them and answers what they need to know (`Meeting`). So nobody gets more than it recorded
itself, whatever the number of ranks. The sums are then added up over ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from moesys.measure.explain.arrivals import Member, meeting, rate
from moesys.measure.explain.attribution import rank_costs
from moesys.measure.explain.expert_compute import computed
from moesys.measure.explain.layer_sums import Key, Table, add_rate, carries_rows
from moesys.measure.explain.matching import member
from moesys.measure.explain.rank_sums import Part, Places, part_of
from moesys.measure.explain.step_summary import COLUMNS, DETAILED, Summary
from moesys.measure.explain.summarise import assembled
from moesys.measure.record.world import Peers, Words
from moesys.measure.step import PURPOSES, Meeting, RankStep, Travel, from_nan, to_nan


@dataclass
class Held:
    """A recorded step of this rank on its own clock."""

    number: int
    begin: float
    end: float
    travels: list[Travel]


@dataclass(frozen=True)
class Gathered:
    """This rank's steps with their meetings, on one clock, and on rank 0 the summaries of all ranks' steps."""

    mine: list[RankStep]
    summaries: list[Summary]


def gather_steps(
    held: Sequence[Held],
    peers: Peers,
    host: str,
    keys: Sequence[Key],
    loads: Mapping[int, dict[str, list[float]]],
    recorded: Sequence[int],
    audit: bool = False,
    layout: str = "",
) -> Gathered:
    """Bring steps together that all ranks hold. Collective.

    keys: the legs that the model's layers may have, in order. loads: of each step, on rank 0. recorded: the ranks
    whose travels are kept.
    """
    offset, names = peers.clock(), peers.names(host)
    begins = peers.first(np.array([h.begin + offset for h in held]))
    steps = [_moved(h, peers.rank, host, offset - begin) for h, begin in zip(held, begins.tolist(), strict=True)]
    places = Places.of(range(peers.world), dict(enumerate(names)), keys)
    rates = [np.zeros((len(places.legs), 12)) for _ in held]
    met = _met(steps, peers, places, rates)
    mine = [replace(r, meetings=tuple(m)) for r, m in zip(steps, met, strict=True)]
    parts = [part_of(r, rank_costs(r, m), places) for r, m in zip(steps, met, strict=True)]
    tables = _tables(parts, rates, peers, places)
    rows = np.array([part.rows for part in parts])
    most = peers.highest(rows)
    # Of those that have most the first: the highest of what is larger for lower ranks.
    busiest = -peers.highest(np.where(rows == most, -float(peers.rank), -float(peers.world)))
    row = [np.append(part.row, (r.begin, r.end)) for r, part in zip(steps, parts, strict=True)]
    by_rank = peers.rows(np.array(row))
    if by_rank is None:
        return Gathered(mine, [])
    found = [
        assembled(
            places,
            by_rank=by_rank[:, i, : len(COLUMNS)],
            most=most[i],
            busiest=busiest[i],
            number=h.number,
            seconds=float(by_rank[:, i, -1].max() - by_rank[:, i, -2].min()),
            load=loads.get(h.number, {}),
            recorded=list(recorded),
            audit=audit,
            layout=layout,
            untold=UNTOLD if np.nansum(by_rank[:, i, COLUMNS.index("untold")]) > 0 else "",
            **tables[i],
        )
        for i, h in enumerate(held)
    ]
    return Gathered(mine, found)


UNTOLD = "some ranks did not record collectives that others of their group did"


def _moved(held: Held, rank: int, host: str, by: float) -> RankStep:
    """The step with all times later by so many seconds, in tenths of microseconds."""

    def at(time: float) -> float:
        return round(time + by, 7)

    travels = tuple(
        replace(t, begin=at(t.begin), waited=at(t.waited), end=at(t.end), met=None if t.met is None else at(t.met))
        for t in held.travels
    )
    return RankStep(rank, host, at(held.begin), at(held.end), travels)


def _tables(parts: Sequence[Part], rates: Sequence[Table], peers: Peers, places: Places) -> list[dict[str, Table]]:
    """Sums over ranks of each step, on rank 0."""
    legs, layers, world = len(places.legs), len(places.layers), peers.world
    detailed = world if world <= DETAILED else 0
    shapes: dict[str, tuple[int, ...]] = {
        "waited_for": (world,), "legs": (legs, 12), "leg_causes": (legs, detailed, 4), "layers": (layers, 5),
        "blocks": (places.blocks, places.blocks),
    }  # fmt: skip
    flat = []
    for part, more in zip(parts, rates, strict=True):
        one = {name: np.zeros(shape) for name, shape in shapes.items()}
        one["waited_for"], one["legs"], one["layers"] = part.waited_for, part.legs + more, part.layers
        one["blocks"][places.block_of[peers.rank]] = part.bytes
        if detailed:
            one["leg_causes"][:, peers.rank] = part.legs[:, :4]
        flat.append(np.concatenate([table.ravel() for table in one.values()]))
    total = peers.total(np.array(flat))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    return [
        {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, np.split(row, ends), strict=True)}
        for row in total
    ]


HEAD = 11
"""Words of a travel before what it sent to each rank; floats by their bits."""
ANSWER = 7
"""Words of an answer: a `Meeting`."""


def _met(steps: Sequence[RankStep], peers: Peers, places: Places, rates: Sequence[Table]) -> list[list[Meeting]]:
    """The meetings of every step's travels, in their order; what this rank was told of is added to `rates`."""
    asked: list[list[Words]] = [[] for _ in range(peers.world)]
    order: list[list[tuple[int, int]]] = [[] for _ in range(peers.world)]
    known: dict[tuple[int, ...], Travel] = {}
    for i, r in enumerate(steps):
        after = dict(computed(r))
        for j, t in enumerate(r.travels):
            key = (i, *_key(t))
            owner = t.ranks[t.number % len(t.ranks)]
            asked[owner].append(_asking(key, member(r.rank, t, after.get(id(t)))))
            order[owner].append((i, j))
            if owner == r.rank:
                known[key] = t
    come = peers.exchange([np.concatenate(words) if words else _NONE for words in asked])
    answers = peers.exchange(_answers(come, known, places, rates))
    found = [[_UNMET] * len(r.travels) for r in steps]
    for mine, words in zip(order, answers, strict=True):
        table = words.reshape(-1, ANSWER)
        for (i, j), facts, times in zip(mine, table.tolist(), table.view(np.float64).tolist(), strict=True):
            found[i][j] = _answered(facts, times)
    return found


_NONE = np.empty(0, np.int64)
_UNMET = Meeting(0.0, 0, False, None, 0, 1.0, None)


def _key(t: Travel) -> tuple[int, int, int]:
    """The same for all ranks of a collective or message of a step."""
    group = int.from_bytes(blake2b(repr(t.ranks).encode(), digest_size=7).digest(), "big")
    return group, 2 * PURPOSES.index(t.purpose) + (t.kind in ("send", "recv")), t.number


def _bits(*values: float | None) -> Words:
    return np.array([to_nan(v) for v in values], dtype=np.float64).view(np.int64)


def _asking(key: tuple[int, ...], m: Member) -> Words:
    times = _bits(m.begin, m.waited, m.end, m.met, m.computed)
    return np.concatenate([np.array([*key, m.bytes, len(m.sent)], np.int64), times, np.array(m.sent, np.int64)])


def _answers(
    come: Sequence[Words], known: Mapping[tuple[int, ...], Travel], places: Places, rates: Sequence[Table]
) -> list[Words]:
    """What each rank gets to know of the travels that it told of, in its order."""
    members: dict[tuple[int, ...], list[Member]] = defaultdict(list)
    keys: list[list[tuple[int, ...]]] = []
    for rank, words in enumerate(come):
        at, whole, real = 0, words.tolist(), words.view(np.float64).tolist()
        keys.append([])
        while at < len(words):
            key, (begin, waited, end, met, after) = tuple(whole[at : at + 4]), real[at + 6 : at + HEAD]
            behind = at + HEAD + whole[at + 5]
            sent = words[at + HEAD : behind]
            members[key].append(Member(rank, begin, waited, end, from_nan(met), whole[at + 4], from_nan(after), sent))
            keys[-1].append(key)
            at = behind
    answers = {}
    for key, told_of in members.items():
        t = known.get(key)
        group = t.ranks if t is not None else ()
        answers[key] = _answer(meeting(told_of, group) if t is not None else _partly(told_of))
        if t is not None and carries_rows(t) and len(told_of) > 1:
            add_rate(rates[key[0]], t, rate(told_of, group, [places.hosts[m.rank] for m in told_of]), places.legs)
    return [np.concatenate([answers[key] for key in mine]) if mine else _NONE for mine in keys]


def _partly(members: Sequence[Member]) -> Meeting:
    """Of a collective that this rank has not recorded itself: it does not know its ranks."""
    last = max(members, key=lambda m: m.begin)
    return Meeting(last.begin, last.rank, False, last.computed, last.bytes, 1.0, None)


def _answer(m: Meeting) -> Words:
    facts = np.array([m.last, m.whole, m.bytes], np.int64)
    return np.concatenate([facts, _bits(m.arrived, m.computed, m.evenness, m.least)])


def _answered(facts: Sequence[int], times: Sequence[float]) -> Meeting:
    last, whole, size = facts[:3]
    arrived, after, evenness, least = times[3:]
    return Meeting(arrived, last, bool(whole), from_nan(after), size, evenness, from_nan(least))
