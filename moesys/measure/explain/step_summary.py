"""A recorded step of all ranks without its single travels: what each rank's own sums come to.

Its size grows with ranks and with layers, not with their product, nor with what travelled. Written one JSON object a
line to runs/NAME/measure/summary.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil, nan
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from moesys.files import json_text
from moesys.measure.explain.arrivals import rate
from moesys.measure.explain.attribution import Cost, experts_seconds, matches, meetings, rank_costs
from moesys.measure.explain.breakdown import OTHERS, breakdown
from moesys.measure.explain.explanation import Breakdown
from moesys.measure.explain.layer_sums import (
    LAYER_COLUMNS,
    LEG_COLUMNS,
    Key,
    Table,
    add_rate,
    carries_rows,
    layer_sums,
    leg_sums,
    order,
    sent_row,
)
from moesys.measure.step import DEEP_EP, Rank, RankStep, Seconds, Step

DETAILED = 64
"""Ranks up to which everything is told of each; of more, travels of a sample, and bytes between ranks by blocks."""

COLUMNS = (
    "step", "compute", "exposed", *OTHERS, "bubble", "idle", "hidden",
    "transfer", "late", "uneven", "untold", "experts", "counts",
)  # fmt: skip
"""What a summary has of each rank, in seconds: `Breakdown`, `Causes`, what experts computed, and exchange of counts."""

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
Row = list[Number]


@dataclass(frozen=True)
class Summary:
    """One recorded training step of all ranks.

    Attributes:
        number, load, audit, layout, marked: as `Step`.
        members, hosts: of all ranks.
        recorded: those of them whose travels are on file.
        seconds: from the first rank's begin to the last one's end.
        by_rank: `COLUMNS` of each rank; None where there is nothing of that kind or nobody saw it.
        waited_for: seconds that others, all together, waited for each rank.
        legs: layer, part and whether backward, with sums over ranks (`legs.leg_sums`).
        leg_causes: causes of each leg and rank, where there are no more than `DETAILED` ranks.
        layers: names, with sums over ranks (`legs.layer_sums`).
        most: of each layer, most rows of any rank, and which.
        bytes: from each block of ranks to each; a block has `block` ranks, one where there are few.
        untold: why some waiting cannot be told; "" if all can.
    """

    number: int
    members: list[Rank]
    hosts: list[str]
    seconds: Seconds
    by_rank: list[list[Seconds | None]]
    waited_for: Row
    legs: list[tuple[Key, Row]]
    leg_causes: list[list[Row]]
    layers: list[tuple[str, Row]]
    most: list[tuple[Number, Rank]]
    bytes: list[Row]
    block: Annotated[int, Field(ge=1, le=2**31)] = 1
    load: dict[str, list[Annotated[float, Field(allow_inf_nan=False, ge=0)]]] = field(default_factory=dict)
    recorded: list[Rank] = field(default_factory=list)
    audit: bool = False
    layout: str = ""
    marked: bool = True
    untold: str = ""

    def to_json(self) -> str:
        """One line."""
        return json_text(vars(self), compact=True)

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Summary:
        """Inverse of `to_json`, as JSON has it; ValueError if it is none, or contradicts itself."""
        try:
            found = _schema().validate_python(value)
        except ValidationError as error:
            raise ValueError(str(error)) from None
        found._check()
        return found

    def _check(self) -> None:
        ranks, blocks = len(self.members), ceil(len(self.members) / self.block)
        detailed = len(self.legs) if self.leg_causes else 0
        fits = (
            ranks > 0 and len(set(self.members)) == ranks and len(self.hosts) == len(self.waited_for) == ranks
            and len(self.by_rank) == ranks and all(len(row) == len(COLUMNS) for row in self.by_rank)
            and all((row[0] or 0) > 0 for row in self.by_rank) and self.seconds > 0
            and all(len(row) == LEG_COLUMNS and row[4] > 0 for _, row in self.legs)
            and all(len(row) == LAYER_COLUMNS and row[2] > 0 for _, row in self.layers)
            and len(self.most) == len(self.layers) and len(self.leg_causes) == detailed
            and all(len(leg) == ranks and all(len(row) == 4 for row in leg) for leg in self.leg_causes)
            and len(self.bytes) == blocks and all(len(row) == blocks for row in self.bytes)
        )  # fmt: skip
        if not fits:
            raise ValueError("sizes or times that cannot be")


@cache
def _schema() -> TypeAdapter[Summary]:
    return TypeAdapter(Summary)


@dataclass
class Places:
    """Where each rank, leg and layer lies in the tables of a summary."""

    members: Sequence[int]
    hosts: Mapping[int, str]
    legs: Mapping[Key, int]
    layers: Mapping[str, int]

    def __post_init__(self) -> None:
        self.block = ceil(len(self.members) / DETAILED)
        self.blocks = ceil(len(self.members) / self.block)
        self.at = {rank: i for i, rank in enumerate(self.members)}
        self.block_of = {rank: i // self.block for i, rank in enumerate(self.members)}

    @classmethod
    def of(cls, members: Sequence[int], hosts: Mapping[int, str], keys: Sequence[Key]) -> Places:
        """For these legs and their layers."""
        layers = dict.fromkeys(layer for layer, _, _ in keys)
        return cls(members, hosts, {k: i for i, k in enumerate(keys)}, {name: i for i, name in enumerate(layers)})


@dataclass
class Part:
    """What one rank adds to the summary of a step: see there. `rows` are −1 of layers that it does not hold."""

    row: Table
    waited_for: Table
    legs: Table
    layers: Table
    rows: Table
    bytes: Table


def part_of(r: RankStep, costs: Sequence[Cost], places: Places) -> Part:
    """The sums of one rank, from its own travels."""
    waited_for = np.zeros(len(places.members))
    for cost in costs:
        if cost.travel.purpose == "expert" and cost.last in places.at:
            waited_for[places.at[cost.last]] += cost.wait
    layers, rows = layer_sums(r, costs, places.layers)
    sent = sent_row(r, places.block_of, places.blocks)
    return Part(_row(r, costs), waited_for, leg_sums(costs, places.hosts, places.legs), layers, rows, sent)


def _row(r: RankStep, costs: Sequence[Cost]) -> Table:
    b = breakdown(r, costs)
    expert = [cost.causes for cost in costs if cost.travel.purpose == "expert"]
    causes = [sum(getattr(c, name) for c in expert) for name in ("transfer", "late", "uneven", "untold")]
    others = [b.others.get(name, nan) for name in OTHERS]
    hidden = nan if b.hidden is None else b.hidden
    counts = [t for t in r.travels if t.purpose == "expert" and t.kind.endswith("_counts")]
    counting = sum(max(0.0, end - begin) for t in counts for begin, end in t.exposed)
    head = b.step, b.compute, b.exposed, *others, b.bubble, b.idle, hidden
    return np.array([*head, *causes, experts_seconds(r), counting])


def breakdown_of(row: Sequence[float]) -> Breakdown:
    """From the first of `COLUMNS`; NaN: nothing of that kind."""
    value = dict(zip(COLUMNS, row, strict=True))
    others: dict[str, float] = {name: value[name] for name in OTHERS if value[name] == value[name]}
    hidden = None if value["hidden"] != value["hidden"] else value["hidden"]
    return Breakdown(value["step"], value["compute"], value["exposed"], others, value["bubble"], value["idle"], hidden)


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
