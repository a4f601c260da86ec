"""Makes the summary of a step from the sums of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesys.measure.explain.arrivals import rate
from moesys.measure.explain.attribution import Cost, rank_costs
from moesys.measure.explain.layer_sums import Table, add_rate, carries_rows, order
from moesys.measure.explain.matching import matches, meetings
from moesys.measure.explain.rank_sums import Places, part_of
from moesys.measure.explain.step_summary import DETAILED, Summary
from moesys.measure.step import DEEP_EP, Step


def summarised(step: Step) -> Summary:
    """The summary of a step whose travels are all at hand."""
    met = meetings(step)
    costs = {r.rank: rank_costs(r, met[r.rank]) for r in step.ranks}
    keys = {(t.layer, t.part, t.backward) for r in step.ranks for t in r.travels if t.layer}
    places = Places.of(step.members, {r.rank: r.host for r in step.ranks}, sorted(keys, key=order))
    parts = [part_of(r, costs[r.rank], places) for r in step.ranks]
    for travels, members in matches(step):
        t = next(iter(travels.values()))
        if carries_rows(t) and len(members) > 1:
            add_rate(parts[0].legs, t, rate(members, t.ranks, [places.hosts[m.rank] for m in members]), places.legs)
    rows = np.array([part.rows for part in parts])
    blocks = np.zeros((places.blocks, places.blocks))
    for r, part in zip(step.ranks, parts, strict=True):
        blocks[places.block_of[r.rank]] += part.bytes
    return assembled(
        places,
        by_rank=np.array([part.row for part in parts]),
        waited_for=np.sum([part.waited_for for part in parts], axis=0),
        legs=np.sum([part.legs for part in parts], axis=0),
        leg_causes=np.array([part.legs[:, :4] for part in parts]).swapaxes(0, 1),
        layers=np.sum([part.layers for part in parts], axis=0),
        most=rows.max(0),
        busiest=np.array(step.members)[rows.argmax(0)],
        blocks=blocks,
        number=step.number,
        seconds=step.seconds,
        load=step.load,
        recorded=step.members,
        audit=step.audit,
        layout=step.layout,
        marked=step.marked,
        untold=_untold_because([c for mine in costs.values() for c in mine], step.members),
    )


def assembled(
    places: Places,
    by_rank: Table,
    waited_for: Table,
    legs: Table,
    leg_causes: Table,
    layers: Table,
    most: Table,
    busiest: Any,
    blocks: Table,
    **facts: Any,
) -> Summary:
    """A summary from tables over all ranks; legs and layers that no rank had are left out.

    leg_causes: [legs, ranks, 4], which many ranks do not have.
    """
    seen = [i for i in range(len(places.legs)) if legs[i, 4] > 0]
    known = [i for i in range(len(places.layers)) if layers[i, 2] > 0]
    keys, names = list(places.legs), list(places.layers)
    return Summary(
        members=list(places.members),
        hosts=[places.hosts[rank] for rank in places.members],
        by_rank=[[None if x != x else x for x in row] for row in by_rank.tolist()],
        waited_for=waited_for.tolist(),
        legs=[(keys[i], legs[i].tolist()) for i in seen],
        leg_causes=[leg_causes[i].tolist() for i in seen] if len(places.members) <= DETAILED else [],
        layers=[(names[i], layers[i].tolist()) for i in known],
        most=[(max(0.0, float(most[i])), int(busiest[i])) for i in known],
        bytes=blocks.tolist(),
        block=places.block,
        **facts,
    )


def _untold_because(costs: Sequence[Cost], ranks: Sequence[int]) -> str:
    """The reason that waiting cannot be told from moving bytes in some of the costs; "" if it can in all."""
    untold = [cost.travel for cost in costs if cost.travel.purpose == "expert" and cost.untold > 0]
    absent = sorted({rank for t in untold for rank in t.ranks} - set(ranks))
    if not untold:
        return ""
    if len(ranks) == 1:
        return "this is the trace of one rank"
    if any(t.kind == DEEP_EP for t in untold):
        return "DeepEP's kernels wait inside themselves and do not tell their group"
    if absent:
        names = ", ".join(map(str, absent[:4])) + ", …" * (len(absent) > 4)
        return f"the traces of other ranks of its groups ({names}) are missing"
    return "the traces do not tell the ranks of its groups, or when they began"
