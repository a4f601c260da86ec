"""Gathers recorded steps: each rank sums up its own collectives, and rank 0 gets the sums.

The size of what rank 0 gets does not depend on the number of collectives. To attribute a wait, a rank must know when
the last rank of the group began: see `arrival_exchange`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesys.measure.explain.attribution import rank_attributions
from moesys.measure.explain.layer_sums import Key, Table
from moesys.measure.explain.rank_sums import RankSums, TableIndex, sums_of_rank
from moesys.measure.explain.step_summary import COLUMNS, DETAILED, Summary
from moesys.measure.explain.summarise import assembled
from moesys.measure.record.arrival_exchange import exchange_arrivals
from moesys.measure.record.world import World
from moesys.measure.step import CollectiveSpan, RankStep

UNMATCHED = "some ranks did not record collectives that others of their group did"


@dataclass
class LocalStep:
    """A recorded step of this rank, on its own clock."""

    number: int
    begin: float
    end: float
    collectives: list[CollectiveSpan]


@dataclass(frozen=True)
class GatheredSteps:
    """Gathered steps.

    Attributes:
        own: this rank's steps with their group arrivals, on rank 0's clock.
        summaries: the summaries of all ranks' steps on rank 0; elsewhere none.
    """

    own: list[RankStep]
    summaries: list[Summary]


def gather_steps(
    local: Sequence[LocalStep],
    world: World,
    host: str,
    keys: Sequence[Key],
    loads: Mapping[int, dict[str, list[float]]],
    recorded: Sequence[int],
    audit: bool = False,
    layout: str = "",
) -> GatheredSteps:
    """Gather steps that all ranks recorded. Collective.

    Args:
        local: this rank's steps; every rank has the same numbers.
        host: name of this rank's node.
        keys: the phases that the model's layers may have, in order.
        loads: load of experts in each step, on rank 0.
        recorded: the ranks that keep their single collectives.
    """
    offset, names = world.clock_offset(), world.all_gather_names(host)
    begins = world.broadcast(np.array([s.begin + offset for s in local]))
    steps = [_on_clock(s, world.rank, host, offset - begin) for s, begin in zip(local, begins.tolist(), strict=True)]
    index = TableIndex.of(range(world.size), dict(enumerate(names)), keys)
    rates = [np.zeros((len(index.phases), 12)) for _ in local]
    arrivals = exchange_arrivals(steps, world, index, rates)
    own = [replace(r, arrivals=tuple(mine)) for r, mine in zip(steps, arrivals, strict=True)]
    parts = [sums_of_rank(r, rank_attributions(r, mine), index) for r, mine in zip(steps, arrivals, strict=True)]
    tables = _tables(parts, rates, world, index)
    most, busiest = _busiest(np.array([part.rows for part in parts]), world)
    row = [np.append(part.row, (r.begin, r.end)) for r, part in zip(steps, parts, strict=True)]
    by_rank = world.gather(np.array(row))
    if by_rank is None:
        return GatheredSteps(own, [])
    found = [
        assembled(
            index,
            by_rank=by_rank[:, i, : len(COLUMNS)],
            most=most[i],
            busiest=busiest[i],
            number=s.number,
            seconds=float(by_rank[:, i, -1].max() - by_rank[:, i, -2].min()),
            load=loads.get(s.number, {}),
            recorded=list(recorded),
            audit=audit,
            layout=layout,
            unattributed=UNMATCHED if np.nansum(by_rank[:, i, COLUMNS.index("unattributed")]) > 0 else "",
            **tables[i],
        )
        for i, s in enumerate(local)
    ]
    return GatheredSteps(own, found)


def _on_clock(step: LocalStep, rank: int, host: str, offset: float) -> RankStep:
    """The step with `offset` seconds added to its times, rounded to tenths of microseconds."""

    def at(time: float) -> float:
        return round(time + offset, 7)

    collectives = tuple(
        replace(t, begin=at(t.begin), waited=at(t.waited), end=at(t.end), met=None if t.met is None else at(t.met))
        for t in step.collectives
    )
    return RankStep(rank, host, at(step.begin), at(step.end), collectives)


def _busiest(rows: Table, world: World) -> tuple[Table, Table]:
    """Most rows of any rank and the first rank that has them: [steps, layers] each, from this rank's `rows`."""
    most = world.all_reduce_max(rows)
    # The lowest of the ranks with most rows is the maximum of the negated ranks.
    return most, -world.all_reduce_max(np.where(rows == most, -float(world.rank), -float(world.size)))


def _tables(
    parts: Sequence[RankSums], rates: Sequence[Table], world: World, index: TableIndex
) -> list[dict[str, Table]]:
    """The sums over ranks of each step, on rank 0, by one reduction of all tables."""
    phases, layers, ranks = len(index.phases), len(index.layers), world.size
    detailed = ranks if ranks <= DETAILED else 0
    shapes: dict[str, tuple[int, ...]] = {
        "waited_for": (ranks,), "phases": (phases, 12), "phase_causes": (phases, detailed, 4), "layers": (layers, 5),
        "blocks": (index.blocks, index.blocks),
    }  # fmt: skip
    flat = []
    for part, more in zip(parts, rates, strict=True):
        one = {name: np.zeros(shape) for name, shape in shapes.items()}
        one["waited_for"], one["phases"], one["layers"] = part.waited_for, part.phases + more, part.layers
        one["blocks"][index.block_of[world.rank]] = part.bytes
        if detailed:
            one["phase_causes"][:, world.rank] = part.phases[:, :4]
        flat.append(np.concatenate([table.ravel() for table in one.values()]))
    total = world.reduce_sum(np.array(flat))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    return [
        {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, np.split(row, ends), strict=True)}
        for row in total
    ]
