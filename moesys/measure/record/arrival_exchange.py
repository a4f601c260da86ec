"""Tells every rank when the last rank of each of its collectives began.

One rank of each collective, in turn, is its owner: all members send it their times, and it answers with what they
need to know (`GroupArrival`). So nobody gets more than it recorded itself, whatever the number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np

from moesys.measure.explain.arrivals import MemberTimes, group_arrival, transfer_rate
from moesys.measure.explain.expert_compute import computed
from moesys.measure.explain.layer_sums import Table, add_rate, carries_rows
from moesys.measure.explain.matching import member
from moesys.measure.explain.rank_sums import TableIndex
from moesys.measure.record.world import Words, World
from moesys.measure.step import PURPOSES, CollectiveSpan, GroupArrival, RankStep, from_nan, to_nan

HEAD = 11
"""Words of a question before the bytes to each rank. Floats are sent by their bits."""
ANSWER = 7
"""Words of an answer: a `GroupArrival`."""

Key = tuple[int, ...]
"""Step, group, purpose and number: the same for all ranks of a collective."""

NONE = np.empty(0, np.int64)
UNKNOWN = GroupArrival(0.0, 0, False, None, 0, 1.0, None)


def exchange_arrivals(
    steps: Sequence[RankStep], world: World, index: TableIndex, rates: Sequence[Table]
) -> list[list[GroupArrival]]:
    """The group arrivals of every step's collectives, in their order. Collective.

    rates: [phases, columns] of each step, to which the rates of the collectives that this rank owns are added.
    """
    questions: list[list[Words]] = [[] for _ in range(world.size)]
    order: list[list[tuple[int, int]]] = [[] for _ in range(world.size)]
    owned: dict[Key, CollectiveSpan] = {}
    for i, r in enumerate(steps):
        after = dict(computed(r))
        for j, t in enumerate(r.collectives):
            key = (i, *_key(t))
            owner = t.ranks[t.number % len(t.ranks)]
            questions[owner].append(_question(key, member(r.rank, t, after.get(id(t)))))
            order[owner].append((i, j))
            if owner == r.rank:
                owned[key] = t
    asked = world.all_to_all([np.concatenate(words) if words else NONE for words in questions])
    answers = world.all_to_all(_answers(asked, owned, index, rates))
    found = [[UNKNOWN] * len(r.collectives) for r in steps]
    for mine, words in zip(order, answers, strict=True):
        table = words.reshape(-1, ANSWER)
        for (i, j), facts, times in zip(mine, table.tolist(), table.view(np.float64).tolist(), strict=True):
            found[i][j] = _arrival(facts, times)
    return found


def _key(t: CollectiveSpan) -> tuple[int, int, int]:
    """The part of a collective's key that does not depend on the step."""
    group = int.from_bytes(blake2b(repr(t.ranks).encode(), digest_size=7).digest(), "big")
    return group, 2 * PURPOSES.index(t.purpose) + (t.kind in ("send", "recv")), t.number


def _bits(*values: float | None) -> Words:
    return np.array([to_nan(v) for v in values], dtype=np.float64).view(np.int64)


def _question(key: Key, m: MemberTimes) -> Words:
    """A member's times as words; `_questions` is the inverse."""
    times = _bits(m.begin, m.waited, m.end, m.met, m.computed)
    return np.concatenate([np.array([*key, m.bytes, len(m.sent)], np.int64), times, np.array(m.sent, np.int64)])


def _questions(rank: int, words: Words) -> list[tuple[Key, MemberTimes]]:
    """The questions of one rank, in its order."""
    found = []
    at, whole, real = 0, words.tolist(), words.view(np.float64).tolist()
    while at < len(words):
        begin, waited, end, met, after = real[at + 6 : at + HEAD]
        stop = at + HEAD + whole[at + 5]
        sent = words[at + HEAD : stop]
        times = MemberTimes(rank, begin, waited, end, from_nan(met), whole[at + 4], from_nan(after), sent)
        found.append((tuple(whole[at : at + 4]), times))
        at = stop
    return found


def _answers(
    asked: Sequence[Words], owned: Mapping[Key, CollectiveSpan], index: TableIndex, rates: Sequence[Table]
) -> list[Words]:
    """The answers to each rank's questions, in its order."""
    questions = [_questions(rank, words) for rank, words in enumerate(asked)]
    members: dict[Key, list[MemberTimes]] = defaultdict(list)
    for key, times in (question for mine in questions for question in mine):
        members[key].append(times)
    answers = {}
    for key, group in members.items():
        t = owned.get(key)
        answers[key] = _words(_partial_arrival(group) if t is None else group_arrival(group, t.ranks))
        if t is not None and carries_rows(t) and len(group) > 1:
            rate = transfer_rate(group, t.ranks, [index.hosts[m.rank] for m in group])
            add_rate(rates[key[0]], t, rate, index.phases)
    return [np.concatenate([answers[key] for key, _ in mine]) if mine else NONE for mine in questions]


def _partial_arrival(members: Sequence[MemberTimes]) -> GroupArrival:
    """The arrival of a collective that its owner did not record: the owner does not know its ranks."""
    last = max(members, key=lambda m: m.begin)
    return GroupArrival(last.begin, last.rank, False, last.computed, last.bytes, 1.0, None)


def _words(arrival: GroupArrival) -> Words:
    """The arrival as words; `_arrival` is the inverse."""
    a = arrival
    facts = np.array([a.last, a.whole, a.bytes], np.int64)
    return np.concatenate([facts, _bits(a.arrived, a.computed, a.evenness, a.least)])


def _arrival(facts: Sequence[int], times: Sequence[float]) -> GroupArrival:
    last, whole, size = facts[:3]
    arrived, after, evenness, least = times[3:]
    return GroupArrival(arrived, last, bool(whole), from_nan(after), size, evenness, from_nan(least))
