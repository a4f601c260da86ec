"""Predicts a step of a recorded run under another setting. Needs no torch.

    step' = step + Σ (factor · (model' − model)) − what chunks hide

The sum is over expert and data parallelism. The model takes the planned bytes of every collective, spreads them over
ranks by the recorded loads of experts, and puts them on the fitted links. `factor` is the ratio of recorded to modelled
communication, so errors of the model (links in both directions, waiting) cancel to first order. Computation stays as it
was; a change of computation is refused by name. Without pipelining, its bubble and messages are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from moesys.config.schema import Config
from moesys.measure.explain.averages import explain, summaries
from moesys.measure.explain.step_selection import RecordedStep
from moesys.measure.explain.step_summary import COLUMNS, Summary
from moesys.measure.predict.links import Profile
from moesys.measure.predict.settings import MODEL, WhatIfError, degrees_of, unmodelled
from moesys.measure.step import Seconds
from moesys.parallel import dimension, nodes
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees
from moesys.parallel.gradient_sync import settled

EXPERT = ("ep", "etp")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one setting.

    Attributes:
        changes: overrides of the recorded configuration.
        step: predicted seconds of a step.
        exposed: predicted seconds of exposed all-to-all.
        measured: seconds of a step in a real run; None without one.
    """

    name: str
    changes: list[str]
    step: Seconds
    exposed: Seconds
    measured: Annotated[float, Field(gt=0, le=1e10)] | None = None

    @property
    def error(self) -> float | None:
        """(predicted − measured) / measured."""
        return None if self.measured is None else self.step / self.measured - 1

    def as_json(self) -> dict[str, Any]:
        """All figures, with the error."""
        return {**asdict(self), "error": self.error}


def _seconds(steps: Sequence[Summary], column: str) -> float:
    """The mean of one of `COLUMNS` over steps and ranks."""
    return fmean(row[COLUMNS.index(column)] or 0.0 for step in steps for row in step.by_rank)


