"""Makes the summary of a step from the sums of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesys.measure.explain.arrivals import transfer_rate
from moesys.measure.explain.attribution import Attribution, rank_attributions
from moesys.measure.explain.layer_sums import Table, add_rate, carries_rows, order
from moesys.measure.explain.matching import arrivals, matched_members
from moesys.measure.explain.rank_sums import TableIndex, sums_of_rank
from moesys.measure.explain.step_summary import DETAILED, Summary
from moesys.measure.step import DEEP_EP, Step


def summarised(step: Step) -> Summary:
    """The summary of a step with the collectives of all its ranks."""
    met = arrivals(step)
    attributions = {r.rank: rank_attributions(r, met[r.rank]) for r in step.ranks}
    keys = {(t.layer, t.part, t.backward) for r in step.ranks for t in r.collectives if t.layer}
    index = TableIndex.of(step.members, {r.rank: r.host for r in step.ranks}, sorted(keys, key=order))
    parts = [sums_of_rank(r, attributions[r.rank], index) for r in step.ranks]
    for collectives, members in matched_members(step):
        t = next(iter(collectives.values()))
        if carries_rows(t) and len(members) > 1:
            add_rate(
                parts[0].phases,
                t,
                transfer_rate(members, t.ranks, [index.hosts[m.rank] for m in members]),
                index.phases,
            )
    rows = np.array([part.rows for part in parts])
    blocks = np.zeros((index.blocks, index.blocks))
    for r, part in zip(step.ranks, parts, strict=True):
        blocks[index.block_of[r.rank]] += part.bytes
    return assembled(
        index,
        by_rank=np.array([part.row for part in parts]),
        waited_for=np.sum([part.waited_for for part in parts], axis=0),
        phases=np.sum([part.phases for part in parts], axis=0),
        phase_causes=np.array([part.phases[:, :4] for part in parts]).swapaxes(0, 1),
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
        unattributed=_why_unattributed([c for mine in attributions.values() for c in mine], step.members),
    )


def assembled(
    index: TableIndex,
    by_rank: Table,
    waited_for: Table,
    phases: Table,
    phase_causes: Table,
    layers: Table,
    most: Table,
    busiest: Any,
    blocks: Table,
    **facts: Any,
) -> Summary:
    """The summary from tables over all ranks. Phases and layers that no rank has are left out.

    phase_causes: [phases, ranks, 4], empty for many ranks.
    """
    seen = [i for i in range(len(index.phases)) if phases[i, 4] > 0]
    known = [i for i in range(len(index.layers)) if layers[i, 2] > 0]
    keys, names = list(index.phases), list(index.layers)
    return Summary(
        members=list(index.members),
        hosts=[index.hosts[rank] for rank in index.members],
        by_rank=[[None if x != x else x for x in row] for row in by_rank.tolist()],
        waited_for=waited_for.tolist(),
        phases=[(keys[i], phases[i].tolist()) for i in seen],
        phase_causes=[phase_causes[i].tolist() for i in seen] if len(index.members) <= DETAILED else [],
        layers=[(names[i], layers[i].tolist()) for i in known],
        most=[(max(0.0, float(most[i])), int(busiest[i])) for i in known],
        bytes=blocks.tolist(),
        block=index.block,
        **facts,
    )


def _why_unattributed(attributions: Sequence[Attribution], ranks: Sequence[int]) -> str:
    """The reason for unattributed time, as "this is the trace of one rank"; "" if there is none."""
    unattributed = [item.span for item in attributions if item.span.purpose == "expert" and item.unattributed > 0]
    absent = sorted({rank for t in unattributed for rank in t.ranks} - set(ranks))
    if not unattributed:
        return ""
    if len(ranks) == 1:
        return "this is the trace of one rank"
    if any(t.kind == DEEP_EP for t in unattributed):
        return "DeepEP's kernels wait inside themselves and do not name their group"
    if absent:
        names = ", ".join(map(str, absent[:4])) + ", …" * (len(absent) > 4)
        return f"the traces of other ranks of its groups ({names}) are missing"
    return "the traces do not say which ranks form its groups, or when they began"
