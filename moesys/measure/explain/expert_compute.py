"""Seconds that experts computed, seen from the collectives before and after them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moesys.measure.step import CollectiveSpan, RankStep

AFTER_EXPERTS = {("combine", False), ("dispatch", True)}
"""What travels when experts have computed: part, and whether backward."""


def computed(r: RankStep) -> Iterator[tuple[int, float]]:
    """For every collective that follows experts' computation, by identity: the seconds that these took.

    From the end of the last collective towards the experts that had ended before it began.
    """
    for occurrence in passes(r.collectives):
        towards = [t for t in occurrence if (t.part, t.backward) not in AFTER_EXPERTS]
        for t in occurrence:
            if (t.part, t.backward) in AFTER_EXPERTS:
                ended = [u.end for u in towards if u.end <= t.begin]
                if ended:
                    yield id(t), t.begin - max(ended)


def experts_seconds(r: RankStep) -> float:
    """Seconds that its experts computed, as told by what travelled before and after."""
    return sum(seconds for _, seconds in computed(r))


def passes(collectives: Iterable[CollectiveSpan]) -> list[list[CollectiveSpan]]:
    """Those of MoE layers, one list for each time that rows went to a layer's experts and came back."""
    found: list[list[CollectiveSpan]] = []
    current: dict[tuple[str, bool], list[CollectiveSpan]] = {}
    for t in sorted((t for t in collectives if t.layer), key=lambda t: t.begin):
        key, there = (t.layer, t.backward), (t.part, t.backward) not in AFTER_EXPERTS
        before = current.get(key)
        if before is None or (
            there and (before[-1].part, before[-1].backward) in AFTER_EXPERTS and not _open(before, t)
        ):
            current[key] = before = []
            found.append(before)
        before.append(t)
    return found


def _open(before: list[CollectiveSpan], t: CollectiveSpan) -> bool:
    """Whether t belongs to a pass whose first results are already on their way back: another chunk's rows."""
    returned = min(u.end for u in before if (u.part, u.backward) in AFTER_EXPERTS)
    return t.begin < returned