class Predictor:
    """Predicts from `steps`, recorded under `config`, on the links of `profile`."""

    def __init__(self, config: Config, vocab_size: int, steps: Sequence[RecordedStep], profile: Profile):
        self.config, self.vocab_size, self.profile = config, vocab_size, profile
        every = summaries(steps)
        self.recorded = explain(every)
        self.every_load = _loads(every)
        self.loads = _mean_loads(self.every_load)
        self.computing = _seconds(every, "experts")
        rows = self.recorded.total.exposed - _seconds(
            every, "counts"
        )  # their time does not depend on the number of rows
        observed = {"expert": rows, "data": self.recorded.total.others.get("data", 0.0)}
        self.base = self.seconds(config, profile)
        self.factor = {k: observed[k] / self.base[k] if self.base[k] > 0 and observed[k] > 0 else 1.0 for k in observed}

    def predict(self, name: str, changes: list[str], config: Config, faster: float = 1.0) -> Prediction:
        """The prediction for `config`, the recorded one with `changes`, on links `faster` times as fast.

        Raises:
            WhatIfError: a change is not modelled.
            ProfileError: the profile lacks a link that is needed, or its bandwidth.
        """
        if problems := unmodelled(self.config, config):
            raise WhatIfError("\n".join(problems) + f"\n    remedy: change only {MODEL}")
        total, degrees = self.recorded.total, degrees_of(config)
        before, after = self.config.launch.link_gbit, config.launch.link_gbit
        model = self.seconds(config, self.profile.faster(faster * (after / before if after and before else 1.0)))
        change = {kind: self.factor[kind] * (model[kind] - self.base[kind]) for kind in model}
        hidden = self._hidden(config, self.factor["expert"] * model["expert"])
        exposed = max(0.0, total.exposed + change["expert"] - hidden) if degrees.ep * degrees.etp > 1 else 0.0
        step = total.step + change["data"] + exposed - total.exposed
        if degrees.pp == 1:
            step -= total.bubble + total.others.get("pipeline", 0.0)
        return Prediction(name, changes, step, exposed)

    def _hidden(self, config: Config, communication: float) -> float:
        """Seconds that additional chunks hide: of compute or `communication`, the shorter, all but the outer chunks."""
        before, after = self.config.parallel.dispatch.chunks, config.parallel.dispatch.chunks
        return min(self.computing, communication) * (1 / before - 1 / after)

    def seconds(self, config: Config, profile: Profile) -> dict[str, float]:
        """Modelled seconds of expert and data parallelism in a step, on the busiest stage."""
        degrees = degrees_of(config)
        config = settled(config, degrees, self.vocab_size)
        stages = [dimension.step_shape(config, degrees, self.vocab_size, pp) for pp in range(degrees.pp)]
        totals = [self._stage(shape, profile) for shapes in stages for shape in shapes]
        return {kind: max(total[kind] for total in totals) for kind in ("expert", "data")}

    def _stage(self, shape: StepShape, profile: Profile) -> dict[str, float]:
        total = {"expert": 0.0, "data": 0.0}
        for move in (move for move in dimension.traffic(shape) if not move.small):
            if move.axes == EXPERT:
                total["expert"] += move.calls * self._expert_seconds(move, shape, profile)
            elif any("dp" in axis for axis in move.axes):
                total["data"] += move.calls * profile.collective(move.kind, move.bytes, self._group(move, shape)[1])
        return total

    def _expert_seconds(self, move: Collective, shape: StepShape, profile: Profile) -> float:
        """Modelled seconds of one collective of experts."""
        ranks, places = self._group(move, shape)
        if move.kind != "all_to_all":
            return profile.collective(move.kind, move.bytes, places)
        share = self._shares(shape, len(ranks)) if not move.level else None
        kept = self._kept(shape.config)
        world = range(shape.degrees.world)
        where = nodes.planned(list(world), shape.config.cluster)
        sent = [[0.0] * len(where) for _ in world]
        for group in _groups(shape.degrees, EXPERT):
            for i in group:
                peers = _peers(group, i, where, move.level)
                for j in peers:
                    part = 1 / len(peers) if share is None else share[group.index(j)]
                    sent[i][j] = move.bytes * kept * part
        return profile.exchange(sent, where)

    def _group(self, move: Collective, shape: StepShape) -> tuple[list[int], list[int]]:
        """One group along the axes, and the nodes of its ranks."""
        ranks = _groups(shape.degrees, move.axes)[0]
        return ranks, nodes.planned(ranks, shape.config.cluster)

    def _shares(self, shape: StepShape, ranks: int) -> list[float]:
        """The share of all rows that each rank of an expert group gets."""
        d, experts = shape.degrees, len(self.loads)
        if not experts:
            return [1 / ranks] * ranks
        local, total = experts // d.ep, sum(self.loads)
        shares = [sum(self.loads[i * local : (i + 1) * local]) / total / d.etp for i in range(d.ep)]
        return [share for share in shares for _ in range(d.etp)]

    def _kept(self, config: Config) -> float:
        """The share of the recorded assignments that the capacity keeps."""
        return _fitting(self.every_load, config) / _fitting(self.every_load, self.config)


def _loads(steps: Sequence[Summary]) -> list[list[float]]:
    """The loads of all recorded layers with tokens and with as many experts as the last one."""
    found = [load for step in steps for load in step.load.values() if sum(load) > 0]
    return [load for load in found if len(load) == len(found[-1])]


def _fitting(loads: Sequence[Sequence[float]], config: Config) -> float:
    """The share of assignments within the capacity, over layers and steps."""
    moe = config.model.moe
    if moe is None or moe.capacity_factor is None or not loads:
        return 1.0
    room = [ceil(moe.capacity_factor * fmean(layer)) for layer in loads]
    fitting = sum(min(load, most) for layer, most in zip(loads, room, strict=True) for load in layer)
    return fitting / sum(map(sum, loads))


def _mean_loads(loads: Sequence[Sequence[float]]) -> list[float]:
    """The mean load of each expert over layers and steps."""
    return [fmean(column) for column in zip(*loads, strict=True)] if loads else []


def _groups(degrees: Degrees, axes: tuple[str, ...]) -> list[list[int]]:
    return degrees.groups(axes, EXPERT_AXES if set(axes) <= set(EXPERT_AXES) and "pp" not in axes else DENSE_AXES)


def _peers(group: Sequence[int], rank: int, where: Sequence[int], level: str) -> list[int]:
    """The ranks to which a rank sends on a level: its node, or the ranks in its place on every node."""
    if not level:
        return list(group)
    node = [r for r in group if where[r] == where[rank]]
    if level == "intra":
        return node
    place = node.index(rank)
    return [[r for r in group if where[r] == other][place] for other in dict.fromkeys(where[r] for r in group)]
