"""Averages recorded steps: makes their explanation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesys.measure.explain.breakdown import OTHERS
from moesys.measure.explain.explanation import Causes, Explanation, Layer, LayerPhase
from moesys.measure.explain.layer_sums import LAYER_COLUMNS, PHASE_COLUMNS, Key, Table, layer_of, order, phase_of
from moesys.measure.explain.sentence import sentence
from moesys.measure.explain.step_selection import RecordedStep, steps_to_explain
from moesys.measure.explain.step_summary import COLUMNS, Summary, breakdown_of
from moesys.measure.explain.summarise import summarised
from moesys.measure.step import Step


def explain_run(steps: Sequence[RecordedStep]) -> Explanation | None:
    """The explanation of a run's recorded steps that `steps_to_explain` selects; None without any."""
    choice = steps_to_explain(steps)
    return explain(choice.steps, [choice.note] if choice.note else []) if choice.steps else None


def summaries(steps: Sequence[RecordedStep]) -> list[Summary]:
    """The summaries of the steps. Steps with all collectives are summarised."""
    return [summarised(step) if isinstance(step, Step) else step for step in steps]


def explain(steps: Sequence[RecordedStep], notes: Sequence[str] = ()) -> Explanation:
    """The explanation of `steps`: at least one, all of the same ranks. `notes` follow the sentence."""
    every = summaries(steps)
    last = every[-1]
    rows = np.array([s.by_rank for s in every], dtype=float)  # [steps, ranks, columns], NaN for None
    for column in map(COLUMNS.index, OTHERS):
        if not np.isnan(rows[..., column]).all():  # a purpose that occurs anywhere is 0 where it does not
            rows[..., column] = np.nan_to_num(rows[..., column])
    causes = rows.mean((0, 1))[[COLUMNS.index(name) for name in ("transfer", "late", "uneven", "unattributed")]]
    waited_for = np.array([s.waited_for for s in every]).sum(0) / (len(every) * len(last.members))
    explanation = Explanation(
        steps=[s.number for s in every],
        sentence="",
        total=breakdown_of(rows.mean((0, 1)).tolist()),
        by_step=[breakdown_of(row) for row in rows.mean(1).tolist()],
        by_rank=[breakdown_of(row) for row in rows.mean(0).tolist()],
        causes=Causes(*causes.tolist()),
        phases=_phases(every),
        layers=_layers(every),
        ranks=last.members,
        waited_for=waited_for.tolist(),
        hosts=last.hosts,
        bytes=[[int(value) for value in row] for row in np.array([s.bytes for s in every]).sum(0) // len(every)],
        load=[s.load for s in every],
        block=last.block,
        recorded=last.recorded,
        audit=any(s.audit for s in every),
        marked=all(s.marked for s in every),
        unattributed_because=next((s.unattributed for s in every if s.unattributed), ""),
    )
    return replace(explanation, sentence=" ".join([sentence(explanation), *notes]))


def _phases(every: Sequence[Summary]) -> list[LayerPhase]:
    """Means of each phase over the ranks that hold the layer."""
    ranks = len(every[-1].members)
    sums: dict[Key, Table] = defaultdict(lambda: np.zeros(PHASE_COLUMNS))
    detailed = all(s.phase_causes or not s.phases for s in every)
    by_rank: dict[Key, Table] = defaultdict(lambda: np.zeros((ranks if detailed else 0, 4)))
    for s in every:
        for i, (key, row) in enumerate(s.phases):
            sums[key] += row
            if detailed:
                by_rank[key] += s.phase_causes[i]
    return [phase_of(key, sums[key], by_rank[key], len(every)) for key in sorted(sums, key=order)]


def _layers(every: Sequence[Summary]) -> list[Layer]:
    """Means of each layer over the ranks that hold it."""
    sums: dict[str, Table] = defaultdict(lambda: np.zeros(LAYER_COLUMNS))
    each: dict[str, list[Table]] = defaultdict(list)
    most: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for s in every:
        for (name, row), busiest in zip(s.layers, s.most, strict=True):
            sums[name] += row
            each[name].append(np.array(row))
            most[name].append(busiest)
    loads = {name: [load for s in every if (load := s.load.get(name))] for name in sums}
    names = sorted(sums, key=lambda name: order((name, "", False)))
    return [layer_of(name, sums[name], most[name], loads[name], each[name]) for name in names]
