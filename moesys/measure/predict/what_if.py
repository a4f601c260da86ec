"""What a recorded run would have taken with another setting: predictions. Needs no torch.

    step' = step + Σ (factor · (model' − model)) − what chunks hide

over expert and data parallelism. The model of each is the planned bytes of every collective, spread over
ranks as the recorded loads of experts say, on the fitted links; `factor` is how much longer the
communication of the recorded run took than the model says, so that what the model does not know (how well
the links serve both directions, waiting) cancels to first order. Computation is taken to stay as it was: what
changes it is refused by name. Without pipelining the bubble and the messages of the pipeline go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from moesys.config.registry import DISPATCHERS, kinds
from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.measure.explain.averages import explain, summaries
from moesys.measure.explain.step_selection import RecordedStep
from moesys.measure.explain.step_summary import COLUMNS, Summary
from moesys.measure.predict.links import Profile
from moesys.measure.step import Seconds
from moesys.parallel import dimension, nodes
from moesys.parallel.cost import Collective, StepShape
from moesys.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, resolve
from moesys.parallel.gradient_sync import settled
from moesys.words import plural

EXPERT = ("ep", "etp")

MODELLED = (
    "parallel.ep",
    "parallel.etp",
    "parallel.dp",
    "parallel.dp_shard",
    "parallel.dispatch.kind",
    "parallel.dispatch.chunks",
    "parallel.dispatch.payload",
    "model.moe.capacity_factor",
    "launch.link_gbit",
)
MODEL = f"{', '.join(MODELLED)}, and parallel.pp to 1"
"""What a prediction may change, in words."""

PIPELINE = ("parallel.pp", "parallel.pp_schedule", "parallel.pp_virtual", "parallel.pp_split")
"""What may change where the pipeline goes."""

WITHOUT_EFFECT = ("name", "output", "measure")
"""Keys and sections that do not change what a step does."""


class WhatIfError(MoesysError):
    """A run cannot be the base of predictions, or a setting is outside of what they model."""

    exit_code = 2


@dataclass(frozen=True)
class Prediction:
    """One setting: its predicted seconds of a step, exposed all-to-all in it, and the step's where it was run too."""

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
        return {**asdict(self), "error": self.error}


def variants(config: Config) -> dict[str, list[str]]:
    """Settings worth a prediction, as overrides of `config`."""
    degrees = degrees_of(config)
    found: dict[str, list[str]] = {}
    if degrees.ep > 1:
        found[f"experts over {plural(degrees.ep // 2, 'rank')}"] = [f"parallel.ep={degrees.ep // 2}"]
        for kind, described in kinds(DISPATCHERS).items():
            if described.for_nodes and kind != config.parallel.dispatch.kind and config.cluster.nodes > 1:
                found[f"{kind} dispatch"] = [f"parallel.dispatch.kind={kind}"]
        if config.parallel.dispatch.chunks == 1:
            found["four chunks that overlap"] = ["parallel.dispatch.chunks=4"]
        found["capacity factor 1"] = ["model.moe.capacity_factor=1.0"]
        rate = config.launch.link_gbit
        found["links twice as fast"] = [] if rate is None else [f"launch.link_gbit={2 * rate:g}"]
    return found


def unmodelled(before: Config, after: Config) -> list[str]:
    """Changes from one configuration to the other that cannot be predicted, with the reason; none if all can."""
    old, new = (dict(_leaves(c.model_dump(mode="json"))) for c in (before, after))
    found = []
    for key in dict.fromkeys([*old, *new]):
        change = f"{key} ({old.get(key)} → {new.get(key)})"
        if old.get(key) == new.get(key) or key in MODELLED or key.split(".")[0] in WITHOUT_EFFECT:
            if key == "launch.link_gbit" and old.get(key) != new.get(key) and not (old.get(key) and new.get(key)):
                found.append(f"{change} cannot be predicted: the rate of the recorded run's links is not known")
            continue
        if key in PIPELINE and after.parallel.pp == 1:
            continue
        why = "of a pipeline only its end is" if key in PIPELINE else "computation is taken to stay as it was"
        found.append(f"{change} cannot be predicted: it is not modelled ({why})")
    return found


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def degrees_of(config: Config) -> Degrees:
    """Raises MoesysError if the configuration has none."""
    degrees, problems = resolve(config)
    if degrees is None:
        raise MoesysError("; ".join(map(str, problems)))
    return degrees


