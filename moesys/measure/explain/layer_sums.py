"""Sums of a rank over one step, for each MoE layer and each of its phases, and the means made of them.

A phase is dispatch or combine of one layer, forward or backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moesys.measure.explain.arrivals import TransferRate
from moesys.measure.explain.attribution import Attribution
from moesys.measure.explain.expert_compute import AFTER_EXPERTS, passes
from moesys.measure.explain.explanation import Causes, Layer, LayerPhase
from moesys.measure.step import CollectiveSpan, RankStep

ROWS = ("all_to_all", "all_gather", "reduce_scatter")
"""Kinds that carry rows of tokens. Others carry counts, names or weights."""

Key = tuple[str, str, bool]
"""A phase: layer, part, and whether backward."""

Table = NDArray[np.float64]

CAUSES = slice(0, 4)
HOLDERS, INTER, INTRA, RATES, RATE_BYTES, RATE_SECONDS, INSIDE, BETWEEN = range(4, 12)
"""Columns of the sums of a phase after its `Causes`: see `LayerPhase`."""
PHASE_COLUMNS = 12

SECONDS, EVEN, LAYER_HOLDERS, LAYER_ROWS, ROW_HOLDERS = range(5)
"""Columns of the sums of a layer: see `Layer`."""
LAYER_COLUMNS = 5


def order(key: Key) -> tuple[object, ...]:
    """A sort key: layers by number, forward before backward, to the experts before back from them."""
    layer, part, backward = key
    numbers = tuple(int(word) for word in layer.split(".") if word.isdigit())
    return (numbers, layer, backward, (part, backward) in AFTER_EXPERTS)


def phase_sums(attributions: Sequence[Attribution], hosts: Mapping[int, str], place: Mapping[Key, int]) -> Table:
    """[phases, columns] seconds that a rank waited and bytes that it sent. Phases without a place are left out."""
    sums = np.zeros((len(place), PHASE_COLUMNS))
    for item in attributions:
        t = item.span
        at = place.get((t.layer, t.part, t.backward)) if t.layer else None
        if at is None:
            continue
        c = item.causes
        sums[at, CAUSES] += c.transfer, c.late, c.uneven, c.unattributed
        sums[at, HOLDERS] = 1
        for peer, size in zip(t.ranks, t.sent, strict=False):
            if hosts.get(peer) != hosts[item.rank]:
                sums[at, INTER] += size
            elif peer != item.rank:
                sums[at, INTRA] += size
    return sums


def add_rate(sums: Table, t: CollectiveSpan, rate: TransferRate | None, place: Mapping[Key, int]) -> None:
    """Add the rate of one collective of rows to the sums of its phase."""
    at = place.get((t.layer, t.part, t.backward))
    if rate is not None and at is not None:
        sums[at, RATES : BETWEEN + 1] += 1, *rate


def carries_rows(t: CollectiveSpan) -> bool:
    """Whether a collective carries rows of an MoE layer."""
    return bool(t.layer) and t.kind in ROWS


def layer_sums(r: RankStep, attributions: Sequence[Attribution], place: Mapping[str, int]) -> tuple[Table, Table]:
    """[layers, columns] sums of a rank, and rows that its experts computed (−1 for layers that it does not hold)."""
    sums, rows = np.zeros((len(place), LAYER_COLUMNS)), np.full(len(place), -1.0)
    spent: dict[str, float] = defaultdict(float)
    for one in passes(r.collectives):
        spent[one[0].layer] += max(t.end for t in one) - min(t.begin for t in one)
    lost: dict[str, float] = defaultdict(float)
    for c in attributions:
        lost[c.span.layer] += c.uneven + c.transfer * (1 - c.evenness)
    for layer, seconds in spent.items():
        if layer in place:
            sums[place[layer], [SECONDS, EVEN, LAYER_HOLDERS]] = seconds, seconds - lost[layer], 1
    for t in r.collectives:
        if t.layer in place:
            at = place[t.layer]
            rows[at] = max(0.0, rows[at]) + computed_rows(t)
    sums[:, LAYER_ROWS], sums[:, ROW_HOLDERS] = np.maximum(rows, 0), rows >= 0
    return sums, rows


def computed_rows(t: CollectiveSpan) -> float:
    """A number proportional to the rows that this rank's experts computed: the bytes that return from them."""
    return t.bytes if t.kind in ROWS and (t.part, t.backward) == ("combine", False) and t.level != "inter" else 0.0


def phase_of(key: Key, sums: Table, by_rank: Table, steps: int) -> LayerPhase:
    """The means of a phase from its sums over steps and ranks. `by_rank` [ranks, causes]: sums over the steps."""
    rates, seconds = sums[RATES], sums[RATE_SECONDS]
    return LayerPhase(
        *key,
        causes=Causes(*(sums[CAUSES] / sums[HOLDERS]).tolist()),
        bytes_inter=int(sums[INTER] // steps),
        bytes_intra=int(sums[INTRA] // steps),
        bandwidth=float(sums[RATE_BYTES] / seconds) if seconds > 0 else None,
        by_rank=[Causes(*row) for row in (by_rank / steps).tolist()],
        each=float(seconds / rates) if rates else None,
        inside=float(sums[INSIDE] / max(1.0, rates)),
        between=float(sums[BETWEEN] / max(1.0, rates)),
    )


def layer_of(
    name: str, sums: Table, most: Sequence[tuple[float, int]], loads: Sequence[Sequence[float]], each: Sequence[Table]
) -> Layer:
    """The means of a layer from its sums over all steps and ranks.

    most: of each step, most rows of any rank and that rank. loads: of each step, rows of each expert. each: of each
        step,
    the layer's sums.
    """
    total = [sum(column) for column in zip(*loads, strict=False)]
    ratios = [_ratio(rows, s[LAYER_ROWS] / max(1.0, s[ROW_HOLDERS])) for (rows, _), s in zip(most, each, strict=True)]
    busiest: dict[int, float] = defaultdict(float)
    for rows, rank in most:
        busiest[rank] += rows
    return Layer(
        name,
        float(sums[SECONDS] / sums[LAYER_HOLDERS]),
        float(sums[EVEN] / sums[LAYER_HOLDERS]),
        rank_imbalance=float(np.mean(ratios)),
        expert_imbalance=float(np.mean([imbalance(load) for load in loads])) if loads else None,
        busiest_rank=max(busiest, key=lambda rank: busiest[rank]) if any(busiest.values()) else None,
        busiest_expert=total.index(max(total)) if total else None,
    )


def imbalance(loads: Sequence[float]) -> float:
    """Largest / mean; 1 for no loads."""
    return _ratio(max(loads), sum(loads) / len(loads)) if loads else 1.0


def _ratio(most: float, mean: float) -> float:
    return most / mean if mean > 0 else 1.0


def sent_row(r: RankStep, place: Mapping[int, int], rows: int) -> Table:
    """[rows] bytes of dispatch and combine that a rank sends to others. `place`: the row of each rank in the table."""
    sent = np.zeros(rows)
    for t in r.collectives:
        if t.purpose == "expert":
            for peer, size in zip(t.ranks, t.sent, strict=False):
                if peer != r.rank and peer in place:
                    sent[place[peer]] += size
    return sent
