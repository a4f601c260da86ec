"""The sums of one rank over one recorded step: its part of the step's summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, nan

import numpy as np

from moesys.measure.explain.attribution import Attribution
from moesys.measure.explain.breakdown import OTHERS, breakdown
from moesys.measure.explain.expert_compute import experts_seconds
from moesys.measure.explain.layer_sums import Key, Table, layer_sums, phase_sums, sent_row
from moesys.measure.explain.step_summary import DETAILED
from moesys.measure.step import RankStep


@dataclass
class TableIndex:
    """The place of each rank, phase and layer in the tables of a summary.

    Attributes:
        members, hosts: ranks, and the node of each.
        phases, layers: row of each phase and layer.
        block: ranks of a block in the table of bytes; `blocks` is their number.
    """

    members: Sequence[int]
    hosts: Mapping[int, str]
    phases: Mapping[Key, int]
    layers: Mapping[str, int]

    def __post_init__(self) -> None:
        self.block = ceil(len(self.members) / DETAILED)
        self.blocks = ceil(len(self.members) / self.block)
        self.at = {rank: i for i, rank in enumerate(self.members)}
        self.block_of = {rank: i // self.block for i, rank in enumerate(self.members)}

    @classmethod
    def of(cls, members: Sequence[int], hosts: Mapping[int, str], keys: Sequence[Key]) -> TableIndex:
        """The index for these phases and their layers."""
        layers = dict.fromkeys(layer for layer, _, _ in keys)
        return cls(members, hosts, {k: i for i, k in enumerate(keys)}, {name: i for i, name in enumerate(layers)})


@dataclass
class RankSums:
    """The part of one rank in the summary of a step.

    Attributes:
        row: [columns] as `step_summary.COLUMNS`.
        waited_for: [ranks] seconds that this rank waited for each rank.
        phases, layers: sums as `layer_sums` makes them.
        rows: [layers] rows that its experts computed; −1 for layers that it does not hold.
        bytes: [blocks] bytes that it sends to each block of ranks.
    """

    row: Table
    waited_for: Table
    phases: Table
    layers: Table
    rows: Table
    bytes: Table


def sums_of_rank(r: RankStep, attributions: Sequence[Attribution], index: TableIndex) -> RankSums:
    """The sums of one rank, from its own collectives."""
    waited_for = np.zeros(len(index.members))
    for item in attributions:
        if item.span.purpose == "expert" and item.last in index.at:
            waited_for[index.at[item.last]] += item.wait
    layers, rows = layer_sums(r, attributions, index.layers)
    sent = sent_row(r, index.block_of, index.blocks)
    return RankSums(
        _row(r, attributions), waited_for, phase_sums(attributions, index.hosts, index.phases), layers, rows, sent
    )


def _row(r: RankStep, attributions: Sequence[Attribution]) -> Table:
    b = breakdown(r, attributions)
    expert = [item.causes for item in attributions if item.span.purpose == "expert"]
    causes = [sum(getattr(c, name) for c in expert) for name in ("transfer", "late", "uneven", "unattributed")]
    others = [b.others.get(name, nan) for name in OTHERS]
    hidden = nan if b.hidden is None else b.hidden
    counts = [t for t in r.collectives if t.purpose == "expert" and t.kind.endswith("_counts")]
    counting = sum(max(0.0, end - begin) for t in counts for begin, end in t.exposed)
    head = b.step, b.compute, b.exposed, *others, b.bubble, b.idle, hidden
    return np.array([*head, *causes, experts_seconds(r), counting])