def _seconds(steps: Sequence[Summary], column: str) -> float:
    """Of one of `COLUMNS`, mean over steps and ranks."""
    return fmean(row[COLUMNS.index(column)] or 0.0 for step in steps for row in step.by_rank)


class Predictor:
    """Predictions from `steps` recorded under `config`, on links as in `profile`."""

    def __init__(self, config: Config, vocab_size: int, steps: Sequence[RecordedStep], profile: Profile):
        self.config, self.vocab_size, self.profile = config, vocab_size, profile
        every = summaries(steps)
        self.recorded = explain(every)
        self.every_load = _loads(every)
        self.loads = _mean_loads(self.every_load)
        self.computing = _seconds(every, "experts")
        rows = self.recorded.total.exposed - _seconds(every, "counts")  # as long however many rows there are
        observed = {"expert": rows, "data": self.recorded.total.others.get("data", 0.0)}
        self.base = self.seconds(config, profile)
        self.factor = {k: observed[k] / self.base[k] if self.base[k] > 0 and observed[k] > 0 else 1.0 for k in observed}

    def predict(self, name: str, changes: list[str], config: Config, faster: float = 1.0) -> Prediction:
        """The prediction of `config`, which is this run's with `changes`, on links `faster` times as fast.

        Raises:
            WhatIfError: it differs from the run's in something that is not modelled.
            ProfileError: the links that it needs were not measured, or their bandwidth could not be told.
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

    def _hidden(self, config: Config, travelling: float) -> float:
        """What more chunks than the recorded run's hide: all but the first and last of the shorter of the two."""
        before, after = self.config.parallel.dispatch.chunks, config.parallel.dispatch.chunks
        return min(self.computing, travelling) * (1 / before - 1 / after)

    def seconds(self, config: Config, profile: Profile) -> dict[str, float]:
        """Of a step's collectives of expert and data parallelism on the busiest stage, by the model."""
        degrees = degrees_of(config)
        config = settled(config, degrees, self.vocab_size)
        stages = [dimension.step_shape(config, degrees, self.vocab_size, pp) for pp in range(degrees.pp)]
        totals = [self._stage(shape, profile) for shapes in stages for shape in shapes]
        return {kind: max(total[kind] for total in totals) for kind in ("expert", "data")}

    def _stage(self, shape: StepShape, profile: Profile) -> dict[str, float]:
        total = {"expert": 0.0, "data": 0.0}
        for move in dimension.traffic(shape):
            if move.axes == EXPERT:
                total["expert"] += move.calls * self._span(move, shape, profile)
            elif any("dp" in axis for axis in move.axes):
                total["data"] += move.calls * profile.collective(move.kind, move.bytes, self._group(move, shape)[1])
        return total

    def _span(self, move: Collective, shape: StepShape, profile: Profile) -> float:
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
        """A group along the axes, and the nodes of its ranks."""
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
        """The share of assignments that the capacity leaves of the recorded ones."""
        return _fitting(self.every_load, config) / _fitting(self.every_load, self.config)


def _loads(steps: Sequence[Summary]) -> list[list[float]]:
    """The loads of every recorded layer that got tokens, of as many experts as the last one."""
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
    """Per expert, over layers and steps."""
    return [fmean(column) for column in zip(*loads, strict=True)] if loads else []


def _groups(degrees: Degrees, axes: tuple[str, ...]) -> list[list[int]]:
    return degrees.groups(axes, EXPERT_AXES if set(axes) <= set(EXPERT_AXES) and "pp" not in axes else DENSE_AXES)


def _peers(group: Sequence[int], rank: int, where: Sequence[int], level: str) -> list[int]:
    """To whom a rank sends on a level of hierarchical dispatch: a node's others, or its like on every node."""
    if not level:
        return list(group)
    node = [r for r in group if where[r] == where[rank]]
    if level == "intra":
        return node
    place = node.index(rank)
    return [[r for r in group if where[r] == other][place] for other in dict.fromkeys(where[r] for r in group)]
