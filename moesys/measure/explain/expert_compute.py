"""Seconds that experts computed, seen from the collectives before and after them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moesys.measure.step import CollectiveSpan, RankStep

AFTER_EXPERTS = {("combine", False), ("dispatch", True)}
"""(part, backward) of collectives that carry results of experts."""


def computed(r: RankStep) -> Iterator[tuple[int, float]]:
    """(id of a span, seconds) for every collective that carries results of experts: the time that experts computed.

    The time counts from the end of the last collective towards the experts that had ended before.
    """
    for one in passes(r.collectives):
        to_experts = [t for t in one if (t.part, t.backward) not in AFTER_EXPERTS]
        for t in one:
            if (t.part, t.backward) in AFTER_EXPERTS:
                ended = [u.end for u in to_experts if u.end <= t.begin]
                if ended:
                    yield id(t), t.begin - max(ended)


def experts_seconds(r: RankStep) -> float:
    """Seconds that a rank's experts computed, seen from the collectives before and after."""
    return sum(seconds for _, seconds in computed(r))


def passes(collectives: Iterable[CollectiveSpan]) -> list[list[CollectiveSpan]]:
    """The collectives of MoE layers, one list for each pass of rows through a layer's experts."""
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
    """Whether t belongs to a pass whose first results already return: it carries another chunk's rows."""
    returned = min(u.end for u in before if (u.part, u.backward) in AFTER_EXPERTS)
    return t.begin < returned
