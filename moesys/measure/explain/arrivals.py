"""Compares the members of one collective: who began last, how evenly they sent, and how fast rows moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesys.measure.explain.link_load import limits
from moesys.measure.step import GroupArrival

CLEAR_S = 20e-6
"""A rank that waited longer than this for a result saw when the result arrived."""

Matrix = NDArray[np.float64]


class MemberTimes(NamedTuple):
    """A collective as one of its ranks recorded it. Times are seconds on one clock.

    Attributes:
        computed: seconds that this rank's experts computed before it; None if it does not follow experts.
        sent: bytes to each rank of the group, in group order; empty if unknown.
    """

    rank: int
    begin: float
    waited: float
    end: float
    met: float | None
    bytes: int
    computed: float | None
    sent: Sequence[int] | NDArray[np.int64]


class TransferRate(NamedTuple):
    """A measured transfer of rows.

    Attributes:
        bytes: of the busiest rank to others.
        seconds: from the last arrival to the last end.
        inside, between: bytes that limit it on links (`link_load.limits`); 0 if unknown.
    """

    bytes: float
    seconds: float
    inside: float
    between: float


def group_arrival(members: Sequence[MemberTimes], group: Sequence[int]) -> GroupArrival:
    """The arrival of a group, from those of its members that were recorded."""
    last = max(members, key=lambda m: m.begin)
    waits = [m.met - m.begin for m in members if m.met is not None]
    return GroupArrival(
        arrived=last.begin,
        last=last.rank,
        whole=len(members) == len(group) > 1,
        computed=last.computed,
        bytes=last.bytes,
        evenness=evenness(members, group),
        least=min(waits) if len(waits) == len(members) else None,
    )


def evenness(members: Sequence[MemberTimes], group: Sequence[int]) -> float:
    """Bytes to and from others, mean over ranks / most of any rank; 1 if a rank's bytes are unknown."""
    if len(members) < len(group) or any(not len(m.sent) for m in members):
        return 1.0
    sent = _matrix(members, group)
    np.fill_diagonal(sent, 0)
    moved = np.maximum(sent.sum(0), sent.sum(1))
    return float(moved.mean() / moved.max()) if moved.max() > 0 else 1.0


def transfer_rate(members: Sequence[MemberTimes], group: Sequence[int], hosts: Sequence[str]) -> TransferRate | None:
    """The rate of a collective of rows; None if no rank saw when rows arrived. `hosts`: of the members."""
    ends = [m.end for m in members if m.end - m.waited > CLEAR_S]
    arrived = max(m.begin if m.met is None else m.met for m in members)
    if not ends or max(ends) <= arrived:
        return None
    place = {rank: i for i, rank in enumerate(group)}
    most = max(m.bytes - (int(m.sent[place[m.rank]]) if len(m.sent) else 0) for m in members)
    if any(not len(m.sent) for m in members):
        return TransferRate(most, max(ends) - arrived, 0.0, 0.0)
    return TransferRate(most, max(ends) - arrived, *limits(_matrix(members, group), hosts))


def _matrix(members: Sequence[MemberTimes], group: Sequence[int]) -> Matrix:
    """[sender][receiver] bytes among the members, in their order."""
    place = {rank: i for i, rank in enumerate(group)}
    return np.array([m.sent for m in members], dtype=float)[:, [place[m.rank] for m in members]]
