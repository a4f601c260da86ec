"""What the ranks of one collective tell each other about it: who came last, and how evenly they sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesys.measure.explain.link_load import limits
from moesys.measure.step import Meeting

CLEAR_S = 20e-6
"""A rank that waited longer than this for a result saw when it arrived."""

Matrix = NDArray[np.float64]


class Member(NamedTuple):
    """A collective as one of its ranks saw it. Times are seconds on one clock.

    Attributes:
        computed: seconds that its experts had computed before, None if it does not follow them.
        sent: bytes to each rank of the group, in group order; empty if that is not known.
    """

    rank: int
    begin: float
    waited: float
    end: float
    met: float | None
    bytes: int
    computed: float | None
    sent: Sequence[int] | NDArray[np.int64]


class Rate(NamedTuple):
    """Of a collective of rows: bytes of the busiest rank, seconds from the last arrival, and what limits on links."""

    bytes: float
    seconds: float
    inside: float
    between: float


def meeting(members: Sequence[Member], group: Sequence[int]) -> Meeting:
    """What each of the members, of those of `group` that were seen, gets to know."""
    last = max(members, key=lambda m: m.begin)
    waits = [m.met - m.begin for m in members if m.met is not None]
    return Meeting(
        arrived=last.begin,
        last=last.rank,
        whole=len(members) == len(group) > 1,
        computed=last.computed,
        bytes=last.bytes,
        evenness=evenness(members, group),
        least=min(waits) if len(waits) == len(members) else None,
    )


def evenness(members: Sequence[Member], group: Sequence[int]) -> float:
    """Bytes to and from others, mean over ranks / most; 1 if any rank's are not known."""
    if len(members) < len(group) or any(not len(m.sent) for m in members):
        return 1.0
    sent = _matrix(members, group)
    np.fill_diagonal(sent, 0)
    moved = np.maximum(sent.sum(0), sent.sum(1))
    return float(moved.mean() / moved.max()) if moved.max() > 0 else 1.0


def rate(members: Sequence[Member], group: Sequence[int], hosts: Sequence[str]) -> Rate | None:
    """How fast rows went, where a rank saw when they arrived; `hosts` are of the members."""
    ends = [m.end for m in members if m.end - m.waited > CLEAR_S]
    arrived = max(m.begin if m.met is None else m.met for m in members)
    if not ends or max(ends) <= arrived:
        return None
    place = {rank: i for i, rank in enumerate(group)}
    most = max(m.bytes - (int(m.sent[place[m.rank]]) if len(m.sent) else 0) for m in members)
    if any(not len(m.sent) for m in members):
        return Rate(most, max(ends) - arrived, 0.0, 0.0)
    return Rate(most, max(ends) - arrived, *limits(_matrix(members, group), hosts))


def _matrix(members: Sequence[Member], group: Sequence[int]) -> Matrix:
    """[sender][receiver] bytes among the members, in their order."""
    place = {rank: i for i, rank in enumerate(group)}
    return np.array([m.sent for m in members], dtype=float)[:, [place[m.rank] for m in members]]
