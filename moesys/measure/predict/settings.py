"""The settings that can be predicted from a recorded run. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moesys.config.registry import DISPATCHERS, kinds
from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.parallel.degrees import Degrees, resolve
from moesys.words import plural

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
"""Keys that may change."""

MODEL = f"{', '.join(MODELLED)}, and parallel.pp to 1"
"""The changes that a prediction may have, in words."""

PIPELINE = ("parallel.pp", "parallel.pp_schedule", "parallel.pp_virtual", "parallel.pp_split")
"""Keys that may change when pipelining ends."""

WITHOUT_EFFECT = ("name", "output", "measure")
"""Keys and sections that do not change a step."""


class WhatIfError(MoesysError):
    """A run is no base for predictions, or a setting is not modelled."""

    exit_code = 2


def variants(config: Config) -> dict[str, list[str]]:
    """Settings that are worth a prediction, as overrides of `config`."""
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
    """The changes that cannot be predicted, each with its reason; empty if all can."""
    old, new = (dict(_leaves(c.model_dump(mode="json"))) for c in (before, after))
    found = []
    for key in dict.fromkeys([*old, *new]):
        change = f"{key} ({old.get(key)} → {new.get(key)})"
        if old.get(key) == new.get(key) or key in MODELLED or key.split(".")[0] in WITHOUT_EFFECT:
            if key == "launch.link_gbit" and old.get(key) != new.get(key) and not (old.get(key) and new.get(key)):
                found.append(f"{change} cannot be predicted: the rate of the recorded run's links is unknown")
            continue
        if key in PIPELINE and after.parallel.pp == 1:
            continue
        why = "only the end of pipelining is" if key in PIPELINE else "predictions assume unchanged computation"
        found.append(f"{change} cannot be predicted: it is not modelled ({why})")
    return found


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def degrees_of(config: Config) -> Degrees:
    """The degrees of parallelism. Raises MoesysError for an illegal configuration."""
    degrees, problems = resolve(config)
    if degrees is None:
        raise MoesysError("; ".join(map(str, problems)))
    return degrees
